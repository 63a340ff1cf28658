"""Sets of images that are good and different, chosen while candidates are pruned and at the end.

As in group inference (Park et al., 2025, arXiv 2508.15773): of the candidates of a prompt, the K are chosen that
maximise the quadratic program

    sum_i u_i x_i + weight sum_(i<j) d_ij x_i x_j / (K - 1),     x_i in {0, 1}, sum_i x_i = K

where u is the reward in standard deviations among the candidates, and d the distance of their pictures, in units of
its mean. Pictures are compared as 8 x 8 pixels, of which what all candidates share is taken out. At a rung the order in
which a greedy solution takes candidates decides who goes on, so that every set of survivors is good and different.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ttsnap.core.grid import BoolArray, Combine, FloatArray

SIDE = 8
MOST = 20_000  # sets that are tried one by one; beyond, members of the greedy one are exchanged


@dataclass(frozen=True)
class Different:
    """Combined rewards that put candidates in the order in which a good and different set takes them.

    Attributes:
        combine: several rewards -> one number.
        thumbnails: of each candidate's last look, by prompt and candidate.
        weight: of the distance.
    """

    combine: Combine
    thumbnails: Mapping[tuple[int, int], np.ndarray]
    weight: float = 1.0

    def __call__(self, rewards: FloatArray, alive: BoolArray) -> FloatArray:
        """How many candidates are taken later [prompts, candidates]; NaN where not alive."""
        values = self.combine(rewards, alive)
        places = np.full(values.shape, np.nan)
        for p, row in enumerate(alive):
            who = np.flatnonzero(row)
            if len(who):
                good, far = self._terms(p, who, values[p])
                places[p, who[greedy(good, far, self.weight)]] = np.arange(len(who))[::-1]
        return places

    def choose(self, p: int, finished: BoolArray, values: FloatArray, size: int) -> list[int]:
        """The best set of a prompt's finished candidates, its best image first.

        Args:
            p: row of the prompt.
            finished: who may be chosen [candidates].
            values: combined rewards [candidates].
            size: of the set.
        """
        who = np.flatnonzero(finished)
        good, far = self._terms(p, who, values)
        members = who[best_set(good, far, min(size, len(who)), self.weight)]
        return [int(c) for c in sorted(members, key=lambda c: (-values[c], c))]

    def _terms(self, p: int, who: np.ndarray, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Rewards [n] and distances [n, n] of some candidates, on one scale each."""
        mine = values[who]
        features = np.stack([self.thumbnails[p, int(c)] for c in who]).reshape(len(who), -1).astype(float)
        return (mine - mine.mean()) / max(float(mine.std()), 1e-12), distances(features)


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """A picture [h, w, 3] as 8 x 8 pixels, 0..1."""
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32) / 255


def distances(features: FloatArray) -> FloatArray:
    """Distances [n, n] of features [n, d], in units of their mean."""
    apart = features - features.mean(axis=0)
    squares = (apart**2).sum(axis=1)
    far: FloatArray = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * apart @ apart.T, 0))
    count = len(features)
    far /= max(float(far.sum()) / max(1, count * (count - 1)), 1e-12)
    return far


def worth(good: FloatArray, far: FloatArray, members: list[int], weight: float) -> float:
    """The objective of the quadratic program for one set."""
    pairs = far[np.ix_(members, members)].sum() / 2
    return float(good[members].sum() + weight * pairs / max(1, len(members) - 1))


def greedy(good: FloatArray, far: FloatArray, weight: float) -> list[int]:
    """All candidates, in the order in which they add most to those taken before; the best first."""
    taken = [int(np.argmax(good))]
    while len(taken) < len(good):
        gain = good + weight * far[:, taken].mean(axis=1)
        gain[taken] = -np.inf
        taken.append(int(np.argmax(gain)))
    return taken


def best_set(good: FloatArray, far: FloatArray, size: int, weight: float) -> list[int]:
    """The members of the best set of a size: all are tried, or the greedy one is improved by exchanges."""
    count = len(good)
    if math.comb(count, size) <= MOST:
        sets = itertools.combinations(range(count), size)
        return list(max(sets, key=lambda members: worth(good, far, list(members), weight)))
    members = greedy(good, far, weight)[:size]
    best, improved = worth(good, far, members, weight), True
    while improved:
        improved = False
        for place, other in itertools.product(range(size), sorted(set(range(count)) - set(members))):
            if other in members:
                continue
            trial = [*members[:place], other, *members[place + 1 :]]
            if (value := worth(good, far, trial, weight)) > best + 1e-12:
                members, best, improved = trial, value, True
    return members
