"""Until good: finish a few candidates at a time, and stop as soon as one is good enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttsnap.core.grid import Problem, Query, Rung, Search


@dataclass(frozen=True)
class UntilGood:
    """Best-of-N that stops early: a verifier with a threshold, as for language models (Cobbe et al., 2021).

    Candidates are finished `group` at a time, in the order of their seeds, until one of the prompt has a reward of at
    least `stop_at`, or none is left. Prompts that are easy cost little; the plan, and so a budget, is that of the
    hardest.

    Attributes:
        stop_at: reward that is good enough (with several rewards that are added: their weighted sum).
        group: candidates at a time.
    """

    stop_at: float
    group: int = 4

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ValueError(f"candidates are finished at least 1 at a time, got {self.group}")

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Group by group, for the prompts that have no good one yet."""
        waiting = np.ones(problem.num_prompts, dtype=bool)
        for first in range(0, problem.num_candidates, self.group):
            mask = np.zeros(problem[:2], dtype=bool)
            mask[waiting, first : first + self.group] = True
            rewards = yield Query(mask, problem.num_steps)
            waiting &= ~(np.where(mask, rewards, -np.inf).max(axis=1) >= self.stop_at)
            if not waiting.any():
                return

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """All candidates, at most."""
        return (Rung(num_steps, num_candidates),)
