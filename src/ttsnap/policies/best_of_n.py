"""Best-of-N: finish every candidate, keep the best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttsnap.core.grid import Problem, Query, Rung, Search


@dataclass(frozen=True)
class BestOfN:
    """Finish all candidates and look once, at the end."""

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """One query: all candidates, at the last step."""
        yield Query(np.ones(problem[:2], dtype=bool), problem.num_steps)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """All candidates, finished."""
        return (Rung(num_steps, num_candidates),)
