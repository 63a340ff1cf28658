"""Ranks, ties and choices over the candidates of each prompt.

Everything works on rows of [prompts, candidates] arrays at once. Higher is better, ties go to the lower index, and NaN
means "not observed": it ranks below every number. Rewards are finite; the driver sees to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ttsnap.types import BoolArray, FloatArray, IntArray


def order(values: FloatArray, alive: BoolArray) -> IntArray:
    """Candidate indices [prompts, candidates] from best to worst; those not alive (or NaN) come last."""
    keys = np.where(alive & ~np.isnan(values), -values, np.inf)
    return np.argsort(keys, axis=1, kind="stable")


def top(values: FloatArray, alive: BoolArray, size: int | IntArray) -> BoolArray:
    """The `size` best of the alive candidates of each prompt, as a mask [prompts, candidates].

    Args:
        values: combined rewards [prompts, candidates].
        alive: who may be chosen [prompts, candidates].
        size: how many survive, one number or one per prompt [prompts].
    """
    best_first = order(values, alive)
    place = np.empty_like(best_first)
    np.put_along_axis(place, best_first, np.broadcast_to(np.arange(values.shape[1]), values.shape), axis=1)
    return alive & (place < np.asarray(size).reshape(-1, 1))


def choose(values: FloatArray, alive: BoolArray) -> IntArray:
    """Index [prompts] of the best alive candidate of each prompt."""
    return order(values, alive)[:, 0]


def ranks(values: FloatArray, alive: BoolArray) -> FloatArray:
    """Rank among the alive of each row, 1 = worst, ties share the mean of their ranks; NaN where not alive."""
    worst_first = np.argsort(np.where(alive, values, np.inf), axis=1, kind="stable")
    ordered = np.take_along_axis(np.where(alive, values, np.inf), worst_first, axis=1)
    width = values.shape[1]
    index = np.broadcast_to(np.arange(width), values.shape)
    new = np.ones(values.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    last = np.ones(values.shape, dtype=bool)
    last[:, :-1] = new[:, 1:]
    lowest = np.maximum.accumulate(np.where(new, index, 0), axis=1)
    highest = np.minimum.accumulate(np.where(last, index, width)[:, ::-1], axis=1)[:, ::-1]
    result = np.empty(values.shape)
    np.put_along_axis(result, worst_first, (lowest + highest) / 2 + 1, axis=1)
    return np.where(alive, result, np.nan)


@dataclass(frozen=True)
class RankSum:
    """Sum of the ranks under each reward among the candidates still alive (as TTSnap combines several rewards)."""

    def __call__(self, rewards: FloatArray, alive: BoolArray) -> FloatArray:
        """One number [prompts, candidates] from rewards [prompts, candidates, rewards]."""
        if rewards.shape[-1] == 1:
            return np.where(alive, rewards[..., 0], np.nan)
        return sum((ranks(rewards[..., i], alive) for i in range(rewards.shape[-1])), np.zeros(alive.shape))


@dataclass(frozen=True)
class WeightedSum:
    """Weighted sum of the rewards; `weights` one per reward."""

    weights: Sequence[float]

    def __call__(self, rewards: FloatArray, alive: BoolArray) -> FloatArray:
        """One number [prompts, candidates] from rewards [prompts, candidates, rewards]."""
        if len(self.weights) != rewards.shape[-1]:
            raise ValueError(f"{rewards.shape[-1]} rewards need as many weights, got {len(self.weights)}")
        return np.where(alive, rewards @ np.asarray(self.weights, dtype=float), np.nan)
