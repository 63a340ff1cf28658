"""FLUX.1: drives a stock `FluxPipeline`, one denoiser call at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttsnap.samplers.base import check_size, warn_if_cut
from ttsnap.samplers.flow import FlowSampler, even_sigmas, resolution_shift, schedule


class FluxText(NamedTuple):
    """Encoded prompt: T5 states [1, t, d], CLIP pooled [1, d], and the same of the negative prompt, if any."""

    states: Tensor
    pooled: Tensor


class FluxSampler(FlowSampler):
    """Euler flow matching exactly as `FluxPipeline` does it, for any mix of candidates.

    Args:
        pipe: a `FluxPipeline` with a `FlowMatchEulerDiscreteScheduler`.
        num_steps: denoiser calls of a finished image.
        height: image height in pixels (default: the pipeline's).
        width: image width in pixels.
        guidance_scale: for guidance-distilled models.
        negative_prompt: with `true_cfg_scale` above 1, run classifier-free guidance against it.
        true_cfg_scale: strength of that guidance; each call then costs two passes.
        max_sequence_length: most T5 tokens.
        max_batch: most candidates in one call.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        num_steps: int = 20,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 3.5,
        negative_prompt: str | None = None,
        true_cfg_scale: float = 1.0,
        max_sequence_length: int = 512,
        max_batch: int | None = None,
    ) -> None:
        default = pipe.default_sample_size * pipe.vae_scale_factor
        super().__init__(
            pipe, num_steps=num_steps, height=height or default, width=width or default, max_batch=max_batch
        )
        check_size(self.height, self.width, 2 * pipe.vae_scale_factor)
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.true_cfg_scale = true_cfg_scale
        self.max_sequence_length = max_sequence_length
        tokens = (self.height // (2 * pipe.vae_scale_factor)) * (self.width // (2 * pipe.vae_scale_factor))
        self.schedule = schedule(
            pipe.scheduler,
            num_steps,
            self.device,
            sigmas=None if pipe.scheduler.config.get("use_flow_sigmas") else even_sigmas(num_steps),
            mu=resolution_shift(pipe.scheduler, tokens),
        )
        self._image_ids: Tensor | None = None

    @property
    def passes(self) -> int:
        """Transformer passes per call: 2 with classifier-free guidance."""
        return 2 if self.negative_prompt is not None and self.true_cfg_scale > 1 else 1

    def call_options(self) -> dict[str, Any]:
        """Arguments of the stock pipeline for the same images."""
        options: dict[str, Any] = {"guidance_scale": self.guidance_scale}
        options["max_sequence_length"] = self.max_sequence_length
        if self.passes == 2:
            options |= {"negative_prompt": self.negative_prompt, "true_cfg_scale": self.true_cfg_scale}
        return super().call_options() | options

    def noise(self, seed: int) -> Tensor:
        """Packed noise [1, tokens, channels] of a seed, as a CPU generator with that seed gives it."""
        latents, self._image_ids = self.pipe.prepare_latents(
            1,
            self.pipe.transformer.config.in_channels // 4,
            self.height,
            self.width,
            self.dtype_of(self.pipe.text_encoder_2 or self.pipe.transformer),  # of the T5 states, as in the pipeline
            self.device,
            torch.Generator("cpu").manual_seed(seed),
            None,
        )
        return latents  # type: ignore[no-any-return]

    def encode(self, prompt: str) -> tuple[FluxText, FluxText | None]:
        """The prompt and, with guidance, the negative prompt (one for all prompts)."""
        negative = None
        if self.passes == 2:
            negative = self.kept(("negative",), lambda: self._text(str(self.negative_prompt)))
        return self._text(prompt), negative

    def _text(self, prompt: str) -> FluxText:
        warn_if_cut(self.pipe.tokenizer_2, prompt, self.max_sequence_length, "T5")
        states, pooled, _ = self.pipe.encode_prompt(
            prompt=[prompt], prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return FluxText(states, pooled)

    def velocity(self, latents: Tensor, encoded: list[Any], index: int) -> Tensor:
        """The velocity [n, tokens, channels]; with guidance, away from that of the negative prompt."""
        velocity = self._velocity(latents, [text[0] for text in encoded], index)
        if self.passes == 2:
            negative = self._velocity(latents, [text[1] for text in encoded], index)
            velocity = negative + self.true_cfg_scale * (velocity - negative)
        return velocity

    def _velocity(self, latents: Tensor, texts: list[FluxText], index: int) -> Tensor:
        count = len(latents)
        transformer = self.pipe.transformer
        guidance = None
        if transformer.config.guidance_embeds:
            guidance = torch.full([1], self.guidance_scale, device=latents.device, dtype=torch.float32).expand(count)
        states = torch.cat([text.states for text in texts])
        velocity: Tensor = transformer(
            hidden_states=latents,
            timestep=self.schedule.timesteps[index].expand(count).to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=torch.cat([text.pooled for text in texts]),
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=latents.device, dtype=states.dtype),
            img_ids=self._ids(latents),
            joint_attention_kwargs={},
            return_dict=False,
        )[0]
        return velocity

    def _ids(self, latents: Tensor) -> Tensor:
        if self._image_ids is None:
            self.noise(0)
        assert self._image_ids is not None
        return self._image_ids.to(latents.device)

    def decode_batch(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 of packed clean latents [n, tokens, channels]."""
        return self.decode_spatial(self.spatial(x0.to(self.pipe.vae.dtype)))

    def spatial(self, x0: Tensor) -> Tensor:
        """Packed latents [n, tokens, channels] as a picture [n, channels, h, w]."""
        pipe = self.pipe
        return pipe._unpack_latents(x0, self.height, self.width, pipe.vae_scale_factor)  # type: ignore[no-any-return]

    def decode_spatial(self, latents: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 of normalised latents [n, channels, h, w]."""
        pipe = self.pipe
        latents = latents.to(pipe.vae.dtype)
        latents = latents / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0.0)
        image = pipe.vae.decode(latents, return_dict=False)[0]
        return pipe.image_processor.postprocess(image, output_type="pt").float()  # type: ignore[no-any-return]
