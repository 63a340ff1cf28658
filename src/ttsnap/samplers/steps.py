"""Deterministic steps of models that predict noise or v (Stable Diffusion, SDXL): Euler, DDIM and DPM++ 2M.

Each is a pure function of the latents, the prediction and the number of the call, so that candidates at different steps
share one schedule. The numbers come from the stock scheduler; the arithmetic is its own, to the last bit. DPM++ 2M
remembers the call before, by its x0 estimate alone; a candidate carries that with it, and hands it over.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ttsnap.samplers.base import Declined

LEAST_ALPHA = 2.0**-24  # abar of pure noise, as EulerDiscreteScheduler has it, where the schedule says 0


class Steps(ABC):
    """What one call does to the latents, given what the denoiser predicted.

    Args:
        scheduler: a stock scheduler whose timesteps are set.

    Attributes:
        timesteps: model time of each call [num_steps], as the denoiser takes it.
        sigmas: noise-to-signal ratio sqrt((1 - abar) / abar) of each call [num_steps].
        noise_scale: standard deviation of the starting latents.
    """

    timesteps: Tensor
    sigmas: list[float]
    noise_scale: Any

    def __init__(self, scheduler: Any) -> None:
        self.timesteps = scheduler.timesteps
        self.noise_scale = scheduler.init_noise_sigma
        self._kind = scheduler.config.prediction_type

    def scale(self, latents: Tensor, index: int) -> Tensor:
        """The latents as the denoiser wants to see them."""
        return latents

    @abstractmethod
    def step(self, prediction: Tensor, latents: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The next latents, in the prediction's dtype, and the x0 estimate (fp32) of call `index` (0-based)."""

    def step_after(
        self, prediction: Tensor, latents: Tensor, index: int, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`step`, with the x0 estimates of the call before (None at the first) for solvers that remember it."""
        return self.step(prediction, latents, index)

    def __call__(
        self, prediction: Tensor, latents: Tensor, index: int, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`step_after`, and after the last call the finished latents as x0.

        Some schedules end at a little noise (DDIM without `set_alpha_to_one`, Euler with `final_sigmas_type`
        sigma_min); the finished image is then not the last prediction of x0.
        """
        following, x0 = self.step_after(prediction, latents, index, previous)
        return following, following.float() if index == len(self.sigmas) - 1 else x0.float()


class EulerSteps(Steps):
    """Euler in the space x = x0 + sigma noise: x' = x + (sigma' - sigma) (x - x0) / sigma, in fp32."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self._sigmas: Tensor = scheduler.sigmas
        self.sigmas = [float(sigma) for sigma in self._sigmas[: len(self.timesteps)]]

    def scale(self, latents: Tensor, index: int) -> Tensor:
        """x / sqrt(sigma^2 + 1)."""
        return latents / ((self._sigmas[index] ** 2 + 1) ** 0.5)

    def step(self, prediction: Tensor, latents: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One Euler step."""
        x, sigma, following = latents.float(), self._sigmas[index], self._sigmas[index + 1]
        if self._kind == "epsilon":
            x0 = x - sigma * prediction
        elif self._kind == "v_prediction":
            x0 = prediction * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)
        else:
            x0 = prediction
        derivative = (x - x0) / sigma
        return (x + derivative * (following - sigma)).to(prediction.dtype), x0


class DdimSteps(Steps):
    """DDIM with eta 0 in the space x = sqrt(abar) x0 + sqrt(1 - abar) noise, in the dtype of the latents."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        config, alphas = scheduler.config, scheduler.alphas_cumprod
        before = scheduler.timesteps.cpu() - config.num_train_timesteps // scheduler.num_inference_steps
        self._alphas: Tensor = alphas[scheduler.timesteps.cpu()]
        self._following = torch.where(before >= 0, alphas[before.clamp(min=0)], scheduler.final_alpha_cumprod)
        self._clip = config.clip_sample_range if config.clip_sample else None
        signal = self._alphas.clamp(min=LEAST_ALPHA)
        self.sigmas = [float(sigma) for sigma in ((1 - signal) / signal) ** 0.5]

    def step(self, prediction: Tensor, latents: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """x' = sqrt(abar') x0 + sqrt(1 - abar') noise."""
        alpha, following = self._alphas[index], self._following[index]
        signal, spread = alpha**0.5, (1 - alpha) ** 0.5
        if self._kind == "epsilon":
            x0, noise = (latents - spread * prediction) / signal, prediction
        elif self._kind == "v_prediction":
            x0, noise = signal * latents - spread * prediction, signal * prediction + spread * latents
        else:
            x0, noise = prediction, (latents - signal * prediction) / spread
        if self._clip is not None:
            x0 = x0.clamp(-self._clip, self._clip)
        return following**0.5 * x0 + (1 - following) ** 0.5 * noise, x0


class DpmSteps(Steps):
    """DPM-Solver++ of order 1 or 2 (`dpmsolver++`): the stock scheduler, put at a call with what it remembers."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        config = scheduler.config
        if config.algorithm_type != "dpmsolver++" or config.solver_order > 2:
            raise Declined(
                "DPMSolverMultistepScheduler runs as dpmsolver++ of order 1 or 2, "
                f"not as {config.algorithm_type} of order {config.solver_order}"
            )
        self._scheduler = scheduler
        self.sigmas = [float(sigma) for sigma in scheduler.sigmas[:-1]]

    def step(self, prediction: Tensor, latents: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The first step, which is of first order."""
        return self.step_after(prediction, latents, index, None)

    def step_after(
        self, prediction: Tensor, latents: Tensor, index: int, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One step, of second order where the schedule wants it."""
        if index and previous is None:
            raise ValueError("DPM++ 2M needs the x0 estimates of the call before; choose the scheduler euler or ddim")
        solver = copy.copy(self._scheduler)
        order = solver.config.solver_order
        solver.set_begin_index(index)
        solver.lower_order_nums = min(index, order)
        solver.model_outputs = [None] * order
        if previous is not None:
            solver.model_outputs[-1] = previous.to(prediction.dtype)
        following = solver.step(prediction, self.timesteps[index], latents, return_dict=False)[0]
        return following, solver.model_outputs[-1]


KINDS: dict[str, type[Steps]] = {
    "EulerDiscreteScheduler": EulerSteps,
    "DDIMScheduler": DdimSteps,
    "DPMSolverMultistepScheduler": DpmSteps,
}
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "ddim": ("DDIMScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
    "dpm-karras": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
}


def steps_of(scheduler: Any, num_steps: int, device: Any) -> Steps:
    """The steps that a stock scheduler would make; the scheduler itself is left alone.

    Args:
        scheduler: an `EulerDiscreteScheduler` with any choice of sigmas, a `DDIMScheduler` (used with eta 0), or a
            `DPMSolverMultistepScheduler`.
        num_steps: denoiser calls.
        device: where the timesteps are kept.

    Raises:
        Declined: another scheduler, or one whose schedule is not one call per step.
    """
    name = type(scheduler).__name__
    if name not in KINDS:
        raise Declined(
            f"{name} is not a pure function of the latents, as {', '.join(KINDS)} are; "
            f"choose the scheduler {', '.join(CHOICES)} to run candidates together in full batches"
        )
    own = copy.deepcopy(scheduler)
    own.set_timesteps(num_steps, device=device)
    if len(own.timesteps) != num_steps:
        raise Declined(f"{name} makes {len(own.timesteps)} calls for {num_steps} steps")
    if own.config.prediction_type == "flow_prediction" and KINDS[name] is not DpmSteps:
        raise Declined(f"{name} is not for models that predict a flow")
    if own.config.get("thresholding"):
        raise Declined(f"{name} with thresholding is not supported")
    if num_steps > 1 and own.timesteps[0] == own.timesteps[1]:
        raise Declined(f"{name} begins with the same timestep twice")
    return KINDS[name](own)


def choose(name: str, scheduler: Any) -> tuple[Any, str]:
    """A scheduler by name with the configuration of another, and the Python expression that makes it.

    Raises:
        ValueError: no such name.
    """
    import diffusers

    if name not in CHOICES:
        raise ValueError(f"unknown scheduler {name!r}; known are {', '.join(CHOICES)}")
    kind, options = CHOICES[name]
    extra = "".join(f", {key}={value!r}" for key, value in options.items())
    made = getattr(diffusers, kind).from_config(scheduler.config, **options)
    return made, f"diffusers.{kind}.from_config(pipe.scheduler.config{extra})"
