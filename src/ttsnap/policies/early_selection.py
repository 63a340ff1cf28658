"""Early selection: one look, one survivor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ttsnap.core.grid import Problem, Rung, Search
from ttsnap.policies.rungs import check_rungs
from ttsnap.policies.successive_halving import SuccessiveHalving


@dataclass(frozen=True)
class EarlySelection:
    """Look at all candidates once, at `step` (denoiser calls, or a share of the steps), and finish only the best.

    It is successive halving with one rung of size one.
    """

    step: float = 0.4

    RANGES: ClassVar = {"step": (0.05, 0.8)}

    def __post_init__(self) -> None:
        check_rungs((self.step,))

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """One look, then finish the winner."""
        return self._halving().search(problem, rng)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """All candidates at `step`, one at the end."""
        return self._halving().plan(num_candidates, num_steps)

    def _halving(self) -> SuccessiveHalving:
        return SuccessiveHalving(rungs=(self.step,), sizes=(1,))
