"""What Stable Diffusion and SDXL share: a UNet, classifier-free guidance in one batch, and an Euler or DDIM step."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttsnap.samplers.base import Declined, check_size, warn_if_cut
from ttsnap.samplers.solver import SolverSampler


class UNetText(NamedTuple):
    """Encoded prompt: states [1, t, d], and for SDXL also pooled [1, d]."""

    states: Tensor
    pooled: Tensor | None = None


class UNetSampler(SolverSampler):
    """Drives a stock pipeline around a `UNet2DConditionModel`.

    Args:
        pipe: the pipeline.
        num_steps: denoiser calls of a finished image.
        height: image height in pixels (default: the model's).
        width: image width in pixels.
        guidance_scale: strength of classifier-free guidance; above 1 each call costs two passes.
        negative_prompt: what guidance leads away from (default: what the pipeline takes for none).
        guidance_rescale: share by which the guided prediction is brought to the spread of the unguided one.
        scheduler: `euler`, `euler-karras`, `ddim`, `dpm` or `dpm-karras` in place of the pipeline's own.
        max_batch: most candidates in one call.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        num_steps: int = 20,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        guidance_rescale: float = 0.0,
        scheduler: str | None = None,
        max_batch: int | None = None,
    ) -> None:
        config = pipe.unet.config
        side = config.sample_size or 64  # that of Stable Diffusion 1
        sizes = side if isinstance(side, list | tuple) else (side, side)
        default = [size * pipe.vae_scale_factor for size in sizes]
        super().__init__(
            pipe, num_steps=num_steps, height=height or default[0], width=width or default[1], max_batch=max_batch
        )
        check_size(self.height, self.width, max(8, pipe.vae_scale_factor))
        if config.time_cond_proj_dim is not None:
            raise Declined("the UNet reads its guidance scale (a latent consistency model)")
        if config.encoder_hid_dim_type == "ip_image_proj":
            raise Declined("the UNet reads an image prompt (IP-Adapter)")
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.guidance_rescale = guidance_rescale
        self.choose_solver(scheduler)

    def call_options(self) -> dict[str, Any]:
        """Arguments of the stock pipeline for the same images."""
        options = super().call_options() | {"guidance_scale": self.guidance_scale}
        if self.passes == 2 and self.negative_prompt is not None:
            options["negative_prompt"] = self.negative_prompt
        if self.passes == 2 and self.guidance_rescale:
            options["guidance_rescale"] = self.guidance_rescale
        return options

    # What a family adds.

    @abstractmethod
    def encode_text(self, prompt: str) -> UNetText:
        """One text, as the pipeline encodes it."""

    def encode_none(self) -> UNetText:
        """What guidance leads away from where no negative prompt is given."""
        return self.encode_text("")

    def conditions(self, texts: list[UNetText]) -> dict[str, Tensor] | None:
        """What else the UNet reads, for the rows of a batch: the texts of negative prompts come first."""
        return None

    # What they share.

    def noise(self, seed: int) -> Tensor:
        """Latents [1, channels, h, w] of a seed, as a CPU generator with that seed gives them."""
        return self.draw(seed, self.pipe.unet.config.in_channels, self.dtype_of(self.pipe.unet))

    def encode(self, prompt: str) -> tuple[UNetText, UNetText | None]:
        """The prompt and, with guidance, the negative prompt (one for all prompts)."""
        negative = None
        if self.passes == 2:
            given = self.negative_prompt
            negative = self.kept(
                ("negative",), lambda: self.encode_none() if given is None else self._encode_checked(given)
            )
        return self._encode_checked(prompt), negative

    def _encode_checked(self, prompt: str) -> UNetText:
        tokenizer = self.pipe.tokenizer or self.pipe.tokenizer_2
        warn_if_cut(tokenizer, prompt, tokenizer.model_max_length, "CLIP")
        return self.encode_text(prompt)

    def call_after(
        self, latents: Tensor, encoded: list[Any], index: int, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One call, both halves of guidance in one batch, and one step."""
        texts = [text[0] for text in encoded]
        if self.passes == 2:
            texts = [text[1] for text in encoded] + texts
        prediction: Tensor = self.pipe.unet(
            self.steps.scale(torch.cat([latents] * self.passes), index),
            self.steps.timesteps[index],
            encoder_hidden_states=torch.cat([text.states for text in texts]),
            added_cond_kwargs=self.conditions(texts),
            return_dict=False,
        )[0]
        if self.passes == 2:
            prediction = self._guide(*prediction.chunk(2))
        return self.steps(prediction, latents, index, previous)

    def _guide(self, negative: Tensor, positive: Tensor) -> Tensor:
        """Classifier-free guidance, away from the negative prediction."""
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

        guided = negative + self.guidance_scale * (positive - negative)
        if self.guidance_rescale > 0:
            guided = rescale_noise_cfg(guided, positive, guidance_rescale=self.guidance_rescale)
        return guided


def latent_statistics(config: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and spread [1, channels, 1, 1] of latents where a VAE's config has them."""
    mean, spread = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or spread is None:
        return None
    return torch.tensor(mean).view(1, -1, 1, 1).to(like), torch.tensor(spread).view(1, -1, 1, 1).to(like)
