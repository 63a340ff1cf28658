"""Successive halving: look at a few rungs and keep the best share of the alive at each."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ttsnap.core.grid import Problem, Query, Rung, Search
from ttsnap.core.ranking import top
from ttsnap.policies.rungs import check_rungs, steps_of


@dataclass(frozen=True)
class SuccessiveHalving:
    """TTSp with a clean reward as guide, TTSnap with a noise-aware one (Yu et al., 2025, arXiv 2511.22242).

    Attributes:
        rungs: steps (denoiser calls made, 1-based, ascending) at which the alive are looked at; or all shares of the
            steps, such as .25, .5.
        keep: the fraction of the alive that survives each rung, in (0, 1], rounded to the nearest whole number (a
            half to the even one, as the authors do); at least one always survives.
        sizes: instead of `keep`, how many survive each rung.
        least: at least so many survive each rung.
    """

    rungs: tuple[float, ...] = (3, 7, 12)
    keep: tuple[float, ...] | None = None
    sizes: tuple[int, ...] | None = None
    least: int = 1

    RANGES: ClassVar = {"rungs": (0.05, 0.85), "keep": (0.1, 1.0)}

    def __post_init__(self) -> None:
        if self.keep is None and self.sizes is None:
            object.__setattr__(self, "keep", (0.4, 0.4, 0.5) if len(self.rungs) == 3 else (0.4,) * len(self.rungs))
        check_rungs(self.rungs)
        if self.keep is not None and self.sizes is not None:
            raise ValueError("give keep ratios or sizes, not both")
        for name, values in (("keep ratios", self.keep), ("sizes", self.sizes)):
            if values is not None and len(values) != len(self.rungs):
                raise ValueError(f"{len(self.rungs)} rungs need {len(self.rungs)} {name}, got {len(values)}: {values}")
        for ratio in self.keep or ():
            if not 0 < ratio <= 1:
                raise ValueError(f"a keep ratio must be above 0 and at most 1, got {ratio}")
        if self.least < 1:
            raise ValueError(f"at least 1 survives each rung, got {self.least}")
        if self.sizes is not None and any(size < 1 or size != int(size) for size in self.sizes):
            raise ValueError(f"sizes must be whole numbers of at least 1, got {self.sizes}")

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Look, keep the best, go on; then finish the survivors."""
        plan = self.plan(problem.num_candidates, problem.num_steps)
        alive = np.ones(problem[:2], dtype=bool)
        for rung, following in itertools.pairwise(plan):
            rewards = yield Query(alive, rung.step)
            alive = top(rewards, alive, following.size)
        yield Query(alive, problem.num_steps)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """Who is looked at where. With one candidate left there is nothing to decide, so its looks are saved."""
        plan, size = [], num_candidates
        for index, step in steps_of(self.rungs, num_steps):
            if size > 1:
                plan.append(Rung(step, size))
            size = self._survivors(index, size)
        return (*plan, Rung(num_steps, size))

    def _survivors(self, index: int, size: int) -> int:
        if self.sizes is not None:
            return min(size, max(self.least, int(self.sizes[index])))
        assert self.keep is not None
        return min(size, max(self.least, round(self.keep[index] * size)))
