"""Rungs: the steps at which a policy looks, as numbers of calls or as shares of a candidate's way."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def check_rungs(rungs: Sequence[float], num_steps: int | None = None) -> None:
    """Rungs must ascend, and be whole and at least 1, or all shares below 1; ValueError otherwise.

    Args:
        rungs: denoiser calls made, or shares of the steps.
        num_steps: calls of a finished image; calls must lie below it.
    """
    shares = bool(rungs) and all(0 < rung < 1 for rung in rungs)
    if not shares and any(step != int(step) or step < 1 for step in rungs):
        raise ValueError(
            f"rungs must be whole numbers of at least 1, or all shares between 0 and 1, got {tuple(rungs)}"
        )
    if any(later <= earlier for earlier, later in itertools.pairwise(rungs)):
        raise ValueError(f"rungs must ascend, got {tuple(rungs)}")
    if num_steps is not None and rungs and rungs[-1] >= num_steps:
        raise ValueError(f"rungs must lie below the {num_steps} steps of a finished image, got {tuple(rungs)}")


def steps_of(rungs: Sequence[float], num_steps: int) -> list[tuple[int, int]]:
    """Index and step of each rung. Of several shares that fall on one step the last counts; none is the last step.

    Raises:
        ValueError: a rung that is no share is not below `num_steps`.
    """
    check_rungs(rungs, num_steps)
    if not rungs or rungs[0] >= 1:
        return [(index, int(rung)) for index, rung in enumerate(rungs)]
    steps = {max(1, round(share * num_steps)): index for index, share in enumerate(rungs)}
    return [(index, step) for step, index in steps.items() if step < num_steps]


def step_of(rung: float, num_steps: int) -> int:
    """The step of one rung, which may be a share; below `num_steps`, at least 1."""
    found = steps_of((rung,), num_steps)
    return found[0][1] if found else max(1, num_steps - 1)
