"""Draft, then refine: finish every seed with few steps, and only the best of them with all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ttsnap.core.grid import Problem, Query, Rung, Search
from ttsnap.core.ranking import top
from ttsnap.policies.rungs import check_rungs, step_of


@dataclass(frozen=True)
class DraftThenRefine:
    """Drafts of few steps choose the seeds, as users who try seeds by hand do.

    Each seed is finished by a call of its own with `steps` steps. The drafts are judged as the finished images that
    they are, by the clean reward, and the seeds of the best `keep` x N are begun anew and finished with all steps. A
    draft costs a decode and a full look; unlike an early look it leaves nothing that the refined candidate could go on
    from.

    Attributes:
        steps: of a draft, or that share of the steps.
        keep: share of the N that is refined; at least one.
    """

    steps: float = 0.25
    keep: float = 0.2

    RANGES: ClassVar = {"steps": (0.1, 0.6), "keep": (0.03, 0.5)}

    def __post_init__(self) -> None:
        check_rungs((self.steps,))
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be a share above 0 and at most 1, got {self.keep}")

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Draft all, then finish the seeds of the best."""
        drafts, finished = self.plan(problem.num_candidates, problem.num_steps)
        alive = np.ones(problem[:2], dtype=bool)
        if drafts.size:
            alive = top((yield Query(alive, drafts.step, draft=True)), alive, finished.size)
        yield Query(alive, problem.num_steps)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, Rung]:
        """All drafts, none where there is nothing to choose, then those that are refined."""
        steps, refined = step_of(self.steps, num_steps), max(1, round(self.keep * num_candidates))
        if steps == num_steps or refined == num_candidates:
            return Rung(steps, 0, draft=True), Rung(num_steps, num_candidates)
        return Rung(steps, num_candidates, draft=True), Rung(num_steps, refined)
