"""Ranks, ties and choices over the candidates of each prompt.

Everything works on rows of [prompts, candidates] arrays at once. Higher is better, ties go to the lower index, and NaN
means "not observed": it ranks below every number. Rewards are finite; the driver sees to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ttsnap.core.grid import BoolArray, FloatArray, IntArray


def order(values: FloatArray, alive: BoolArray) -> IntArray:
    """Candidate indices [prompts, candidates] from best to worst; those alive with NaN come late, the others last."""
    keys = np.where(alive, np.where(np.isnan(values), np.inf, -values), np.nan)
    return np.argsort(keys, axis=1, kind="stable")


def top(values: FloatArray, alive: BoolArray, size: int | IntArray) -> BoolArray:
    """The `size` best of the alive candidates of each prompt, as a mask [prompts, candidates].

    Args:
        values: combined rewards [prompts, candidates].
        alive: who may be chosen [prompts, candidates].
        size: how many survive, one number or one per prompt [prompts].
    """
    if np.ndim(size) == 0:
        return _top_by_threshold(values, alive, int(size))
    best_first = order(values, alive)
    place = np.empty_like(best_first)
    np.put_along_axis(place, best_first, np.broadcast_to(np.arange(values.shape[1]), values.shape), axis=1)
    return alive & (place < np.asarray(size).reshape(-1, 1))


def _top_by_threshold(values: FloatArray, alive: BoolArray, size: int) -> BoolArray:
    """`top` of one size for all prompts, in a tenth of the time of sorting; only rows with ties are sorted."""
    index = alive_index(alive)
    if index is None or not 0 < size < index.shape[1]:
        return top(values, alive, np.full(len(alive), size))
    everything = index.size == alive.size
    dense = values if everything else values.ravel()[index]
    threshold = np.partition(dense, -size, axis=1)[:, -size, None]
    best = dense >= threshold
    if np.count_nonzero(best) != size * len(best):
        tied = np.flatnonzero(best.sum(axis=1) != size)
        best[tied] = top(dense[tied], np.ones_like(best[tied]), np.full(len(tied), size))
    if everything:
        return best
    mask = np.zeros(alive.size, dtype=bool)
    mask[index] = best
    return mask.reshape(alive.shape)


def behind(values: FloatArray, alive: BoolArray, blank: BoolArray | None) -> FloatArray:
    """Combined rewards with those of candidates whose picture shows nothing moved below all others of their prompt."""
    if blank is None or not (blank & alive).any():
        return values
    blank = blank & alive & (alive & ~blank).any(axis=1, keepdims=True)  # of those that all show nothing one must do
    lowest = np.nanmin(np.where(alive, values, np.inf), axis=1, keepdims=True)
    highest = np.nanmax(np.where(alive, values, -np.inf), axis=1, keepdims=True)
    moved: FloatArray = np.where(blank, values - (highest - lowest + 1), values)
    return moved


def alive_index(alive: BoolArray) -> IntArray | None:
    """Flat indices [prompts, k] of the alive when every prompt has the same number k of them, else None."""
    rows, width = alive.shape
    count = np.count_nonzero(alive)
    if count == alive.size:
        return np.arange(count).reshape(rows, width)
    if rows == 0 or count == 0 or count % rows:
        return None
    index = np.flatnonzero(alive).reshape(rows, -1)
    start = np.arange(rows) * width
    return index if (index[:, 0] >= start).all() and (index[:, -1] < start + width).all() else None


def choose(values: FloatArray, alive: BoolArray) -> IntArray:
    """Index [prompts] of the best alive candidate of each prompt."""
    index = alive_index(alive)
    if index is None:
        return order(values, alive)[:, 0]
    dense = values.ravel()[index]
    best = np.argmax(np.where(np.isnan(dense), -np.inf, dense), axis=1)
    chosen: IntArray = index[np.arange(len(index)), best] % alive.shape[1]
    return chosen


def ranks(values: FloatArray, alive: BoolArray) -> FloatArray:
    """Rank among the alive of each row, 1 = worst, ties share the mean of their ranks; NaN where not alive."""
    index = alive_index(alive)
    if index is None:
        return np.where(alive, _ranks(np.where(alive, values, np.inf)), np.nan)
    result = np.full(alive.size, np.nan)
    result[index] = _ranks(values.ravel()[index])
    return result.reshape(alive.shape)


def _ranks(values: FloatArray) -> FloatArray:
    """Rank in each row, 1 = lowest, ties share the mean of their ranks."""
    worst_first = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, worst_first, axis=1)
    width = values.shape[1]
    index = np.broadcast_to(np.arange(width), values.shape)
    new = np.ones(values.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    result = np.empty(values.shape)
    if new.all():
        np.put_along_axis(result, worst_first, index + 1.0, axis=1)
        return result
    last = np.ones(values.shape, dtype=bool)
    last[:, :-1] = new[:, 1:]
    lowest = np.maximum.accumulate(np.where(new, index, 0), axis=1)
    highest = np.minimum.accumulate(np.where(last, index, width)[:, ::-1], axis=1)[:, ::-1]
    np.put_along_axis(result, worst_first, (lowest + highest) / 2 + 1, axis=1)
    return result


@dataclass(frozen=True)
class RankSum:
    """Sum of the ranks under each reward among the candidates still alive (as TTSnap combines several rewards)."""

    def __call__(self, rewards: FloatArray, alive: BoolArray) -> FloatArray:
        """One number [prompts, candidates] from rewards [prompts, candidates, rewards], NaN where not alive."""
        if rewards.shape[-1] == 1:
            return rewards[..., 0]
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


def kendall_tau(values: FloatArray, targets: FloatArray) -> FloatArray:
    """Kendall's tau-b [prompts] between values and targets [prompts, candidates]; NaN where either is constant.

    tau = sum_ij sgn(v_i - v_j) sgn(t_i - t_j) / sqrt(number of pairs not tied in v x number not tied in t).
    """
    v, t = (np.sign(x[:, :, None] - x[:, None, :]) for x in (values, targets))
    norm = np.sqrt((v != 0).sum((1, 2)) * (t != 0).sum((1, 2)).astype(float))
    return np.asarray(np.divide((v * t).sum((1, 2)), norm, out=np.full(len(v), np.nan), where=norm > 0))


def mean_and_error(values: FloatArray) -> tuple[float | None, float | None]:
    """Mean of those values [n] that are numbers, and its standard error; None where they are too few for it."""
    known = values[np.isfinite(values)]
    if not len(known):
        return None, None
    return float(known.mean()), float(known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else None
