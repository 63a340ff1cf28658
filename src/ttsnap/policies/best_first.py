"""Best-first search: the candidate with the highest reward goes on, at whatever step, until the calls are spent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ttsnap.core.grid import FloatArray, IntArray, Problem, Query, Rung, Search
from ttsnap.policies.rungs import check_rungs, steps_of


@dataclass(frozen=True)
class BestFirst:
    """Best-first search over the denoising tree (Pearl, 1984; of diffusion, Zhang et al., 2025, arXiv 2505.23614).

    All candidates are brought to the first rung. Then, of each prompt, the candidate with the highest reward at its
    last look is brought to its next rung, or finished from the last one, as long as `share` of the calls of best-of-N
    can still pay for finishing it. So a candidate that disappoints is left, and an earlier one taken up again.

    Attributes:
        rungs: steps (denoiser calls made, ascending) at which candidates are looked at, or shares of the steps.
        share: of the calls of best-of-N that may be spent; at least as many as it takes to finish one.
    """

    rungs: tuple[float, ...] = (0.15, 0.3, 0.45, 0.6)
    share: float = 0.35

    RANGES: ClassVar = {"rungs": (0.05, 0.85), "share": (0.15, 1.0)}

    def __post_init__(self) -> None:
        check_rungs(self.rungs)
        if not self.rungs or not 0 < self.share <= 1:
            raise ValueError(
                f"best-first search takes a rung or more, and a share above 0 and at most 1, got {self.share}"
            )

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """One step of each prompt at a time, until no candidate can be paid for."""
        shape, steps, every = problem[:2], problem.num_steps, np.arange(problem.num_prompts)
        rungs, left = self._rungs(steps), self._calls(problem.num_candidates, steps)
        stops = np.array([*rungs, steps])
        if problem.num_candidates == 1:
            yield Query(np.ones(shape, dtype=bool), steps)
            return
        reward: FloatArray = yield Query(np.ones(shape, dtype=bool), rungs[0])
        place: IntArray = np.zeros(shape, dtype=np.int64)  # index of the stop where each candidate stands
        rest = np.full(problem.num_prompts, left - problem.num_candidates * rungs[0])
        while True:
            open_ = (place < len(rungs)) & (steps - stops[place] <= rest[:, None])
            going = open_.any(axis=1)
            if not going.any():
                return
            picked = np.where(open_, reward, -np.inf).argmax(axis=1)
            following = np.where(going, place[every, picked] + 1, 0)
            for stop in np.unique(following[going]):  # every prompt has its own place on the way
                rows = going & (following == stop)
                mask = np.zeros(shape, dtype=bool)
                mask[every[rows], picked[rows]] = True
                reward = np.where(mask, (yield Query(mask, int(stops[stop]))), reward)
                rest = rest - rows * (stops[stop] - stops[stop - 1])
                place = place + mask

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """All at the first rung; then what the calls pay for, if each goes on to the end; looks may be a few more."""
        rungs, calls = self._rungs(num_steps), self._calls(num_candidates, num_steps)
        if num_candidates == 1:
            return (Rung(num_steps, 1),)
        finished = -(-(calls - num_candidates * rungs[0]) // (num_steps - rungs[0]))
        return (Rung(rungs[0], num_candidates), *(Rung(step, finished) for step in (*rungs[1:], num_steps)))

    def _rungs(self, num_steps: int) -> list[int]:
        return [step for _, step in steps_of(self.rungs, num_steps)]

    def _calls(self, count: int, num_steps: int) -> int:
        """That may be spent on a prompt."""
        first = self._rungs(num_steps)[0]
        return max(round(self.share * count * num_steps), count * first + num_steps - first)
