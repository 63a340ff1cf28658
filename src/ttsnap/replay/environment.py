"""Replay: answer a policy from an array of recorded rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ttsnap.core.grid import NO_DRAFTS, FloatArray, Fork, IntArray, Problem, Query


@dataclass(frozen=True)
class ReplayEnvironment:
    """Looks up rewards recorded for every candidate after every call.

    With `draws` each row of the grid is one trial on one prompt: a few candidates drawn from the recorded pool. Nothing
    is copied; a query gathers only what it asks about.

    Attributes:
        guide: what a policy sees [prompts, pool, steps, rewards]: rewards of the x0 estimate after call s at index
            s - 1, the finished image last. Noise-aware where they exist, else clean. Fastest when each step is
            contiguous, as `Recording.guide` returns it. Any float type; answers are float64.
        prompts: names for error messages (optional).
        seeds: seeds [prompts, pool] for error messages (optional).
        draws: which recorded candidates make the grid [rows, candidates], as flat indices prompt * pool + candidate;
            None: the recorded grid itself.
    """

    guide: np.ndarray
    prompts: Sequence[str] | None = None
    seeds: np.ndarray | None = None
    draws: IntArray | None = None

    def __post_init__(self) -> None:
        if self.guide.ndim != 4 or 0 in self.guide.shape:
            raise ValueError(
                "recorded rewards must have shape [prompts, candidates, steps, rewards], none of them empty, "
                f"got {self.guide.shape}"
            )
        if self.draws is not None and (self.draws.ndim != 2 or self.draws.size == 0):
            raise ValueError(f"draws must have shape [rows, candidates], not empty, got {self.draws.shape}")

    @property
    def problem(self) -> Problem:
        """The grid: the recorded one, or that of the draws."""
        rows, candidates = self.guide.shape[:2] if self.draws is None else self.draws.shape
        return Problem(rows, candidates, self.guide.shape[2])

    def observe(self, query: Query) -> FloatArray:
        """Rewards [prompts, candidates, rewards] after `query.step` calls; NaN where not asked.

        Raises:
            ValueError: a draft, which no recording holds.
        """
        if query.draft:
            raise ValueError(NO_DRAFTS)
        size, rewards = query.mask.size, self.guide.shape[3]
        recorded = self.guide[:, :, query.step - 1].reshape(-1, rewards)
        everything = np.count_nonzero(query.mask) == size
        where = slice(None) if everything else np.flatnonzero(query.mask)
        index = where if self.draws is None else self.draws.reshape(-1)[where]
        answer = np.empty((size, rewards)) if everything else np.full((size, rewards), np.nan)
        for i in range(rewards):
            answer[where, i] = recorded[:, i][index]
        return answer.reshape(*query.mask.shape, rewards)

    def fork(self, fork: Fork) -> FloatArray:
        """Recordings hold no children.

        Raises:
            ValueError: always.
        """
        raise ValueError("this policy forks candidates, which no recording holds; run it live (ttsnap generate)")

    def describe(self, prompt: int, candidate: int) -> str:
        """Name a candidate for an error message."""
        if self.draws is not None:
            prompt, candidate = divmod(int(self.draws[prompt, candidate]), self.guide.shape[1])
        name = f"prompt {self.prompts[prompt]!r}" if self.prompts is not None else f"prompt {prompt}"
        seed = f"seed {int(self.seeds[prompt, candidate])}" if self.seeds is not None else f"candidate {candidate}"
        return f"{name}, {seed}"
