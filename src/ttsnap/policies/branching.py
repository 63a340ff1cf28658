"""Branching: at each rung keep the best and let them have children in the places of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ttsnap.core.grid import BoolArray, IntArray, Problem, Query, Rung, Search
from ttsnap.core.ranking import top
from ttsnap.policies.places import placed
from ttsnap.policies.rungs import check_rungs, steps_of


@dataclass(frozen=True)
class Branching:
    """Beam search over the denoising tree (as DSearch, Li et al., 2025, arXiv 2503.02039, and SVDD, 2408.08252).

    N candidates start. At each rung the best `keep` x N are kept, and children of theirs, best parents first, fill up
    to `grow` x N. With `families` a child competes with its own parent's children only, so that every parent goes on
    in one of them (SVDD's value-based choice); without, all compete (beam search).

    Attributes:
        rungs: steps (denoiser calls made, ascending) at which candidates are looked at, or shares of the steps.
        keep: share of the N that is kept at each rung.
        grow: share of the N that goes on from each rung, children included; at least `keep`.
        angle: degrees by which the children's noise is rotated, one number or one per rung.
        families: choose within families.
    """

    rungs: tuple[float, ...] = (0.2, 0.4, 0.6)
    keep: tuple[float, ...] = (0.2, 0.1, 0.08)
    grow: tuple[float, ...] = (0.4, 0.3, 0.08)
    angle: float | tuple[float, ...] = 50.0
    families: bool = False

    RANGES: ClassVar = {"rungs": (0.05, 0.85), "keep": (0.02, 0.5), "grow": (0.05, 1.0), "angle": (10.0, 90.0)}

    def __post_init__(self) -> None:
        check_rungs(self.rungs)
        count = len(self.rungs)
        for name, values in (("keep", self.keep), ("grow", self.grow)):
            if len(values) != count or not all(0 < value <= 1 for value in values):
                raise ValueError(f"{name} takes {count} shares above 0 and at most 1, one per rung, got {values}")
        if any(keep > grow for keep, grow in zip(self.keep, self.grow, strict=True)):
            raise ValueError(f"grow must be at least keep at each rung, got keep {self.keep} and grow {self.grow}")
        if isinstance(self.angle, tuple) and len(self.angle) != count:
            raise ValueError(f"angle takes one number or {count}, got {self.angle}")

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Look, keep the best, let them have children, go on; then finish who is left."""
        alive = np.ones(problem[:2], dtype=bool)
        family: IntArray = np.tile(np.arange(problem.num_candidates), (problem.num_prompts, 1))
        for index, rung in self._looks(problem.num_candidates, problem.num_steps):
            kept, size = self._sizes(index, problem.num_candidates)
            rewards = yield Query(alive, rung)
            chosen = top(rewards, _heads(rewards, alive, family), kept) if self.families else top(rewards, alive, kept)
            drawn = _children(np.where(chosen, rewards, -np.inf), chosen, size)
            angle = self.angle[index] if isinstance(self.angle, tuple) else self.angle
            fork = placed(drawn, rung, angle)
            family = np.tile(np.arange(problem.num_candidates), (problem.num_prompts, 1))
            family = fork.from_parents(family)
            alive = chosen | fork.children
            if fork.children.any():
                yield fork
        yield Query(alive, problem.num_steps)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """All at the first rung, then what each rung leaves."""
        looks = self._looks(num_candidates, num_steps)
        sizes = [num_candidates, *(self._sizes(index, num_candidates)[1] for index, _ in looks)]
        return tuple(map(Rung, [*(step for _, step in looks), num_steps], sizes))

    def _looks(self, count: int, num_steps: int) -> list[tuple[int, int]]:
        """Index and step of the rungs at which there is anything to decide."""
        found, before = [], count
        for index, step in steps_of(self.rungs, num_steps):
            size = self._sizes(index, count)[1]
            if max(before, size) > 1:
                found.append((index, step))
                before = size
        return found

    def _sizes(self, index: int, count: int) -> tuple[int, int]:
        """How many are kept, and how many go on, children included."""
        kept = max(1, round(self.keep[index] * count))
        return kept, min(count, max(kept, round(self.grow[index] * count)))


def _heads(rewards: np.ndarray, alive: BoolArray, family: IntArray) -> BoolArray:
    """The best of each family [prompts, candidates]."""
    heads = np.zeros_like(alive)
    for row in range(len(alive)):
        for parent in np.unique(family[row][alive[row]]):
            mine = np.flatnonzero(alive[row] & (family[row] == parent))
            heads[row, mine[np.argmax(rewards[row, mine])]] = True
    return heads


def _children(values: np.ndarray, chosen: BoolArray, size: int) -> IntArray:
    """How often each of the chosen goes on [prompts, candidates], itself included: `size` in all, the best first."""
    drawn = chosen.astype(np.int64)
    for row in range(len(values)):
        order = np.argsort(-values[row], kind="stable")[: int(chosen[row].sum())]
        for number in range(size - len(order)):
            drawn[row, order[number % len(order)]] += 1
    return drawn
