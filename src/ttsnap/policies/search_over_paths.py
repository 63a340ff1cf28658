"""Search over paths: add noise, denoise further than it went back, keep the best, again and again."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ttsnap.core.grid import Problem, Query, Rung, Search
from ttsnap.core.ranking import order
from ttsnap.policies.places import children_at, only


@dataclass(frozen=True)
class SearchOverPaths:
    """Search over Paths (Ma et al., 2025, arXiv 2501.09732), with the steps of DOG-Trim's baseline (2511.22242).

    P paths are denoised `ahead`. Then, until the end: of each path come M children, whose noise is led back up by the
    forward process, x' = (alpha'/alpha) x + sqrt(sigma'^2 - (alpha' sigma / alpha)^2) xi, over `back` of the way, and
    denoised `ahead` again; the best P of all children are the next paths. N places hold P = N // M paths.

    Attributes:
        children: M, of each path.
        ahead: share of the steps that is denoised at a time.
        back: share of the steps that noise is added over, less than `ahead`.
    """

    children: int = 4
    ahead: float = 0.2
    back: float = 0.085

    RANGES: ClassVar = {"children": (2, 8), "ahead": (0.12, 0.5), "back": (0.03, 0.3)}

    def __post_init__(self) -> None:
        if self.children < 1 or not 0 < self.back < self.ahead < 1:
            raise ValueError(
                "search over paths takes at least 1 child per path and shares 0 < back < ahead < 1, "
                f"got {self.children}, {self.back}, {self.ahead}"
            )

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Stage by stage; the paths of the last are finished."""
        shape, steps = problem[:2], problem.num_steps
        paths = self._paths(problem.num_candidates)
        stops, back = self._stops(steps)
        if not paths:
            yield Query(np.ones(shape, dtype=bool), steps)
            return
        places = np.arange(paths * self.children)
        yield Query(only(shape, np.arange(paths)), stops[0])
        kept = np.tile(np.arange(paths), (problem.num_prompts, 1))
        for before, after in itertools.pairwise(stops):
            parents = np.repeat(kept, self.children, axis=1)
            yield children_at(shape, places, parents, before, np.nan, back=back)
            mask = only(shape, places)
            rewards = yield Query(mask, after)
            kept = order(rewards, mask)[:, :paths]
        alive = np.zeros(shape, dtype=bool)
        np.put_along_axis(alive, kept, True, axis=1)
        yield Query(alive, steps)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """The paths, the children of each stage, who make some calls again, and the finished."""
        paths = self._paths(num_candidates)
        if not paths:
            return (Rung(num_steps, num_candidates),)
        stops, back = self._stops(num_steps)
        found = [Rung(stops[0], paths)]
        for before, after in itertools.pairwise(stops):
            found += [Rung(before - back, 0), Rung(after, paths * self.children)]
        return (*found, Rung(num_steps, paths))

    def _paths(self, count: int) -> int:
        """How many; none where the places do not hold the children of one."""
        return count // self.children

    def _stops(self, num_steps: int) -> tuple[list[int], int]:
        """Where paths are judged, before the end, and how many calls they go back."""
        ahead = max(1, round(self.ahead * num_steps))
        back = min(ahead - 1, max(1, round(self.back * num_steps)))
        stops = list(range(ahead, num_steps, max(1, ahead - back)))
        return stops or [max(1, num_steps - 1)], back
