"""What the families share that run with the solvers of `ttsnap.samplers.steps`: Stable Diffusion, PixArt, Sana."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttsnap.samplers.base import BaseSampler
from ttsnap.samplers.steps import Steps, choose, steps_of


class SolverSampler(BaseSampler):
    """Any of the solvers, with both halves of classifier-free guidance in one batch.

    A family sets `guidance_scale` and calls `choose_solver` in its constructor, and adds `call_after`.
    """

    guidance_scale: float
    steps: Steps

    def choose_solver(self, scheduler: str | None) -> None:
        """Take the pipeline's scheduler, or the one of a short name (see `ttsnap.samplers.steps.choose`).

        Raises:
            Declined: its step is no pure function.
        """
        own, self._made = choose(scheduler, self.pipe.scheduler) if scheduler else (self.pipe.scheduler, "")
        self.steps = self.make_steps(own)

    def make_steps(self, scheduler: Any) -> Steps:
        """The steps of a scheduler."""
        return steps_of(scheduler, self.num_steps, self.device)

    @property
    def passes(self) -> int:
        """Passes of the denoiser per call: 2 with guidance."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def sigmas(self) -> list[float]:
        """Noise level of each call [num_steps]: of noise prediction sqrt((1 - abar) / abar), from about 14 down."""
        return self.steps.sigmas

    @property
    def timesteps(self) -> list[float]:
        """Model time of each call [num_steps], 0..1000."""
        return [float(timestep) for timestep in self.steps.timesteps]

    def reproduce(self, prompt: str, seed: int) -> str:
        """Python with which the stock pipeline `pipe` makes the image; a line for the scheduler if it was chosen."""
        scheduler = f"pipe.scheduler = {self._made}\n" if self._made else ""
        return scheduler + super().reproduce(prompt, seed)

    def draw(self, seed: int, channels: int, dtype: torch.dtype) -> Tensor:
        """Starting latents [1, channels, h, w] of a seed, as a CPU generator with that seed gives them."""
        from diffusers.utils.torch_utils import randn_tensor

        side = self.pipe.vae_scale_factor
        shape = (1, channels, self.height // side, self.width // side)
        generator = torch.Generator("cpu").manual_seed(seed)
        noise: Tensor = randn_tensor(shape, generator=generator, device=self.device, dtype=dtype)
        return torch.mul(noise, self.steps.noise_scale)

    def call(self, latents: Tensor, encoded: list[Any], index: int) -> tuple[Tensor, Tensor]:
        """The first call, or any with a solver that remembers nothing."""
        return self.call_after(latents, encoded, index, None)
