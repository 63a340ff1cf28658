"""Zero-order search: look around the best noise so far, and go where it is better."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ttsnap.core.grid import BoolArray, FloatArray, Fork, IntArray, Problem, Query, Rung, Search
from ttsnap.policies.successive_halving import check_rungs


@dataclass(frozen=True)
class ZeroOrder:
    """Zero-order search over the initial noise (Ma et al., 2025, arXiv 2501.09732); with `explore` epsilon-greedy.

    A pivot waits after its first call, where nearly nothing is settled. In every round its noise is rotated by `angle`
    for each of M neighbours, which are judged after `look` calls. The best of them, if it beats all before, is the
    pivot of the next round; in the end it is finished. Each neighbour waits after the first call, too, so that it can
    become the pivot, while a twin of angle 0 goes on to the look. So N places of the grid make M = (N - 2) // 2.

    Attributes:
        rounds: of neighbours.
        look: denoiser calls after which neighbours are judged; None: 40 % of the steps.
        angle: degrees by which the pivot's noise is rotated.
        explore: chance of a neighbour to be a new start, 90 degrees away (epsilon).
    """

    rounds: int = 4
    look: int | None = None
    angle: float = 30.0
    explore: float = 0.0

    def __post_init__(self) -> None:
        check_rungs(() if self.look is None else (self.look,))
        if self.rounds < 1 or not 0 <= self.explore <= 1 or (self.look is not None and self.look < 2):
            raise ValueError(
                "zero-order search takes at least 1 round, looks after 2 calls or later and explores with a chance "
                f"in 0..1, got {self.rounds}, {self.look}, {self.explore}"
            )

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Round by round; then finish the best."""
        rows, count, steps = problem
        look, near = self._look(steps), _neighbours(count)
        if near < 1:
            yield Query(np.ones((rows, count), dtype=bool), steps)
            return
        pivot, best, every = 0, count - 1, np.arange(rows)
        neighbours, twins = np.arange(1, near + 1), np.arange(near + 1, 2 * near + 1)
        yield Query(_places((rows, count), pivot), 1)
        record = np.full(rows, -np.inf)
        for _ in range(self.rounds):
            angle = np.where(rng.random(near) < self.explore, 90.0, self.angle)
            yield _fork((rows, count), neighbours, np.full((rows, near), pivot), 1, angle)
            yield _fork((rows, count), twins, np.tile(neighbours, (rows, 1)), 1, np.zeros(near))
            rewards = (yield Query(_places((rows, count), twins), look))[:, twins]
            top = rewards.argmax(axis=1)
            better = rewards[every, top] > record
            record = np.where(better, rewards[every, top], record)
            if better.any():
                for place, parents, step in ((best, twins[top], look), (pivot, neighbours[top], 1)):
                    chosen = np.where(better, parents, -1)[:, None]
                    yield _fork((rows, count), np.array([place]), chosen, step, np.zeros(1))
        yield Query(_places((rows, count), best), steps)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """The pivot's call, the neighbours of all rounds, and the one that is finished."""
        look, near = self._look(num_steps), _neighbours(num_candidates)
        if near < 1:
            return (Rung(num_steps, num_candidates),)
        return (Rung(1, 1), Rung(look, self.rounds * near), Rung(num_steps, 1))

    def _look(self, num_steps: int) -> int:
        look = max(2, round(0.4 * num_steps)) if self.look is None else self.look
        check_rungs((look,), num_steps)
        return look


def _neighbours(count: int) -> int:
    """How many a round has."""
    return (count - 2) // 2


def _places(shape: tuple[int, int], places: int | IntArray) -> BoolArray:
    """A mask of places, the same for all prompts."""
    mask = np.zeros(shape, dtype=bool)
    mask[:, places] = True
    return mask


def _fork(shape: tuple[int, int], places: IntArray, parents: NDArray[np.int64], step: int, angle: FloatArray) -> Fork:
    """A fork into some places [n], from parents [prompts, n], by angles [n]."""
    everywhere, angles = np.full(shape, -1), np.zeros(shape)
    everywhere[:, places] = parents
    angles[:, places] = np.where(parents >= 0, angle, 0.0)
    return Fork(everywhere, step, angles)
