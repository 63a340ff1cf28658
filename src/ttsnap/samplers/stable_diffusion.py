"""Stable Diffusion 1.x and 2.x: drives a stock `StableDiffusionPipeline`, one denoiser call at a time."""

from __future__ import annotations

from torch import Tensor

from ttsnap.samplers.unet import UNetSampler, UNetText


class StableDiffusionSampler(UNetSampler):
    """Exactly as `StableDiffusionPipeline` does it, for any mix of candidates.

    The pipeline's safety checker, if it has one, sees every decoded image, as it does in the pipeline: an image that it
    objects to is black, and a search drops it.
    """

    def encode_text(self, prompt: str) -> UNetText:
        """States of the CLIP text encoder."""
        return UNetText(self.pipe.encode_prompt(prompt, self.device, 1, False)[0])

    def decode_batch(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 of clean latents [n, channels, h, w]."""
        pipe = self.pipe
        image = pipe.vae.decode(x0.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]
        image, objections = pipe.run_safety_checker(image, self.device, pipe.vae.dtype)
        fine = [not objection for objection in objections] if objections is not None else [True] * len(image)
        images: Tensor = pipe.image_processor.postprocess(image, output_type="pt", do_denormalize=fine)
        return images.float()
