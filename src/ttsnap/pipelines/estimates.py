"""What a scheduler's step knows of the clean image: the noise level it was called at, and the x0 estimate.

A scheduler models x_t = alpha x_0 + sigma noise. The pair (alpha, sigma) of a step and the meaning of the model's
output (noise, x_0, v or the velocity of a flow) give x_0 by one formula each, whatever the solver then makes of it: for
a multistep solver this is its first-order estimate. Where a step returns its own estimate, that is taken.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple, get_args

from torch import Tensor

ESTIMATES = ("pred_original_sample", "denoised")  # what steps call it


class Level(NamedTuple):
    """A noise level: x_t = alpha x_0 + sigma noise."""

    alpha: float
    sigma: float

    @property
    def noise(self) -> float:
        """The one number that keys noise-aware weights: sigma of a flow, else noise per signal, sigma / alpha."""
        return self.sigma if math.isclose(self.alpha + self.sigma, 1.0) else self.sigma / max(self.alpha, 1e-8)


class Step(NamedTuple):
    """One step of a scheduler.

    Attributes:
        scheduler: after the step.
        model_output: what the denoiser answered, guidance included.
        timestep: model time of that call.
        sample: the noisy latents it was asked about.
        result: what the step returned.
        known: its noise level, where that is known already: to read it off the scheduler can wait for a GPU.
    """

    scheduler: Any
    model_output: Tensor
    timestep: Any
    sample: Tensor
    result: Any
    known: Level | None = None

    @property
    def following(self) -> Tensor:
        """The latents of the next call."""
        latents: Tensor = self.result[0] if isinstance(self.result, tuple) else self.result.prev_sample
        return latents

    @property
    def level(self) -> Level:
        """Noise level of `sample`.

        Raises:
            ValueError: this kind of scheduler is not known.
        """
        return self.known or level(self.scheduler, self.timestep)

    @property
    def clean(self) -> Tensor:
        """The x0 estimate, of the shape of `sample`, in fp32.

        Raises:
            ValueError: this kind of scheduler is not known.
        """
        own = given(self.scheduler, self.result)
        if own is not None:
            return own.float()
        return clean(self.scheduler, self.model_output, self.sample, self.level)


def given(scheduler: Any, result: Any) -> Tensor | None:
    """The x0 estimate that a step returned, if it did."""
    if not isinstance(result, tuple):
        found = (getattr(result, name, None) for name in ESTIMATES)
        return next((value for value in found if value is not None), None)
    names = _fields(type(scheduler))
    place = next((names.index(name) for name in ESTIMATES if name in names), len(result))
    return result[place] if place < len(result) else None


def _fields(kind: type) -> list[str]:
    """Names of what the step of a scheduler returns, in order, from its declared output class."""
    declared = inspect.signature(kind.step).return_annotation  # type: ignore[attr-defined]
    for output in get_args(declared) or (declared,):
        if hasattr(output, "__dataclass_fields__"):
            return list(output.__dataclass_fields__)
    return []


def level(scheduler: Any, timestep: Any) -> Level:
    """Noise level of the call that a scheduler has just made a step from."""
    config, index = scheduler.config, getattr(scheduler, "step_index", None)
    sigma = None
    if index is not None and getattr(scheduler, "sigmas", None) is not None:
        sigma = float(scheduler.sigmas[index - 1])
        if getattr(scheduler, "sigmas_interpol", None) is not None and scheduler.state_in_first_order:
            # KDPM2 has just made the second half of its step, from a call between two sigmas.
            sigma = float(scheduler.sigmas_interpol[index - 1 - ("Ancestral" in type(scheduler).__name__)])
    if sigma is not None and is_flow(scheduler):
        return Level(1 - sigma, sigma)
    if sigma is not None and hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma_t = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index - 1])  # type: ignore[operator]
        return Level(float(alpha), float(sigma_t))
    if hasattr(scheduler, "_alpha_cumprod"):  # the cosine schedule of Wuerstchen
        cumulative = float(scheduler._alpha_cumprod(timestep, timestep.device).flatten()[0])
        return Level(cumulative**0.5, (1 - cumulative) ** 0.5)
    if hasattr(scheduler, "init_noise_sigma") and sigma is not None and not _by_timestep(scheduler):
        return Level(1.0, sigma)  # Euler and its relatives: noise is added to the clean sample
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        number = int(timestep.flatten()[0]) if isinstance(timestep, Tensor) else int(timestep)
        cumulative = float(scheduler.alphas_cumprod[number])
        return Level(cumulative**0.5, (1 - cumulative) ** 0.5)
    if "sigma_data" in config and isinstance(timestep, Tensor):  # TrigFlow: time is an angle
        angle = float(timestep.flatten()[0])
        return Level(math.cos(angle), math.sin(angle))
    raise ValueError(_unknown(scheduler))


def is_flow(scheduler: Any) -> bool:
    """Whether noise and image are mixed as (1 - sigma) x_0 + sigma noise."""
    config, name = scheduler.config, type(scheduler).__name__
    return bool(
        "Flow" in name
        or name in ("LTXEulerAncestralRFScheduler", "HeliosScheduler", "HeliosDMDScheduler")
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    )


def _by_timestep(scheduler: Any) -> bool:
    """Whether a scheduler takes its noise levels from the table of training timesteps, not from its sigmas."""
    name = type(scheduler).__name__
    return not hasattr(scheduler, "sigmas") or name in ("TCDScheduler", "LCMScheduler")


def clean(scheduler: Any, output: Tensor, sample: Tensor, at: Level) -> Tensor:
    """x0 by the meaning of the model's output, in fp32; a learned variance behind it is left out."""
    config = scheduler.config
    if hasattr(scheduler, "precondition_outputs"):
        estimate: Tensor = scheduler.precondition_outputs(sample.float(), output.float(), at.sigma)
        return estimate
    if hasattr(scheduler, "get_scalings_for_boundary_condition"):  # consistency models
        skip, out = scheduler.get_scalings_for_boundary_condition(at.sigma)
        denoised: Tensor = float(out) * output.float() + float(skip) * sample.float()
        return denoised.clamp(-1, 1) if config.get("clip_denoised") else denoised
    if output.shape != sample.shape:
        output = output[:, : sample.shape[1]]
    output, sample = output.float(), sample.float()
    if is_flow(scheduler):
        return sample - at.sigma * output
    kind = config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        return (sample - at.sigma * output) / at.alpha
    if kind == "v_prediction":
        return at.alpha * sample - at.sigma * output if at.alpha < 1 else _clean_of_scaled(output, sample, at)
    if kind in ("sample", "original_sample"):
        return output
    raise ValueError(f"{_unknown(scheduler)} (prediction type {kind!r})")


def _clean_of_scaled(output: Tensor, sample: Tensor, at: Level) -> Tensor:
    """v-prediction where the sample is the clean one with noise added: v belongs to the sample scaled to unit size."""
    size = math.sqrt(1 + at.sigma**2)
    return sample / size**2 - at.sigma / size * output


def _unknown(scheduler: Any) -> str:
    return (
        f"cannot tell the x0 estimate of a {type(scheduler).__name__}; known are schedulers that return it, multistep "
        "solvers, flow matching, and those with a table of training timesteps"
    )
