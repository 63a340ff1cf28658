"""Stable Diffusion 1.x and 2.x: drives a stock `StableDiffusionPipeline`, one denoiser call at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttsnap.samplers.base import Trajectories
from ttsnap.samplers.outputs import warn_of_blanks
from ttsnap.samplers.unet import UNetSampler, UNetText


class StableDiffusionSampler(UNetSampler):
    """Exactly as `StableDiffusionPipeline` does it, for any mix of candidates.

    The pipeline's safety checker, if it has one, sees finished images, as it does in the pipeline, and no early looks:
    a finished image that it objects to is black, and a warning says so.
    """

    _check_tflop: float | None = None

    @property
    def check_tflop(self) -> float:
        """TFLOP of the safety checker on one image, which is run for that once."""
        from ttsnap.samplers.flops import count_tflop

        if self.pipe.safety_checker is None:
            return 0.0
        if self._check_tflop is None:
            image = torch.zeros(1, 3, self.height, self.width, device=self.device, dtype=self.pipe.vae.dtype)
            self._check_tflop = count_tflop(lambda: self._checked(image))
        return self._check_tflop

    def encode_text(self, prompt: str) -> UNetText:
        """States of the CLIP text encoder."""
        return UNetText(self.pipe.encode_prompt(prompt, self.device, 1, False)[0])

    def decode_batch(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 of clean latents [n, channels, h, w]."""
        image = self._decoded(x0)
        return self._shown(image, [False] * len(image))

    @torch.no_grad()
    def look(self, trajectories: Trajectories) -> Tensor:
        """What a look shows; finished images go through the safety checker."""
        if self.pipe.safety_checker is None or trajectories.step < self.num_steps:
            return super().look(trajectories)
        assert trajectories.x0 is not None
        x0 = trajectories.x0

        def finish(rows: slice) -> Tensor:
            image, objections = self._checked(self._decoded(x0[rows]))
            warn_of_blanks(objections, trajectories.prompts[rows], trajectories.seeds[rows])
            return self._shown(image, objections)

        return torch.cat(self._decodes(len(x0), finish))

    def _decoded(self, x0: Tensor) -> Tensor:
        vae = self.pipe.vae
        image: Tensor = vae.decode(x0.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return image

    def _checked(self, image: Tensor) -> tuple[Tensor, list[bool]]:
        """Images in -1..1 after the safety checker, and what it objects to."""
        image, objections = self.pipe.run_safety_checker(image, self.device, self.pipe.vae.dtype)
        return image, [bool(objection) for objection in objections]

    def _shown(self, image: Tensor, blank: Sequence[bool]) -> Tensor:
        fine = [not one for one in blank]
        images: Tensor = self.pipe.image_processor.postprocess(image, output_type="pt", do_denormalize=fine)
        return images.float()
