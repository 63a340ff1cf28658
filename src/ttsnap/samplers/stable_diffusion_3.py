"""Stable Diffusion 3 and 3.5: drives a stock `StableDiffusion3Pipeline`, one denoiser call at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttsnap.samplers.base import check_size, warn_if_cut
from ttsnap.samplers.flow import FlowSampler, resolution_shift, schedule


class SD3Text(NamedTuple):
    """Encoded prompt: both CLIPs' states, then T5's [1, t, d]; both CLIPs pooled [1, d]."""

    states: Tensor
    pooled: Tensor


class StableDiffusion3Sampler(FlowSampler):
    """Euler flow matching exactly as `StableDiffusion3Pipeline` does it, for any mix of candidates.

    Skip-layer guidance is not among the options; asked for among the `arguments` of the pipeline's call, it is left to
    that call (`ttsnap.samplers.any_pipeline`).

    Args:
        pipe: a `StableDiffusion3Pipeline`, with or without its T5.
        num_steps: denoiser calls of a finished image.
        height: image height in pixels (default: the pipeline's).
        width: image width in pixels.
        guidance_scale: strength of classifier-free guidance; above 1 each call costs two passes.
        negative_prompt: what guidance leads away from (default: the empty prompt).
        max_sequence_length: most T5 tokens.
        max_batch: most candidates in one call.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        num_steps: int = 28,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 7.0,
        negative_prompt: str | None = None,
        max_sequence_length: int = 256,
        max_batch: int | None = None,
    ) -> None:
        default = pipe.default_sample_size * pipe.vae_scale_factor
        super().__init__(
            pipe, num_steps=num_steps, height=height or default, width=width or default, max_batch=max_batch
        )
        unit = pipe.vae_scale_factor * pipe.patch_size
        check_size(self.height, self.width, unit)
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.max_sequence_length = max_sequence_length
        shifting = pipe.scheduler.config.get("use_dynamic_shifting")
        mu = resolution_shift(pipe.scheduler, (self.height // unit) * (self.width // unit)) if shifting else None
        self.schedule = schedule(pipe.scheduler, num_steps, self.device, mu=mu)

    @property
    def passes(self) -> int:
        """Transformer passes per call: 2 with guidance."""
        return 2 if self.guidance_scale > 1 else 1

    def call_options(self) -> dict[str, Any]:
        """Arguments of the stock pipeline for the same images."""
        options: dict[str, Any] = {"guidance_scale": self.guidance_scale}
        options["max_sequence_length"] = self.max_sequence_length
        if self.passes == 2 and self.negative_prompt is not None:
            options["negative_prompt"] = self.negative_prompt
        return super().call_options() | options

    def noise(self, seed: int) -> Tensor:
        """Latents [1, channels, h, w] of a seed, as a CPU generator with that seed gives them."""
        config = self.pipe.transformer.config
        generator = torch.Generator("cpu").manual_seed(seed)
        noise: Tensor = self.pipe.prepare_latents(
            1, config.in_channels, self.height, self.width, self.dtype_of(self.pipe.transformer), self.device, generator
        )
        return noise

    def encode(self, prompt: str) -> tuple[SD3Text, SD3Text | None]:
        """The prompt and, with guidance, the negative prompt (one for all prompts)."""
        negative = None
        if self.passes == 2:
            negative = self.kept(("negative",), lambda: self._text(self.negative_prompt or ""))
        return self._text(prompt), negative

    def _text(self, prompt: str) -> SD3Text:
        pipe = self.pipe
        if pipe.text_encoder_3 is not None:  # CLIP reads less, but T5 reads on
            warn_if_cut(pipe.tokenizer_3, prompt, self.max_sequence_length, "T5")
        else:
            warn_if_cut(pipe.tokenizer, prompt, pipe.tokenizer_max_length, "CLIP")
        states, _, pooled, _ = pipe.encode_prompt(
            prompt=[prompt],
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return SD3Text(states, pooled)

    def velocity(self, latents: Tensor, encoded: list[Any], index: int) -> Tensor:
        """The velocity [n, channels, h, w]; both halves of guidance in one batch, the negative first."""
        texts = [text[0] for text in encoded]
        if self.passes == 2:
            texts = [text[1] for text in encoded] + texts
        velocity: Tensor = self.pipe.transformer(
            hidden_states=torch.cat([latents] * self.passes),
            timestep=self.schedule.timesteps[index].expand(len(texts)),
            encoder_hidden_states=torch.cat([text.states for text in texts]),
            pooled_projections=torch.cat([text.pooled for text in texts]),
            return_dict=False,
        )[0]
        if self.passes == 1:
            return velocity
        negative, positive = velocity.chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    def decode_batch(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 of clean latents [n, channels, h, w]."""
        vae = self.pipe.vae
        latents = x0.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        image = vae.decode(latents, return_dict=False)[0]
        return self.pipe.image_processor.postprocess(image, output_type="pt").float()  # type: ignore[no-any-return]
