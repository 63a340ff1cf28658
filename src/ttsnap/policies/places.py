"""Where children go: forks into places of the grid, and how often particles are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ttsnap.core.grid import BoolArray, FloatArray, Fork, IntArray


def only(shape: tuple[int, int], places: Any, rows: BoolArray | None = None) -> BoolArray:
    """A mask [prompts, candidates] of some places, of all prompts or of some."""
    mask = np.zeros(shape, dtype=bool)
    mask[:, places] = True
    return mask if rows is None else mask & rows[:, None]


def children_at(
    shape: tuple[int, int],
    places: Any,
    parents: Any,
    step: int,
    angle: Any = 0.0,
    *,
    rows: BoolArray | None = None,
    band: tuple[float, float] | None = None,
    back: int = 0,
) -> Fork:
    """A fork into places [n] from parents [n] or [prompts, n], by one angle or [n].

    Args:
        shape: prompts and candidates.
        places: where the children go.
        parents: where they come from; -1: none.
        step: denoiser calls made by the parents.
        angle: degrees; NaN: the forward process's.
        rows: prompts that fork [prompts]; None: all.
        band: frequencies that are rotated.
        back: calls that are made again.
    """
    where, angles = np.full(shape, -1), np.zeros(shape)
    where[:, places] = parents
    if rows is not None:
        where[~rows] = -1
    angles[:, places] = angle
    return Fork(where, step, np.where(where >= 0, angles, 0.0), band, back)


def placed(drawn: IntArray, step: int, angle: float, places: BoolArray | None = None) -> Fork:
    """The fork that gives particles drawn more than once their further children, in the places of those not drawn.

    Args:
        drawn: how often each candidate is drawn [prompts, candidates].
        step: denoiser calls made.
        angle: degrees.
        places: where children may go [prompts, candidates] (default: wherever nobody was drawn).
    """
    parents = np.full(drawn.shape, -1)
    for row, times in enumerate(drawn):
        free = np.flatnonzero(times == 0 if places is None else places[row])
        children = np.repeat(np.arange(len(times)), np.maximum(times - 1, 0))
        parents[row, free[: len(children)]] = children[: len(free)]
    return Fork(parents, step, np.where(parents >= 0, float(angle), 0.0))


# Resampling: weights [prompts, particles] that sum to one -> how often each is drawn, as many as there are. All prompts
# share the random numbers, so that none depends on the company it is searched in.


def systematic(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Points at equal distances, with one common shift."""
    return _counted(weights, (rng.random() + np.arange(weights.shape[1])) / weights.shape[1])


def stratified(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """One point in each of as many equal strata."""
    count = weights.shape[1]
    return _counted(weights, (rng.random(count) + np.arange(count)) / count)


def multinomial(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Independent draws."""
    return _counted(weights, np.sort(rng.random(weights.shape[1])))


def residual(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Each as often as the whole part of its share says; the rest by independent draws."""
    count = weights.shape[1]
    whole = np.floor(count * weights + 1e-9).astype(np.int64)
    rest: FloatArray = count * weights - whole
    points: FloatArray = np.asarray(rng.random(count))
    for row, missing in enumerate(count - whole.sum(axis=1)):
        if missing:
            share: FloatArray = np.clip(rest[row : row + 1], 0, None)
            whole[row] += _counted(share / share.sum(), np.sort(points[:missing]))[0]
    drawn: IntArray = whole
    return drawn


def _counted(weights: FloatArray, points: FloatArray) -> IntArray:
    """How many points in [0, 1) fall on each weight, laid end to end."""
    edges = np.cumsum(weights, axis=1)
    edges[:, -1] = 1.0
    below = (points[None, None, :] < edges[:, :, None]).sum(axis=2)
    times: IntArray = np.diff(below, axis=1, prepend=0)
    return times


RESAMPLING: dict[str, Callable[[FloatArray, np.random.Generator], IntArray]] = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
    "residual": residual,
}
