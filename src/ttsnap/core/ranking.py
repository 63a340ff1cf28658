"""Ranks, ties and choices over the candidates of each prompt.

Everything works on rows of [prompts, candidates] arrays at once. Higher is better, ties go to the lower index, and NaN
means "not observed": it ranks below every number. Rewards are finite; the driver sees to that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ttsnap.core.grid import BoolArray, Combine, FloatArray, IntArray


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

    def said(self, names: Sequence[str]) -> str:
        """In words, of rewards with these names."""
        return "rank sum" if len(names) > 1 else "one reward"

    def is_order(self, count: int) -> bool:
        """Whether the better of two candidates is the same in any company, for so many rewards."""
        return count == 1


@dataclass(frozen=True)
class WeightedSum:
    """Weighted sum of the rewards; `weights` one per reward."""

    weights: Sequence[float]

    def __call__(self, rewards: FloatArray, alive: BoolArray) -> FloatArray:
        """One number [prompts, candidates] from rewards [prompts, candidates, rewards]."""
        return np.where(alive, rewards @ _weights(self.weights, rewards), np.nan)

    def said(self, names: Sequence[str]) -> str:
        """In words, of rewards with these names."""
        return "weighted sum"

    def is_order(self, count: int) -> bool:
        """Whether the better of two candidates is the same in any company, for so many rewards."""
        return True


def worth(combine: Combine, rewards: FloatArray) -> FloatArray:
    """What images are worth in any company: numbers [..., aims] that are to be raised, of rewards [..., rewards].

    Each reward is an aim; or one number is, where a rule has weights; of bounds it is the rewards that are optimised,
    and last how far the bounds are missed, below zero.
    """
    if isinstance(combine, WeightedSum):
        return rewards @ _weights(combine.weights, rewards)[:, None]
    if isinstance(combine, Minimum) and combine.weights is not None:
        least: FloatArray = (rewards * _weights(combine.weights, rewards)).min(axis=-1, keepdims=True)
        return least
    if isinstance(combine, Constrained):
        aims = worth(combine.combine, rewards[..., list(combine.objectives)])
        return np.concatenate([aims, -combine.shortfall(rewards)[..., None]], axis=-1)
    return rewards


@dataclass(frozen=True)
class Minimum:
    """The least of the ranks among the candidates still alive, or of the weighted rewards: an image with no weak side.

    Of two candidates with the same least rank the one with the higher sum of ranks is the better.

    Attributes:
        weights: one per reward, to bring them to one scale; None: ranks are compared.
    """

    weights: Sequence[float] | None = None

    def __call__(self, rewards: FloatArray, alive: BoolArray) -> FloatArray:
        """One number [prompts, candidates] from rewards [prompts, candidates, rewards], NaN where not alive."""
        if self.weights is not None:
            return np.where(alive, (rewards * _weights(self.weights, rewards)).min(axis=-1), np.nan)
        count = rewards.shape[-1]
        if count == 1:
            return rewards[..., 0]
        each = np.stack([ranks(rewards[..., i], alive) for i in range(count)], axis=-1)
        largest = count * alive.shape[1] + 1.0  # no sum of ranks reaches it, and ranks differ by halves at least
        least: FloatArray = each.min(axis=-1) + each.sum(axis=-1) / (2 * largest)
        return least

    def said(self, names: Sequence[str]) -> str:
        """In words, of rewards with these names."""
        return "minimum" if self.weights is None else "minimum of weighted rewards"

    def is_order(self, count: int) -> bool:
        """Whether the better of two candidates is the same in any company, for so many rewards."""
        return count == 1 or self.weights is not None


class Bound(NamedTuple):
    """A limit that a reward (its place among the rewards) is to keep: at least, or at most."""

    reward: int
    sign: str
    value: float

    def shortfall(self, rewards: FloatArray) -> FloatArray:
        """By how much it is missed [prompts, candidates], relative to it; 0 where it is kept."""
        missing = self.value - rewards[..., self.reward]
        return np.maximum(missing if self.sign == ">=" else -missing, 0) / (abs(self.value) or 1.0)

    def said(self, names: Sequence[str]) -> str:
        """In words, of rewards with these names."""
        return f"{names[self.reward]}{self.sign}{self.value:g}"


@dataclass(frozen=True)
class Constrained:
    """Some rewards, subject to bounds: candidates that keep all bounds rank before those that miss one, by how little.

    No candidate is dropped for a bound alone: where too few keep them for a rung, those that miss by least go on.

    Attributes:
        objectives: places of the rewards that are optimised.
        bounds: to be kept.
        combine: how several objectives become one number.
    """

    objectives: tuple[int, ...]
    bounds: tuple[Bound, ...]
    combine: RankSum | WeightedSum = field(default_factory=RankSum)

    def __call__(self, rewards: FloatArray, alive: BoolArray) -> FloatArray:
        """One number [prompts, candidates] from rewards [prompts, candidates, rewards], NaN where not alive."""
        values = self.combine(rewards[..., list(self.objectives)], alive)
        missed = self.shortfall(rewards)
        lowest = np.where(alive, values, np.inf).min(axis=1, keepdims=True)
        return np.where(alive, np.where(missed > 0, lowest - 1 - missed, values), np.nan)

    def said(self, names: Sequence[str]) -> str:
        """In words, of rewards with these names."""
        bounds = " and ".join(bound.said(names) for bound in self.bounds)
        return f"{','.join(names[i] for i in self.objectives)} where {bounds}"

    def shortfall(self, rewards: FloatArray) -> FloatArray:
        """By how much the bounds are missed [...], relative to each, added up, of rewards [..., rewards]."""
        missed: FloatArray = np.sum([bound.shortfall(rewards) for bound in self.bounds], axis=0)
        return missed

    def missed(self, rewards: FloatArray) -> list[Bound]:
        """The bounds that rewards [rewards] of one candidate do not keep."""
        return [bound for bound in self.bounds if bound.shortfall(rewards) > 0]

    def is_order(self, count: int) -> bool:
        """Whether the better of two candidates is the same in any company, for so many rewards."""
        return self.combine.is_order(len(self.objectives))


Rule = RankSum | WeightedSum | Minimum | Constrained
RULES = "rank-sum, weighted-sum, minimum, or such as 'hpsv2 where vqascore>=.8'"


def read_rule(text: str | None, names: Sequence[str], weights: Sequence[float] | None = None) -> Rule:
    """How several rewards become one number.

    Args:
        text: `rank-sum` (default), `weighted-sum` (default with weights), `minimum`, or `A,B where C>=.8 and D<=2`.
        names: of the rewards, in their order.
        weights: one per reward, or per objective where there are bounds.

    Raises:
        ValueError: what is wrong with it.
    """
    text = (text or ("rank-sum" if weights is None else "weighted-sum")).strip()
    kind = text.replace(" ", "-")
    objectives, _, bounds = text.partition(" where ")
    used = [_place(name, names) for name in objectives.split(",")] if bounds else list(range(len(names)))
    if weights is not None and len(weights) != len(used):
        wanted = ", ".join(names[i] for i in used)
        raise ValueError(f"{len(used)} rewards ({wanted}) need as many weights, got {len(weights)}")
    if bounds:
        limits = tuple(_bound(part, names) for part in re.split(r"\s+and\s+", bounds))
        if idle := [names[i] for i in range(len(names)) if i not in used and i not in [b.reward for b in limits]]:
            raise ValueError(f"combine {text!r} says nothing of the reward {idle[0]}")
        return Constrained(tuple(used), limits, RankSum() if weights is None else WeightedSum(tuple(weights)))
    if kind == "minimum":
        return Minimum(None if weights is None else tuple(weights))
    if kind == "rank-sum" and weights is None:
        return RankSum()
    if kind == "weighted-sum" and weights is not None:
        return WeightedSum(tuple(weights))
    if kind in ("rank-sum", "weighted-sum"):
        raise ValueError("weights belong to weighted-sum, which needs them, or to minimum, and not to rank-sum")
    raise ValueError(f"unknown combine {text!r}; it can be {RULES}")


def _bound(text: str, names: Sequence[str]) -> Bound:
    found = re.fullmatch(r"(.+?)\s*(>=|<=)\s*(\S+)", text.strip())
    try:
        if not found or not np.isfinite(value := float(found[3])):
            raise ValueError
    except ValueError:
        raise ValueError(f"a bound is such as vqascore>=.8 or clipscore<=30, got {text.strip()!r}") from None
    return Bound(_place(found[1], names), found[2], value)


def _place(name: str, names: Sequence[str]) -> int:
    """Where a reward stands; a noise-aware one may go by the name of its clean reward."""
    name = name.strip()
    found = [i for i, known in enumerate(names) if name == known]
    found = found or [i for i, known in enumerate(names) if name == known.partition("+")[0]]
    if len(found) != 1:
        raise ValueError(f"combine names the reward {name!r}; there is {', '.join(names)}")
    return found[0]


def said(combine: Combine, names: Sequence[str]) -> str:
    """How rewards with these names are combined, in words."""
    tell = getattr(combine, "said", None)
    return str(tell(names)) if tell else getattr(combine, "__name__", type(combine).__name__)


def _weights(weights: Sequence[float], rewards: FloatArray) -> FloatArray:
    """One per reward."""
    if len(weights) != rewards.shape[-1]:
        raise ValueError(f"{rewards.shape[-1]} rewards need as many weights, got {len(weights)}")
    return np.asarray(weights, dtype=float)


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
