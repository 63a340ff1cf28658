"""Forks: a child goes on from where its parent stands, its noise rotated towards fresh noise.

A scheduler models x_t = alpha x_0 + sigma eps. Of a parent after a step, x_t and the x0 estimate are known, so its
noise is eps = (x_t - alpha x_0) / sigma. The child's is eps' = cos(angle) eps + sin(angle) xi, xi ~ N(0, 1): of the
same size, and as far from the parent's as the angle says. All else is the parent's: x0 estimate, scheduler, step. A
child may also stand some calls before its parent, where its noise is of the size that belongs there; its scheduler then
remembers nothing.

In the stock pipeline the same is done by a callback between two steps, `Lineage`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttsnap.pipelines.estimates import Step

if TYPE_CHECKING:
    from ttsnap.pipelines.call import Call
    from ttsnap.pipelines.sampler import Sampler
    from ttsnap.pipelines.standing import Standing


@dataclass(frozen=True)
class Turn:
    """One fork on the way from a seed to a candidate.

    Attributes:
        step: denoiser calls made before it.
        angle: degrees by which the noise was rotated.
        seed: of the fresh noise, and of what the solver draws from then on.
        alpha, sigma: of the noise level there.
        back: by how many calls the child stands before its parent,
        to: and alpha and sigma there.
        band: frequencies of the noise that were rotated; None: all.
        rows: of latents whose pixels are listed, rows of the picture they make; 0: they are laid out as a picture.
    """

    step: int
    angle: float
    seed: int
    alpha: float
    sigma: float
    back: int = 0
    to: tuple[float, float] | None = None
    band: tuple[float, float] | None = None
    rows: int = 0

    @property
    def written(self) -> tuple[Any, ...]:
        """As the lines of a winner list it: what is as usual is left out."""
        first = (self.step, self.angle, self.seed, self.alpha, self.sigma)
        return first if self.band is None else (*first, 0, None, self.band, self.rows)


def turn_seed(seed: int, step: int, before: int = 0) -> int:
    """The seed of a fork after `step` calls by which a candidate of that seed begins.

    Args:
        seed: of the child's place.
        step: calls its parent has made.
        before: how often a child began in this place after as many calls.
    """
    return (seed * 6364136223846793005 + (step + 65536 * before) * 1442695040888963407 + 1) % 2**63


def rotated(latents: Tensor, clean: Tensor, turn: Turn, generator: torch.Generator) -> Tensor:
    """Latents x_t after a step, with their noise rotated.

    Args:
        latents: x_t.
        clean: the x0 estimate of the step, of the same shape.
        turn: by how much, and at which noise level.
        generator: of the fresh noise, on the CPU; it is seeded here and stands behind the noise afterwards.
    """
    generator.manual_seed(turn.seed)
    fresh = torch.randn(latents.shape, generator=generator).to(latents.device)
    if (not turn.angle and not turn.back) or turn.sigma <= 0:
        return latents
    angle = math.radians(turn.angle)
    x, clean = latents.float(), clean.to(latents.device).float()
    noise = (x - turn.alpha * clean) / turn.sigma
    change = (math.cos(angle) - 1) * noise + math.sin(angle) * fresh
    if turn.band is not None:
        change = within(change, turn.band, turn.rows)
    if turn.to is None:
        return (x + turn.sigma * change).to(latents.dtype)
    alpha, sigma = turn.to
    return (alpha * clean + sigma * (noise + change)).to(latents.dtype)


def within(noise: Tensor, band: tuple[float, float], rows: int = 0) -> Tensor:
    """The part of some noise whose frequencies lie in a band.

    Args:
        noise: [..., h, w]; with `rows` [n, rows * columns, channels].
        band: lowest frequency, and the first that is too high; 1 is the highest along a side.
        rows: of listed pixels.
    """
    last = (1, 2) if rows else (-2, -1)
    laid = noise.reshape(len(noise), rows, -1, noise.shape[-1]) if rows else noise
    height, width = (laid.shape[axis] for axis in last)
    along = torch.fft.fftfreq(height, device=noise.device)[:, None], torch.fft.fftfreq(width, device=noise.device)[None]
    frequency = 2 * torch.sqrt(along[0] ** 2 + along[1] ** 2)
    mask = (frequency >= band[0]) & (frequency < band[1])
    spectrum = torch.fft.fft2(laid, dim=last) * (mask[..., None] if rows else mask)
    part: Tensor = torch.fft.ifft2(spectrum, dim=last).real.reshape(noise.shape)
    return part


def rows_of(latents: Tensor, image: Tensor) -> int:
    """Rows of a picture whose latent pixels are listed [n, pixels, channels]; 0 where they are laid out.

    Args:
        latents: of one candidate.
        image: the picture they make [..., h, w].

    Raises:
        ValueError: they make no such picture.
    """
    if latents.ndim > 3:
        return 0
    height, width = image.shape[-2:]
    rows = round(math.sqrt(latents.shape[-2] * height / width))
    if (
        latents.ndim < 3
        or not rows
        or latents.shape[-2] % rows
        or abs(latents.shape[-2] / rows - rows * width / height) > 0.5
    ):
        raise ValueError(
            f"no band of frequencies is known of latents of shape {list(latents.shape)}; rotate all of them"
        )
    return rows


def natural(before: Sequence[float], after: Sequence[float]) -> float:
    """The angle, in degrees, by which noise turns when more is added to reach a higher noise level.

    x' = (alpha'/alpha) x + rest xi: of its noise sigma', the share cos(angle) = alpha' sigma / (alpha sigma') is old.

    Args:
        before: alpha and sigma of x.
        after: those of x'.
    """
    kept = after[0] * before[1] / (before[0] * after[1])
    return math.degrees(math.acos(min(1.0, kept)))


def estimate(candidate: Call | Standing) -> Tensor | None:
    """The x0 estimate of the last step of a candidate; None where it is not known."""
    from ttsnap.pipelines.standing import Standing

    if isinstance(candidate, Standing):
        return candidate.clean
    last, begin = candidate.progress.last, candidate.progress.begin
    if begin is not None and candidate.step == begin.step:  # it stands where another call left it
        return begin.clean
    return None if last is None else last.clean


def forked(sampler: Sampler, parent: Call | Standing, turn: Turn) -> Standing:
    """Where the child of a candidate stands, which stands after `turn.step` calls itself.

    Raises:
        ValueError: the parent's x0 estimate is not known.
    """
    from ttsnap.pipelines.call import Call

    if sampler.probe.copies:
        raise ValueError(f"{type(sampler.pipe).__name__} shows no x0 estimates, so its candidates cannot be forked")
    clean = estimate(parent)
    if isinstance(parent, Call):
        parent = parent.standing()
    if clean is None:
        raise ValueError(f"prompt {parent.prompt!r}, seed {parent.seed}: no x0 estimate is left of it to fork from")
    state = parent.scheduler or {}
    if turn.back and ({"ets", "counter"} <= set(state) or state.get("dt") is not None):
        kind = type(sampler.pipe.scheduler).__name__
        raise ValueError(
            f"{kind} cannot go back by {turn.back} calls: it counts its calls; take another scheduler, or back 0"
        )
    result = parent.result
    tuples = isinstance(result, tuple)
    key = 0 if tuples else "prev_sample" if "prev_sample" in result else next(iter(result))
    generator = torch.Generator("cpu")
    latents = rotated(result[key].to(sampler.device), clean.to(sampler.device), turn, generator)
    changed = (latents, *result[1:]) if tuples else {**result, key: latents}
    random = [torch.Generator().manual_seed(turn.seed).get_state()]
    if sampler.device.type == "cuda":
        random.append(torch.Generator(sampler.device).manual_seed(turn.seed).get_state())
    return replace(
        parent.to(sampler.device),
        step=turn.step - turn.back,
        result=changed,
        scheduler=None if turn.back else parent.scheduler,
        generator=generator.get_state(),
        random=tuple(random),
        clean=clean,
        kept={} if turn.back else parent.kept,
    )


class Lineage:
    """Makes a candidate that forks led to in the stock pipeline, as its `callback_on_step_end`.

        generator = torch.Generator("cpu").manual_seed(3)
        lineage = ttsnap.Lineage(pipe, generator, [(7, 30.0, 1005, 0.3, 0.7)])
        pipe(prompt, generator=generator, callback_on_step_end=lineage)

    Args:
        pipe: the stock pipeline; its scheduler tells of its steps until the last fork is made.
        generator: that the call draws from.
        turns: step, angle, seed, alpha and sigma of each fork.
    """

    def __init__(self, pipe: Any, generator: torch.Generator, turns: Sequence[Sequence[Any]]) -> None:
        self._generator, self._turns = generator, [Turn(*turn) for turn in turns]
        self._last: Step | None = None
        self._made = 0
        scheduler = pipe.scheduler
        self._scheduler, step = scheduler, type(scheduler).step

        @functools.wraps(step.__get__(scheduler))  # pipelines read which arguments it takes
        def watched(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            result = step(scheduler, model_output, timestep, sample, *args, **kwargs)
            self._last = Step(scheduler, model_output, timestep, sample, result)
            return result

        scheduler.step = watched

    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """After a step: the latents, rotated where a fork was made."""
        self._made += 1
        for turn in self._turns:
            if turn.step == self._made and self._last is not None:
                torch.manual_seed(turn.seed)
                kwargs["latents"] = rotated(kwargs["latents"], self._last.clean, turn, self._generator)
        if self._made >= max(turn.step for turn in self._turns):
            vars(self._scheduler).pop("step", None)
        return kwargs
