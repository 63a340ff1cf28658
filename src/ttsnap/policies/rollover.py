"""Rollover budget forcing: try continuations one at a time; what a stage saves, the next may spend."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ttsnap.core.grid import Problem, Query, Rung, Search
from ttsnap.policies.places import children_at, only
from ttsnap.policies.rungs import check_rungs, steps_of


@dataclass(frozen=True)
class Rollover:
    """Rollover budget forcing (Kim et al., 2025, arXiv 2503.19385).

    N tries are shared out over the stages between rungs. In the first, as many candidates as it has tries are begun and
    the best is kept. In each later stage continuations of it, its noise rotated by `angle`, are brought to the next
    rung one at a time, until one beats the reward that it had; tries that are left are added to the next stage's. If
    none does, the best of them goes on. The plan is what it costs if none ever does, so a search may cost less.

    Attributes:
        rungs: steps (denoiser calls made, ascending) that end the stages, or shares of the steps.
        first: share of the tries that the first stage has.
        angle: degrees by which continuations differ; the original draws them with a stochastic sampler.
    """

    rungs: tuple[float, ...] = (0.2, 0.35, 0.5, 0.65)
    first: float = 0.6
    angle: float = 60.0

    RANGES: ClassVar = {"rungs": (0.05, 0.85), "first": (0.2, 0.9), "angle": (10.0, 90.0)}

    def __post_init__(self) -> None:
        check_rungs(self.rungs)
        if not self.rungs or not 0 < self.first < 1:
            raise ValueError(f"rollover takes a rung or more, and a first share between 0 and 1, got {self.first}")

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Stage by stage; then finish the one."""
        shape, every = problem[:2], np.arange(problem.num_prompts)
        rungs, tries = self._stages(problem.num_candidates, problem.num_steps)
        if len(tries) < 2:
            yield Query(np.ones(shape, dtype=bool), problem.num_steps)
            return
        now, trial, best = 0, 1, 2
        rewards = yield Query(only(shape, np.arange(tries[0])), rungs[0])
        top = np.where(only(shape, np.arange(tries[0])), rewards, -np.inf).argmax(axis=1)
        record = rewards[every, top]
        if top.any():
            yield children_at(shape, [now], top[:, None], rungs[0], rows=top != now)
        left: np.ndarray = np.zeros(problem.num_prompts, dtype=np.int64)
        for (before, after), own in zip(itertools.pairwise(rungs), tries[1:], strict=True):
            left = left + own
            found = np.full(problem.num_prompts, -np.inf)
            while (trying := (left > 0) & ~(found > record)).any():
                yield children_at(shape, [trial], now, before, self.angle, rows=trying)
                reward = (yield Query(only(shape, trial, trying), after))[:, trial]
                left = left - trying
                better = trying & (reward > found)
                found = np.where(better, reward, found)
                if better.any():
                    yield children_at(shape, [best], trial, after, rows=better)
            yield children_at(shape, [now], best, after)
            record = found
        yield Query(only(shape, now), problem.num_steps)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """All tries of every stage, and the one that is finished."""
        rungs, tries = self._stages(num_candidates, num_steps)
        if len(tries) < 2:
            return (Rung(num_steps, num_candidates),)
        return (*map(Rung, rungs, tries), Rung(num_steps, 1))

    def _stages(self, count: int, num_steps: int) -> tuple[list[int], list[int]]:
        """Where each stage ends, and how many tries it has; of too few, one stage."""
        rungs = [step for _, step in steps_of(self.rungs, num_steps)]
        first = max(1, round(self.first * count))
        later = [len(part) for part in np.array_split(np.arange(count - first), max(1, len(rungs) - 1))]
        if count < 3 or len(rungs) < 2 or not all(later):
            return rungs[:1], [count]
        return rungs, [first, *later]
