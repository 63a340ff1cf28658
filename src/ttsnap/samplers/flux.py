"""FLUX.1: drives a stock `FluxPipeline`, one denoiser call at a time."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ttsnap.samplers.base import BaseSampler, Declined, warn_if_cut


class FluxText(NamedTuple):
    """Encoded prompt: T5 states [1, t, d], CLIP pooled [1, d], and the same of the negative prompt, if any."""

    states: Tensor
    pooled: Tensor


class FluxSampler(BaseSampler):
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
        unit = 2 * pipe.vae_scale_factor
        if self.height % unit or self.width % unit or min(self.height, self.width) < unit:
            raise ValueError(f"width and height must be multiples of {unit}, got {self.width} x {self.height}")
        kind = type(pipe.scheduler).__name__
        config = pipe.scheduler.config
        if kind != "FlowMatchEulerDiscreteScheduler" or config.get("stochastic_sampling"):
            raise Declined(f"FLUX needs a FlowMatchEulerDiscreteScheduler without stochastic sampling, got {kind}")
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.true_cfg_scale = true_cfg_scale
        self.max_sequence_length = max_sequence_length
        self._timesteps, self._sigmas = self._schedule()
        self._image_ids: Tensor | None = None
        self._negative: FluxText | None = None

    @property
    def passes(self) -> int:
        """Transformer passes per call: 2 with classifier-free guidance."""
        return 2 if self.negative_prompt is not None and self.true_cfg_scale > 1 else 1

    @property
    def sigmas(self) -> list[float]:
        """Noise level of each call [num_steps]."""
        return [float(sigma) for sigma in self._sigmas[:-1]]

    def _schedule(self) -> tuple[Tensor, Tensor]:
        """Timesteps [num_steps] and sigmas [num_steps + 1], from a copy of the scheduler."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

        scheduler = copy.deepcopy(self.pipe.scheduler)
        config = scheduler.config
        length = (self.height // (2 * self.pipe.vae_scale_factor)) * (self.width // (2 * self.pipe.vae_scale_factor))
        mu = calculate_shift(
            length,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / self.num_steps, self.num_steps)
        timesteps, count = retrieve_timesteps(scheduler, self.num_steps, self.device, sigmas=sigmas, mu=mu)
        if count != self.num_steps:
            raise ValueError(f"the scheduler makes {count} calls for {self.num_steps} steps; use its Euler variant")
        return timesteps, scheduler.sigmas.to(self.device)

    def noise(self, seed: int) -> Tensor:
        """Packed noise [1, tokens, channels] of a seed, as a CPU generator with that seed gives it."""
        latents, self._image_ids = self.pipe.prepare_latents(
            1,
            self.pipe.transformer.config.in_channels // 4,
            self.height,
            self.width,
            (self.pipe.text_encoder_2 or self.pipe.transformer).dtype,  # that of the T5 states, as in the pipeline
            self.device,
            torch.Generator("cpu").manual_seed(seed),
            None,
        )
        return latents  # type: ignore[no-any-return]

    def encode(self, prompt: str) -> tuple[FluxText, FluxText | None]:
        """The prompt and, with guidance, the negative prompt (one for all prompts)."""
        if self.passes == 2 and self._negative is None:
            assert self.negative_prompt is not None
            self._negative = self._text(self.negative_prompt)
        return self._text(prompt), self._negative

    def forget_prompts(self) -> None:
        """Drop the cached prompt encodings."""
        super().forget_prompts()
        self._negative = None

    def _text(self, prompt: str) -> FluxText:
        warn_if_cut(self.pipe.tokenizer_2, prompt, self.max_sequence_length, "T5")
        states, pooled, _ = self.pipe.encode_prompt(
            prompt=[prompt], prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return FluxText(states, pooled)

    def call(self, latents: Tensor, encoded: list[Any], index: int) -> tuple[Tensor, Tensor]:
        """One call and one Euler step: x0 = x - sigma v, next = x + (sigma' - sigma) v, in fp32."""
        velocity = self._velocity(latents, [text[0] for text in encoded], index)
        if self.passes == 2:
            negative = self._velocity(latents, [text[1] for text in encoded], index)
            velocity = negative + self.true_cfg_scale * (velocity - negative)
        sample = latents.float()
        sigma, following = self._sigmas[index], self._sigmas[index + 1]
        following_sample = sample + (following - sigma) * velocity
        return following_sample.to(velocity.dtype).to(latents.dtype), sample - sigma * velocity

    def _velocity(self, latents: Tensor, texts: list[FluxText], index: int) -> Tensor:
        count = len(latents)
        transformer = self.pipe.transformer
        guidance = None
        if transformer.config.guidance_embeds:
            guidance = torch.full([1], self.guidance_scale, device=latents.device, dtype=torch.float32).expand(count)
        states = torch.cat([text.states for text in texts])
        velocity: Tensor = transformer(
            hidden_states=latents,
            timestep=self._timesteps[index].expand(count).to(latents.dtype) / 1000,
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
        pipe = self.pipe
        latents = pipe._unpack_latents(x0.to(pipe.vae.dtype), self.height, self.width, pipe.vae_scale_factor)
        latents = latents / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0.0)
        image = pipe.vae.decode(latents, return_dict=False)[0]
        return pipe.image_processor.postprocess(image, output_type="pt").float()  # type: ignore[no-any-return]
