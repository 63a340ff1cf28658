"""FLUX.2 and FLUX.2 Klein: drives a stock `Flux2Pipeline` or `Flux2KleinPipeline`, one denoiser call at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttsnap.samplers.base import check_size
from ttsnap.samplers.flow import FlowSampler, even_sigmas, schedule
from ttsnap.samplers.text import warn_if_chat_cut


class Flux2Sampler(FlowSampler):
    """Euler flow matching exactly as the FLUX.2 pipelines do it, for any mix of candidates.

    All prompts are padded to `max_sequence_length` by the pipeline, so that candidates of different prompts fit into
    one batch as they are.

    Args:
        pipe: a `Flux2Pipeline` or `Flux2KleinPipeline` with a `FlowMatchEulerDiscreteScheduler`.
        num_steps: denoiser calls of a finished image.
        height: image height in pixels (default: the pipeline's).
        width: image width in pixels.
        guidance_scale: FLUX.2: read by the model. Klein: of classifier-free guidance against the empty prompt, two
            passes per call; ignored by its distilled models.
        max_sequence_length: text tokens.
        max_batch: most candidates in one call.
    """

    spatial_unit = 2  # the VAE's statistics are of 2 x 2 patches

    def __init__(
        self,
        pipe: Any,
        *,
        num_steps: int = 20,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 4.0,
        max_sequence_length: int = 512,
        max_batch: int | None = None,
    ) -> None:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        default = pipe.default_sample_size * pipe.vae_scale_factor
        super().__init__(
            pipe, num_steps=num_steps, height=height or default, width=width or default, max_batch=max_batch
        )
        unit = 2 * pipe.vae_scale_factor
        check_size(self.height, self.width, unit)
        self._klein = not hasattr(pipe, "system_message")
        self.guidance_scale = guidance_scale
        self.max_sequence_length = max_sequence_length
        self._rows, self._columns = self.height // unit, self.width // unit
        self.schedule = schedule(
            pipe.scheduler,
            num_steps,
            self.device,
            sigmas=None if pipe.scheduler.config.get("use_flow_sigmas") else even_sigmas(num_steps),
            mu=compute_empirical_mu(self._rows * self._columns, num_steps),
        )

    @property
    def passes(self) -> int:
        """Transformer passes per call: 2 with Klein's classifier-free guidance."""
        return 2 if self._klein and self.guidance_scale > 1 and not self.pipe.config.is_distilled else 1

    def call_options(self) -> dict[str, Any]:
        """Arguments of the stock pipeline for the same images."""
        options = {"guidance_scale": self.guidance_scale, "max_sequence_length": self.max_sequence_length}
        return super().call_options() | options

    def reproduce(self, prompt: str, seed: int) -> str:
        """A line of Python that makes the image; the first argument of these pipelines is an image, not the prompt."""
        return super().reproduce(prompt, seed).replace("pipe(", "pipe(prompt=", 1)

    def noise(self, seed: int) -> Tensor:
        """Packed noise [1, tokens, channels] of a seed, as a CPU generator with that seed gives it."""
        latents, _ = self.pipe.prepare_latents(
            1,
            self.pipe.transformer.config.in_channels // 4,
            self.height,
            self.width,
            self.dtype_of(self.pipe.text_encoder or self.pipe.transformer),  # of the text states, as in the pipeline
            self.device,
            torch.Generator("cpu").manual_seed(seed),
        )
        return latents  # type: ignore[no-any-return]

    def encode(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        """Text states [1, t, d] of the prompt and, with guidance, of the empty prompt (one for all)."""
        negative = self.kept(("negative",), lambda: self._states("")) if self.passes == 2 else None
        words = getattr(self.pipe.tokenizer, "tokenizer", self.pipe.tokenizer)  # that of the processor
        warn_if_chat_cut(words, self._rendered, prompt, self.max_sequence_length, type(self.pipe.text_encoder).__name__)
        return self._states(prompt), negative

    def _rendered(self, prompt: str) -> str:
        """The chat that the pipeline makes of a prompt."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        make = self.pipe.tokenizer.apply_chat_template
        if not self._klein:
            return str(make(format_input([prompt], self.pipe.system_message)[0], tokenize=False))
        chat = [{"role": "user", "content": prompt}]
        return str(make(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False))

    def _states(self, prompt: str) -> Tensor:
        states, _ = self.pipe.encode_prompt(
            prompt=prompt, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return states  # type: ignore[no-any-return]

    def velocity(self, latents: Tensor, encoded: list[Any], index: int) -> Tensor:
        """The velocity [n, tokens, channels]; with guidance, away from that of the empty prompt."""
        velocity = self._velocity(latents, torch.cat([text[0] for text in encoded]), index)
        if self.passes == 2:
            negative = self._velocity(latents, torch.cat([text[1] for text in encoded]), index)
            velocity = negative + self.guidance_scale * (velocity - negative)
        return velocity

    def _velocity(self, latents: Tensor, states: Tensor, index: int) -> Tensor:
        count = len(latents)
        transformer = self.pipe.transformer
        guidance = None if self._klein else torch.full([count], self.guidance_scale, device=latents.device)
        velocity: Tensor = transformer(
            hidden_states=latents.to(transformer.dtype),
            timestep=self.schedule.timesteps[index].expand(count).to(latents.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=states,
            txt_ids=self.pipe._prepare_text_ids(states[:1]).to(latents.device),
            img_ids=self._ids(latents),
            joint_attention_kwargs=None,
            return_dict=False,
        )[0]
        return velocity

    def _ids(self, latents: Tensor) -> Tensor:
        grid = latents.new_empty(1, 1, self._rows, self._columns)
        return self.pipe._prepare_latent_ids(grid).to(latents.device)  # type: ignore[no-any-return]

    def spatial(self, x0: Tensor) -> Tensor:
        """Packed latents [n, tokens, 4 channels] as a picture [n, channels, h, w]."""
        grid = x0.transpose(1, 2).reshape(len(x0), -1, self._rows, self._columns)
        return self.pipe._unpatchify_latents(grid)  # type: ignore[no-any-return]

    def unnormalised(self, latents: Tensor) -> Tensor:
        """Latents [n, channels, h, w] as the VAE reads them; its statistics are of 2 x 2 patches."""
        vae = self.pipe.vae
        patches = self.pipe._patchify_latents(latents)
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        spread = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        return self.pipe._unpatchify_latents(patches * spread.to(patches) + mean.to(patches))  # type: ignore[no-any-return]

    def decode_spatial(self, latents: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 of normalised latents [n, channels, h, w]."""
        image = self.pipe.vae.decode(self.unnormalised(latents.to(self.pipe.vae.dtype)), return_dict=False)[0]
        return self.pipe.image_processor.postprocess(image, output_type="pt").float()  # type: ignore[no-any-return]

    def decode_batch(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 of packed clean latents [n, tokens, channels]."""
        return self.decode_spatial(self.spatial(x0))
