"""Replay: answer a policy from an array of recorded rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ttsnap.types import FloatArray, Problem, Query


@dataclass(frozen=True)
class ReplayEnvironment:
    """Looks up rewards recorded for every candidate after every call.

    Attributes:
        guide: what a policy sees [prompts, candidates, steps, rewards]: rewards of the x0 estimate after call s at
            index s - 1, the finished image last. Noise-aware where they exist, else clean.
        prompts: names for error messages (optional).
        seeds: seeds [prompts, candidates] for error messages (optional).
    """

    guide: FloatArray
    prompts: Sequence[str] | None = None
    seeds: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.guide.ndim != 4 or 0 in self.guide.shape:
            raise ValueError(
                "recorded rewards must have shape [prompts, candidates, steps, rewards], none of them empty, "
                f"got {self.guide.shape}"
            )

    @property
    def problem(self) -> Problem:
        """The recorded grid."""
        return Problem(*self.guide.shape[:3])

    def observe(self, query: Query) -> FloatArray:
        """Rewards [prompts, candidates, rewards] after `query.step` calls; NaN where not asked."""
        return np.where(query.mask[..., None], self.guide[:, :, query.step - 1], np.nan)

    def describe(self, prompt: int, candidate: int) -> str:
        """Name a candidate for an error message."""
        name = f"prompt {self.prompts[prompt]!r}" if self.prompts is not None else f"prompt {prompt}"
        seed = f"seed {int(self.seeds[prompt, candidate])}" if self.seeds is not None else f"candidate {candidate}"
        return f"{name}, {seed}"
