"""Restart: add noise to the best candidate, denoise it again several times, and go on with the best outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ttsnap.core.grid import Problem, Query, Rung, Search
from ttsnap.policies.places import children_at, only
from ttsnap.policies.rungs import check_rungs, step_of


@dataclass(frozen=True)
class Restart:
    """Restart sampling (Xu et al., 2023, arXiv 2306.14878), chosen by a reward.

    N candidates are denoised to `step`, and the best is kept. In each round it is led back up by the forward process,
    over `back` of the steps, once for each of `width` x N children; these are denoised to `step` again, and the best of
    them and the one they came from goes on. The original restarts one sample, and takes what comes.

    Attributes:
        step: denoiser calls before a restart, or that share of the steps.
        back: share of the steps that is made again.
        rounds: of restarts.
        width: share of the N that is restarted in each round.
    """

    step: float = 0.4
    back: float = 0.2
    rounds: int = 2
    width: float = 0.4

    RANGES: ClassVar = {"step": (0.15, 0.8), "back": (0.05, 0.5), "rounds": (1, 5), "width": (0.1, 1.0)}

    def __post_init__(self) -> None:
        check_rungs((self.step,))
        if not (0 < self.back < 1 and 0 < self.width <= 1 and self.rounds >= 1):
            raise ValueError(
                "restarts take shares 0 < back < 1 and 0 < width <= 1 and at least 1 round, "
                f"got {self.back}, {self.width}, {self.rounds}"
            )

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Look, restart the best, look again; then finish the best."""
        shape, steps, every = problem[:2], problem.num_steps, np.arange(problem.num_prompts)
        alive = np.ones(shape, dtype=bool)
        step, back, width = self._sizes(problem.num_candidates, steps)
        if problem.num_candidates > 1:
            best = (yield Query(alive, step)).argmax(axis=1)
            children, family = np.arange(1, width + 1), only(shape, np.arange(width + 1))
            for _ in range(self.rounds if back else 0):
                if best.any():
                    yield children_at(shape, [0], best[:, None], step, rows=best != 0)  # in the first place
                yield children_at(shape, children, 0, step, np.nan, back=back)
                best = np.where(family, (yield Query(family, step)), -np.inf).argmax(axis=1)
            alive = np.zeros(shape, dtype=bool)
            alive[every, best] = True
        yield Query(alive, steps)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """All at `step`, the restarted ones of every round, and the one that is finished."""
        step, back, width = self._sizes(num_candidates, num_steps)
        if num_candidates < 2:
            return (Rung(num_steps, num_candidates),)
        rounds = [rung for _ in range(self.rounds if back else 0) for rung in (Rung(step - back, 0), Rung(step, width))]
        return (Rung(step, num_candidates), *rounds, Rung(num_steps, 1))

    def _sizes(self, count: int, num_steps: int) -> tuple[int, int, int]:
        """Step, calls that are made again, children."""
        step = step_of(self.step, num_steps)
        back = min(step - 1, max(1, round(self.back * num_steps)))
        return step, back, min(count - 1, max(1, round(self.width * count)))
