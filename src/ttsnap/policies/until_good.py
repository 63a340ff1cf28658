"""Until good: search a few candidates at a time, and stop as soon as an image is good enough."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import numpy as np

from ttsnap.core.grid import BoolArray, FloatArray, Fork, Policy, Problem, Query, Rung, Search
from ttsnap.policies.best_of_n import BestOfN


@dataclass(frozen=True)
class UntilGood:
    """A search that stops early: a verifier with a threshold, as for language models (Cobbe et al., 2021).

    Candidates are searched `group` at a time, in the order of their seeds, by another policy, until a finished one of
    the prompt has a reward of at least `stop_at`, or none is left. Prompts that are easy cost little; the plan, and so
    a budget, is that of the hardest.

    Attributes:
        stop_at: reward that is good enough (with several rewards that are added: their weighted sum).
        group: candidates at a time.
        inner: policy that searches among them; by default all are finished.
    """

    stop_at: float
    group: int = 4
    inner: Policy = field(default_factory=BestOfN)

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ValueError(f"candidates are searched at least 1 at a time, got {self.group}")

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Group by group, for the prompts that have no good one yet."""
        waiting = np.ones(problem.num_prompts, dtype=bool)
        for first in range(0, problem.num_candidates, self.group):
            columns = slice(first, min(first + self.group, problem.num_candidates))
            best = yield from self._group(problem, columns, waiting, rng)
            waiting &= ~(best >= self.stop_at)
            if not waiting.any():
                return

    def _group(
        self, problem: Problem, columns: slice, rows: BoolArray, rng: np.random.Generator
    ) -> Generator[Query | Fork, FloatArray, FloatArray]:
        """Search some candidates of some prompts; the best finished reward of each prompt [prompts], else -inf."""
        part = Problem(int(rows.sum()), columns.stop - columns.start, problem.num_steps)
        inner, answer = self.inner.search(part, rng), None
        best = np.full(problem.num_prompts, -np.inf)
        while True:
            try:
                asked = next(inner) if answer is None else inner.send(answer)
            except StopIteration:
                return best
            if isinstance(asked, Fork):
                parents = np.where(asked.children, asked.parents + columns.start, -1)
                whole = asked._replace(
                    parents=_spread(parents, problem, columns, rows, -1),
                    angle=_spread(asked.angle, problem, columns, rows, 0.0),
                )
                answer = (yield whole)[rows, columns]
                continue
            mask = _spread(asked.mask, problem, columns, rows, False)
            rewards: FloatArray = yield asked._replace(mask=mask)
            answer = rewards[rows, columns]
            if asked.step == problem.num_steps:
                best = np.maximum(best, np.where(mask, rewards, -np.inf).max(axis=1))

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """All groups, one after the other, at most."""
        found: list[Rung] = []
        for first in range(0, num_candidates, self.group):
            begin = [Rung(0, 0)] if found else []
            found += [*begin, *self.inner.plan(min(self.group, num_candidates - first), num_steps)]
        return tuple(found)


def _spread(part: np.ndarray, problem: Problem, columns: slice, rows: BoolArray, empty: object) -> np.ndarray:
    """A part of the grid [some prompts, some candidates] in its place in the whole."""
    whole = np.full(problem[:2], empty, dtype=part.dtype)
    whole[rows, columns] = part
    return whole
