"""Flow matching: what the families share whose scheduler is a `FlowMatchEulerDiscreteScheduler`.

A denoiser predicts the velocity v = noise - x0 along x = (1 - sigma) x0 + sigma noise. One Euler step is then a pure
function of (x, v, sigma, sigma'), and the clean latent comes with it for free.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ttsnap.samplers.base import BaseSampler, Declined
from ttsnap.samplers.steps import Steps


class Schedule(NamedTuple):
    """Timesteps [num_steps] as the denoiser reads them, and sigmas [num_steps + 1], the last of which is 0."""

    timesteps: Tensor
    sigmas: Tensor


def schedule(
    scheduler: Any, num_steps: int, device: Any, *, sigmas: Sequence[float] | None = None, mu: float | None = None
) -> Schedule:
    """What `scheduler` would run, from a copy of it.

    Args:
        scheduler: a `FlowMatchEulerDiscreteScheduler`.
        num_steps: denoiser calls.
        device: where the numbers are kept.
        sigmas: before the shift [num_steps]; None: the scheduler's own.
        mu: of the dynamic shift, which depends on the size of the image; see `resolution_shift`.

    Raises:
        Declined: the scheduler is another one, is stochastic or inverted, or makes another number of calls.
    """
    kind = type(scheduler).__name__
    config = scheduler.config
    if kind != "FlowMatchEulerDiscreteScheduler" or config.get("stochastic_sampling") or config.get("invert_sigmas"):
        kind = kind if kind != "FlowMatchEulerDiscreteScheduler" else f"a stochastic or inverted {kind}"
        raise Declined(f"the model needs a FlowMatchEulerDiscreteScheduler without stochastic sampling, got {kind}")
    own = copy.deepcopy(scheduler)
    if sigmas is None:
        own.set_timesteps(num_steps, device=device, mu=mu)
    else:
        own.set_timesteps(sigmas=sigmas, device=device, mu=mu)
    if len(own.timesteps) != num_steps:
        raise Declined(f"the scheduler makes {len(own.timesteps)} calls for {num_steps} steps; use its Euler variant")
    return Schedule(own.timesteps, own.sigmas.to(device))


def even_sigmas(num_steps: int) -> list[float]:
    """Noise levels 1, 1 - 1/n, ..., 1/n [num_steps], before the shift."""
    return [float(sigma) for sigma in np.linspace(1.0, 1 / num_steps, num_steps)]


def resolution_shift(scheduler: Any, image_tokens: int) -> float:
    """The shift mu of an image of so many tokens: a line through the two sizes that the scheduler's config names."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    shift: float = calculate_shift(
        image_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    return shift


def euler(latents: Tensor, velocity: Tensor, sigma: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """One Euler step as the scheduler makes it: x' = x + (sigma' - sigma) v and x0 = x - sigma v, in fp32.

    Args:
        latents: x [n, ...].
        velocity: v [n, ...].
        sigma: noise level of the call [].
        following: that of the next call, 0 after the last [].

    Returns:
        x' rounded through the velocity's dtype to that of `latents`, as the pipelines do, and x0 in fp32.
    """
    sample = latents.float()
    after = sample + (following - sigma) * velocity
    return after.to(velocity.dtype).to(latents.dtype), sample - sigma * velocity


class FlowSteps(Steps):
    """Euler steps with the scheduler's own noise levels, for a family that takes other schedulers as well."""

    def __init__(self, scheduler: Any, num_steps: int, device: Any) -> None:
        self._schedule = schedule(scheduler, num_steps, device)
        self.timesteps = self._schedule.timesteps
        self.noise_scale = 1.0
        self.sigmas = [float(sigma) for sigma in self._schedule.sigmas[:-1]]

    def step(self, prediction: Tensor, latents: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One Euler step."""
        sigmas = self._schedule.sigmas
        return euler(latents, prediction, sigmas[index], sigmas[index + 1])


class FlowSampler(BaseSampler):
    """Euler flow matching. A family sets `schedule` and adds `velocity`, beside noise, text and decoding."""

    schedule: Schedule

    @property
    def sigmas(self) -> list[float]:
        """Noise level of each call [num_steps]."""
        return [float(sigma) for sigma in self.schedule.sigmas[:-1]]

    @abstractmethod
    def velocity(self, latents: Tensor, encoded: list[Any], index: int) -> Tensor:
        """The denoiser's velocity of call `index` (0-based), guidance included."""

    def call(self, latents: Tensor, encoded: list[Any], index: int) -> tuple[Tensor, Tensor]:
        """One denoiser call and one Euler step: the next latents and the x0 estimates (fp32)."""
        sigmas = self.schedule.sigmas
        return euler(latents, self.velocity(latents, encoded, index), sigmas[index], sigmas[index + 1])
