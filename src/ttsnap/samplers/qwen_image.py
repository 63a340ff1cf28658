"""Qwen-Image: drives a stock `QwenImagePipeline`, one denoiser call at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttsnap.samplers.base import check_size
from ttsnap.samplers.flow import FlowSampler, even_sigmas, resolution_shift, schedule
from ttsnap.samplers.text import pad, warn_if_chat_cut


class QwenImageSampler(FlowSampler):
    """Euler flow matching exactly as `QwenImagePipeline` does it, for any mix of candidates.

    Prompts keep their own lengths; in a batch the shorter ones are padded with zeros that a mask hides.

    Args:
        pipe: a `QwenImagePipeline` with a `FlowMatchEulerDiscreteScheduler`.
        num_steps: denoiser calls of a finished image.
        height: image height in pixels (default: the pipeline's).
        width: image width in pixels.
        true_cfg_scale: classifier-free guidance; above 1 each call costs two passes.
        negative_prompt: what guidance leads away from. The default is a blank, as the model's authors use it; the
            pipeline has none, and then no guidance.
        guidance_scale: another name for `true_cfg_scale`.
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
        true_cfg_scale: float = 4.0,
        negative_prompt: str = " ",
        guidance_scale: float | None = None,
        max_sequence_length: int = 512,
        max_batch: int | None = None,
    ) -> None:
        default = pipe.default_sample_size * pipe.vae_scale_factor
        super().__init__(
            pipe, num_steps=num_steps, height=height or default, width=width or default, max_batch=max_batch
        )
        unit = 2 * pipe.vae_scale_factor
        check_size(self.height, self.width, unit)
        self.true_cfg_scale = true_cfg_scale if guidance_scale is None else guidance_scale
        self.negative_prompt = negative_prompt
        self.max_sequence_length = max_sequence_length
        self._rows, self._columns = self.height // unit, self.width // unit
        self.schedule = schedule(
            pipe.scheduler,
            num_steps,
            self.device,
            sigmas=even_sigmas(num_steps),
            mu=resolution_shift(pipe.scheduler, self._rows * self._columns),
        )

    @property
    def passes(self) -> int:
        """Transformer passes per call: 2 with classifier-free guidance."""
        return 2 if self.true_cfg_scale > 1 else 1

    def call_options(self) -> dict[str, Any]:
        """Arguments of the stock pipeline for the same images."""
        options: dict[str, Any] = {"max_sequence_length": self.max_sequence_length}
        if self.passes == 2:
            options |= {"negative_prompt": self.negative_prompt, "true_cfg_scale": self.true_cfg_scale}
        return super().call_options() | options

    def noise(self, seed: int) -> Tensor:
        """Packed noise [1, tokens, channels] of a seed, as a CPU generator with that seed gives it."""
        latents: Tensor = self.pipe.prepare_latents(
            1,
            self.pipe.transformer.config.in_channels // 4,
            self.height,
            self.width,
            self.dtype_of(self.pipe.text_encoder or self.pipe.transformer),  # of the text states, as in the pipeline
            self.device,
            torch.Generator("cpu").manual_seed(seed),
        )
        return latents

    def encode(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        """Text states [1, t, d] of the prompt and, with guidance, of the negative prompt (one for all)."""
        negative = None
        if self.passes == 2:
            negative = self.kept(("negative",), lambda: self._states(self.negative_prompt))
        return self._states(prompt), negative

    def _states(self, prompt: str) -> Tensor:
        pipe = self.pipe
        limit = pipe.prompt_template_encode_start_idx + min(self.max_sequence_length, pipe.tokenizer_max_length)
        warn_if_chat_cut(pipe.tokenizer, pipe.prompt_template_encode.format, prompt, limit, "Qwen2.5-VL")
        states: Tensor = pipe.encode_prompt(
            prompt=prompt, device=self.device, max_sequence_length=self.max_sequence_length
        )[0]
        return states

    def velocity(self, latents: Tensor, encoded: list[Any], index: int) -> Tensor:
        """The velocity [n, tokens, channels]; with guidance, brought back to its norm without, token by token."""
        velocity = self._velocity(latents, [text[0] for text in encoded], index)
        if self.passes == 2:
            negative = self._velocity(latents, [text[1] for text in encoded], index)
            guided = negative + self.true_cfg_scale * (velocity - negative)
            velocity = guided * (velocity.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return velocity

    def _velocity(self, latents: Tensor, texts: list[Tensor], index: int) -> Tensor:
        count = len(latents)
        states, mask = pad(texts)
        velocity: Tensor = self.pipe.transformer(
            hidden_states=latents,
            timestep=self.schedule.timesteps[index].expand(count).to(latents.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=states,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, self._rows, self._columns)]] * count,
            attention_kwargs={},
            return_dict=False,
        )[0]
        return velocity

    def spatial(self, x0: Tensor) -> Tensor:
        """Packed latents [n, tokens, 4 channels] as a picture [n, channels, h, w]."""
        pipe = self.pipe
        return pipe._unpack_latents(x0, self.height, self.width, pipe.vae_scale_factor)[:, :, 0]  # type: ignore[no-any-return]

    def decode_spatial(self, latents: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 of normalised latents [n, channels, h, w]: a video of one frame each."""
        vae = self.pipe.vae
        frames = latents.to(vae.dtype).unsqueeze(2)
        mean, spread = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(frames)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        image = vae.decode(frames / (1.0 / spread) + mean, return_dict=False)[0][:, :, 0]
        return self.pipe.image_processor.postprocess(image, output_type="pt").float()  # type: ignore[no-any-return]

    def decode_batch(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 of packed clean latents [n, tokens, channels]."""
        return self.decode_spatial(self.spatial(x0))
