"""The order of noise levels, and the learning rate along it."""

from __future__ import annotations

import math
from typing import NamedTuple

from ttsnap.recordings.image_tree import ImageTree
from ttsnap.training.config import Config


class Level(NamedTuple):
    """One stage of the curriculum: the x0 estimates after `call` denoiser calls, at noise level `sigma`."""

    call: int
    sigma: float

    @property
    def file(self) -> str:
        """Name of its weights."""
        return f"sigma-{self.sigma:.6f}.safetensors"


def levels_of(tree: ImageTree, calls: tuple[int, ...] | None) -> list[Level]:
    """The levels to learn, from clean to noisy.

    Args:
        tree: tells the noise level after each call.
        calls: which calls (default: those from three quarters of the way down to the first; 15 to 1 of 20).

    Raises:
        ValueError: the tree has no images after such a call, or does not know its noise levels.
    """
    if calls is None:
        calls = tuple(call for call in tree.calls if call <= 0.75 * tree.num_steps)
    for call in calls:
        if call not in tree.calls or call == tree.num_steps:
            known = ", ".join(map(str, tree.calls[:-1]))
            raise ValueError(f"{tree.root} has no x0 estimates after call {call}; levels can be {known}")
        if not math.isfinite(tree.sigmas[call - 1]):
            raise ValueError(f"{tree.root} does not tell its noise levels; record it with `ttsnap record`")
    if not calls:
        raise ValueError(f"{tree.root} holds finished images only; there is no level to learn")
    return [Level(call, tree.sigmas[call - 1]) for call in sorted(set(calls), reverse=True)]


def learning_rate(config: Config, stage: int, update: int, updates: int) -> float:
    """The learning rate of an update of a level: a linear rise, then decay to a floor.

    Args:
        config: peak, scale across levels, shape.
        stage: number of the level, from 0.
        update: number of the update in the level, from 0.
        updates: of the level.
    """
    peak = config.learning_rate * config.level_scale**stage
    warm = round(config.warmup * updates)
    if update < warm:
        return peak * (update + 1) / (warm + 1)
    t = (update - warm) / max(1, updates - warm)
    if config.schedule == "exponential":
        return float(peak * config.floor**t)
    shape = 1 - t if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * t))
    return peak * (config.floor + (1 - config.floor) * shape)
