"""PixArt-Sigma: drives a stock `PixArtSigmaPipeline`, one denoiser call at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttsnap.samplers.base import check_size, warn_if_cut
from ttsnap.samplers.solver import SolverSampler


class MaskedText(NamedTuple):
    """Encoded prompt: states [1, t, d], and which of them are text [1, t]."""

    states: Tensor
    mask: Tensor


class PixArtSampler(SolverSampler):
    """Drives `PixArtSigmaPipeline` for any mix of candidates.

    All prompts are padded to `max_sequence_length` and masked by the pipeline, so that candidates of different prompts
    fit into one batch as they are. Two habits of the pipeline are off, and `reproduce` says so: resolution binning,
    which makes the nearest size the model was trained on and resizes, and cleaning captions, which depends on what is
    installed.

    Args:
        pipe: a `PixArtSigmaPipeline`.
        num_steps: denoiser calls of a finished image.
        height: image height in pixels (default: the model's).
        width: image width in pixels.
        guidance_scale: classifier-free guidance; above 1 each call costs two passes, in one batch.
        negative_prompt: what guidance leads away from.
        max_sequence_length: text tokens.
        scheduler: `euler`, `euler-karras`, `ddim`, `dpm` or `dpm-karras` in place of the pipeline's own.
        max_batch: most candidates in one call.
    """

    least_unit = 8

    def __init__(
        self,
        pipe: Any,
        *,
        num_steps: int = 20,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 4.5,
        negative_prompt: str = "",
        max_sequence_length: int = 300,
        scheduler: str | None = None,
        max_batch: int | None = None,
    ) -> None:
        default = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        super().__init__(
            pipe, num_steps=num_steps, height=height or default, width=width or default, max_batch=max_batch
        )
        patch = pipe.transformer.config.patch_size
        check_size(self.height, self.width, max(self.least_unit, patch * pipe.vae_scale_factor))
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.max_sequence_length = max_sequence_length
        self.choose_solver(scheduler)

    def call_options(self) -> dict[str, Any]:
        """Arguments of the stock pipeline for the same images."""
        options: dict[str, Any] = {
            "guidance_scale": self.guidance_scale,
            "max_sequence_length": self.max_sequence_length,
        }
        options |= {"use_resolution_binning": False, "clean_caption": False}
        if self.passes == 2 and self.negative_prompt:
            options["negative_prompt"] = self.negative_prompt
        return super().call_options() | options

    def noise_dtype(self) -> torch.dtype:
        """In which dtype the pipeline draws noise and keeps latents: that of the text states."""
        return self.dtype_of(self.pipe.text_encoder or self.pipe.transformer)

    def noise(self, seed: int) -> Tensor:
        """Latents [1, channels, h, w] of a seed, as a CPU generator with that seed gives them."""
        return self.draw(seed, self.pipe.transformer.config.in_channels, self.noise_dtype())

    def encode(self, prompt: str) -> tuple[MaskedText, MaskedText | None]:
        """The prompt and, with guidance, the negative prompt (one for all prompts)."""
        negative = self.kept(("negative",), self.encode_negative) if self.passes == 2 else None
        return self.encode_text(prompt), negative

    def encode_text(self, prompt: str) -> MaskedText:
        """One text, as the pipeline encodes it."""
        warn_if_cut(self.pipe.tokenizer, prompt, self.max_sequence_length, type(self.pipe.text_encoder).__name__)
        states, mask, _, _ = self.pipe.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            device=self.device,
            clean_caption=False,
            max_sequence_length=self.max_sequence_length,
        )
        return MaskedText(states, mask)

    def encode_negative(self) -> MaskedText:
        """What guidance leads away from."""
        return self.encode_text(self.negative_prompt)

    def call_after(
        self, latents: Tensor, encoded: list[Any], index: int, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One call, both halves of guidance in one batch, and one step."""
        texts = [text[0] for text in encoded]
        if self.passes == 2:
            texts = [text[1] for text in encoded] + texts
        prediction = self.predict(
            self.steps.scale(torch.cat([latents] * self.passes), index),
            torch.cat([text.states for text in texts]),
            torch.cat([text.mask for text in texts]),
            self.steps.timesteps[index].expand(len(texts)),
        )
        if self.passes == 2:
            negative, positive = prediction.chunk(2)
            prediction = negative + self.guidance_scale * (positive - negative)
        if self.pipe.transformer.config.out_channels // 2 == latents.shape[1]:
            prediction = prediction.chunk(2, dim=1)[0]  # the other half is a variance
        return self.steps(prediction, latents, index, previous)

    def predict(self, latents: Tensor, states: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        """One pass of the transformer."""
        answer: Tensor = self.pipe.transformer(
            latents,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=time,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return answer

    def decode_batch(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 of clean latents [n, channels, h, w]."""
        vae = self.pipe.vae
        image = vae.decode(x0.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return self.pipe.image_processor.postprocess(image, output_type="pt").float()  # type: ignore[no-any-return]
