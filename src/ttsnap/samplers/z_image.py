"""Z-Image, Turbo and base: drives a stock `ZImagePipeline`, one denoiser call at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttsnap.samplers.base import Declined, check_size
from ttsnap.samplers.flow import FlowSampler, resolution_shift, schedule
from ttsnap.samplers.text import warn_if_chat_cut


class ZImageSampler(FlowSampler):
    """Euler flow matching exactly as `ZImagePipeline` does it, for any mix of candidates.

    The transformer takes a list of prompts of any lengths and hides what it pads. Latents are kept in fp32. It answers
    with x0 - noise, the negative of the velocity, and reads the time from 0 (noise) to 1.

    Args:
        pipe: a `ZImagePipeline` with a `FlowMatchEulerDiscreteScheduler`.
        num_steps: denoiser calls of a finished image.
        height: image height in pixels (default 1024).
        width: image width in pixels.
        guidance_scale: classifier-free guidance; above 0 each call costs two passes. Turbo wants 0.
        negative_prompt: what guidance leads away from (default: the empty prompt).
        cfg_normalization: bound of the guided prediction's norm, as a multiple of the norm without guidance; 0: none.
        cfg_truncation: time 0..1 after which there is no guidance. The cost counts two passes for every call.
        max_sequence_length: most text tokens.
        max_batch: most candidates in one call.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        num_steps: int = 20,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | None = None,
        cfg_normalization: float = 0.0,
        cfg_truncation: float = 1.0,
        max_sequence_length: int = 512,
        max_batch: int | None = None,
    ) -> None:
        from diffusers.pipelines.z_image import pipeline_z_image as stock

        super().__init__(pipe, num_steps=num_steps, height=height or 1024, width=width or 1024, max_batch=max_batch)
        unit = 2 * pipe.vae_scale_factor
        check_size(self.height, self.width, unit)
        if not hasattr(stock, "get_default_z_image_sigmas"):
            raise Declined(
                "Z-Image has another schedule in this release of diffusers; the adapter is for 0.42 and newer"
            )
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.cfg_normalization = cfg_normalization
        self.cfg_truncation = cfg_truncation
        self.max_sequence_length = max_sequence_length
        self.schedule = schedule(
            pipe.scheduler,
            num_steps,
            self.device,
            sigmas=stock.get_default_z_image_sigmas(num_steps),
            mu=resolution_shift(pipe.scheduler, (self.height // unit) * (self.width // unit)),
        )
        self._times = ((1000 - self.schedule.timesteps) / 1000).tolist()

    @property
    def passes(self) -> int:
        """Transformer passes per call: 2 with classifier-free guidance."""
        return 2 if self.guidance_scale > 0 else 1

    def call_options(self) -> dict[str, Any]:
        """Arguments of the stock pipeline for the same images."""
        options: dict[str, Any] = {"guidance_scale": self.guidance_scale}
        options["max_sequence_length"] = self.max_sequence_length
        if self.passes == 2:
            options |= {"negative_prompt": self.negative_prompt} if self.negative_prompt is not None else {}
            options |= {"cfg_normalization": self.cfg_normalization} if self.cfg_normalization > 0 else {}
            options |= {"cfg_truncation": self.cfg_truncation} if self.cfg_truncation < 1 else {}
        return super().call_options() | options

    def noise(self, seed: int) -> Tensor:
        """Noise [1, channels, h, w] of a seed in fp32, as a CPU generator with that seed gives it."""
        latents: Tensor = self.pipe.prepare_latents(
            1,
            self.pipe.transformer.in_channels,
            self.height,
            self.width,
            torch.float32,
            self.device,
            torch.Generator("cpu").manual_seed(seed),
        )
        return latents

    def encode(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        """Text states [t, d] of the prompt and, with guidance, of the negative prompt (one for all)."""
        negative = (
            self.kept(("negative",), lambda: self._states(self.negative_prompt or "")) if self.passes == 2 else None
        )
        return self._states(prompt), negative

    def _states(self, prompt: str) -> Tensor:
        def rendered(text: str) -> str:
            chat = [{"role": "user", "content": text}]
            make = self.pipe.tokenizer.apply_chat_template
            return str(make(chat, tokenize=False, add_generation_prompt=True, enable_thinking=True))

        warn_if_chat_cut(self.pipe.tokenizer, rendered, prompt, self.max_sequence_length, "Qwen3")
        states, _ = self.pipe.encode_prompt(
            prompt, self.device, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return states[0]  # type: ignore[no-any-return]

    def velocity(self, latents: Tensor, encoded: list[Any], index: int) -> Tensor:
        """The velocity [n, channels, h, w] in fp32; both halves of guidance in one batch, as in the pipeline."""
        guided = self.passes == 2 and not self._times[index] > self.cfg_truncation
        texts = [text[0] for text in encoded]
        model = latents.to(self.pipe.transformer.dtype).unsqueeze(2)
        if guided:
            model, texts = model.repeat(2, 1, 1, 1, 1), texts + [text[1] for text in encoded]
        time = (1000 - self.schedule.timesteps[index].expand(len(model))) / 1000
        answers = self.pipe.transformer(list(model.unbind()), time, texts, return_dict=False)[0]
        answer = torch.stack([part.float() for part in answers]).squeeze(2)
        return -(self._guide(*answer.chunk(2)) if guided else answer)

    def _guide(self, positive: Tensor, negative: Tensor) -> Tensor:
        guided = positive + self.guidance_scale * (positive - negative)
        if self.cfg_normalization > 0:
            norm, most = guided.flatten(1).norm(dim=1), positive.flatten(1).norm(dim=1) * self.cfg_normalization
            factor = torch.where(norm > most, most / norm, 1.0)
            guided = guided * factor.view(-1, 1, 1, 1)
        return guided

    def decode_batch(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 of clean latents [n, channels, h, w]."""
        vae = self.pipe.vae
        latents = x0.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        image = vae.decode(latents, return_dict=False)[0]
        return self.pipe.image_processor.postprocess(image, output_type="pt").float()  # type: ignore[no-any-return]
