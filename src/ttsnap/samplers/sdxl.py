"""SDXL: drives a stock `StableDiffusionXLPipeline`, one denoiser call at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ttsnap.samplers.unet import UNetSampler, UNetText, latent_statistics

Size = tuple[int, int]


class SDXLSampler(UNetSampler):
    """Exactly as `StableDiffusionXLPipeline` does it, for any mix of candidates.

    Args:
        pipe: the pipeline.
        guidance_scale: strength of classifier-free guidance.
        original_size: (height, width) the model is told the training image had (default: that of the image).
        crops_coords_top_left: (top, left) it is told the image was cropped at.
        target_size: (height, width) it is told the image has (default: that of the image).
        negative_original_size: the same for the negative half, which takes effect together with
        negative_target_size: this, and
        negative_crops_coords_top_left: this.
        **options: see `UNetSampler`.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        guidance_scale: float = 5.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        **options: Any,
    ) -> None:
        super().__init__(pipe, guidance_scale=guidance_scale, **options)
        if (negative_original_size is None) != (negative_target_size is None):
            raise ValueError("negative_original_size and negative_target_size take effect together: give both")
        self._told = {
            "original_size": original_size,
            "crops_coords_top_left": crops_coords_top_left,
            "target_size": target_size,
            "negative_original_size": negative_original_size,
            "negative_crops_coords_top_left": negative_crops_coords_top_left,
            "negative_target_size": negative_target_size,
        }
        for name, value in self._told.items():
            if value is not None and len(value) != 2:
                raise ValueError(f"{name} is (height, width) or (top, left), got {value}")

    def call_options(self) -> dict[str, Any]:
        """Arguments of the stock pipeline for the same images."""
        told = {name: tuple(value) for name, value in self._told.items() if value not in (None, (0, 0))}
        return super().call_options() | told

    def encode_text(self, prompt: str) -> UNetText:
        """States of both CLIP text encoders side by side, and the pooled output of the second."""
        states, _, pooled, _ = self.pipe.encode_prompt(
            prompt=prompt, device=self.device, do_classifier_free_guidance=False
        )
        return UNetText(states, pooled)

    def encode_none(self) -> UNetText:
        """Zeros, where the pipeline's config wants them for no negative prompt."""
        empty = self.encode_text("")
        if not self.pipe.config.force_zeros_for_empty_prompt:
            return empty
        assert empty.pooled is not None
        return UNetText(torch.zeros_like(empty.states), torch.zeros_like(empty.pooled))

    def conditions(self, texts: list[UNetText]) -> dict[str, Tensor]:
        """Pooled texts and sizes (micro-conditioning) for the rows of a batch, those of the negative half first."""
        pooled = torch.cat([text.pooled for text in texts if text.pooled is not None])
        told, size = self._told, (self.height, self.width)
        sizes = [told["original_size"] or size, told["crops_coords_top_left"], told["target_size"] or size]
        negative = [told[f"negative_{name}"] for name in ("original_size", "crops_coords_top_left", "target_size")]
        ids = self._size_ids(sizes, pooled).expand(len(texts) // self.passes, -1)
        if self.passes == 2:
            ids = torch.cat([self._size_ids(negative, pooled).expand_as(ids) if negative[0] else ids, ids])
        return {"text_embeds": pooled, "time_ids": ids}

    def _size_ids(self, sizes: list[Any], pooled: Tensor) -> Tensor:
        """Sizes as the UNet reads them [1, 6]."""
        width = self.pipe.text_encoder_2.config.projection_dim if self.pipe.text_encoder_2 else pooled.shape[-1]
        ids: Tensor = self.pipe._get_add_time_ids(
            *(tuple(size) for size in sizes), dtype=pooled.dtype, text_encoder_projection_dim=width
        )
        return ids.to(pooled.device)

    def decode_batch(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 of clean latents [n, channels, h, w]."""
        pipe = self.pipe
        vae = pipe.vae
        with _wide_enough(vae):
            latents = x0.to(vae.dtype)
            statistics = latent_statistics(vae.config, latents)
            if statistics:
                latents = latents * statistics[1] / vae.config.scaling_factor + statistics[0]
            else:
                latents = latents / vae.config.scaling_factor
            image = vae.decode(latents, return_dict=False)[0]
        if pipe.watermark is not None:
            image = pipe.watermark.apply_watermark(image)
        return pipe.image_processor.postprocess(image, output_type="pt").float()  # type: ignore[no-any-return]

    def encode_spatial(self, images: Tensor) -> Tensor:
        """Latents of images; in fp32 where the VAE needs it."""
        with _wide_enough(self.pipe.vae):
            return super().encode_spatial(images)


@contextmanager
def _wide_enough(vae: Any) -> Iterator[None]:
    """A VAE that overflows in fp16 (its config says so) in fp32 for as long as it is needed.

    One without data, on which operations are counted, cannot be converted and need not be.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    without_data = isinstance(next(vae.parameters()), FakeTensor)
    narrow = vae.dtype == torch.float16 and vae.config.force_upcast and not without_data
    if narrow:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if narrow:
            vae.to(torch.float16)
