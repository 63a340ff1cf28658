"""Zero-order search: look around the best noise so far, and go where it is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ttsnap.core.grid import Problem, Query, Rung, Search
from ttsnap.policies.places import children_at, only
from ttsnap.policies.rungs import check_rungs, step_of


@dataclass(frozen=True)
class ZeroOrder:
    """Zero-order search over the initial noise (Ma et al., 2025, arXiv 2501.09732); with `explore` epsilon-greedy.

    A pivot waits after its first call, where nearly nothing is settled. In every round its noise is rotated by `angle`
    for each of M neighbours, which are judged after `look` calls. The best of them, if it beats all before, is the
    pivot of the next round; in the end it is finished. Each neighbour waits after the first call, too, so that it can
    become the pivot, while a twin of angle 0 goes on to the look. So N places of the grid make M = (N - 2) // 2.

    Attributes:
        rounds: of neighbours.
        look: denoiser calls after which neighbours are judged, or that share of the steps.
        angle: degrees by which the pivot's noise is rotated.
        explore: chance of a neighbour to be a new start, 90 degrees away (epsilon).
    """

    rounds: int = 4
    look: float = 0.4
    angle: float = 30.0
    explore: float = 0.0

    RANGES: ClassVar = {"rounds": (1, 8), "look": (0.1, 0.8), "angle": (5.0, 90.0)}

    def __post_init__(self) -> None:
        check_rungs((self.look,))
        if self.rounds < 1 or not 0 <= self.explore <= 1 or self.look == 1:
            raise ValueError(
                "zero-order search takes at least 1 round, looks after 2 calls or later and explores with a chance "
                f"in 0..1, got {self.rounds}, {self.look}, {self.explore}"
            )

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Round by round; then finish the best."""
        rows, count, steps = problem
        shape, look, near = (rows, count), self._look(steps), _neighbours(count)
        if near < 1:
            yield Query(np.ones(shape, dtype=bool), steps)
            return
        pivot, best, every = 0, count - 1, np.arange(rows)
        neighbours, twins = np.arange(1, near + 1), np.arange(near + 1, 2 * near + 1)
        yield Query(only(shape, pivot), 1)
        record = np.full(rows, -np.inf)
        for _ in range(self.rounds):
            angle = np.where(rng.random(near) < self.explore, 90.0, self.angle)
            yield children_at(shape, neighbours, pivot, 1, angle)
            yield children_at(shape, twins, neighbours, 1)
            rewards = (yield Query(only(shape, twins), look))[:, twins]
            top = rewards.argmax(axis=1)
            better = rewards[every, top] > record
            record = np.where(better, rewards[every, top], record)
            if better.any():
                yield children_at(shape, [best], twins[top][:, None], look, rows=better)
                yield children_at(shape, [pivot], neighbours[top][:, None], 1, rows=better)
        yield Query(only(shape, best), steps)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """The pivot's call, the neighbours of all rounds, and the one that is finished."""
        look, near = self._look(num_steps), _neighbours(num_candidates)
        if near < 1:
            return (Rung(num_steps, num_candidates),)
        return (Rung(1, 1), Rung(look, self.rounds * near), Rung(num_steps, 1))

    def _look(self, num_steps: int) -> int:
        return max(2, step_of(self.look, num_steps))


def _neighbours(count: int) -> int:
    """How many a round has."""
    return (count - 2) // 2
