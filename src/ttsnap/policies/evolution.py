"""Evolution: a population of noises is judged by where they lead, and the fit have mutated children."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ttsnap.core.grid import Problem, Query, Rung, Search
from ttsnap.core.ranking import order
from ttsnap.policies.places import children_at, only
from ttsnap.policies.rungs import check_rungs, step_of, steps_of


@dataclass(frozen=True)
class Evolution:
    """EvoSearch (He et al., 2025, arXiv 2505.17618); with `band` in the manner of spectral evolution search.

    A population of K waits at a rung, while a twin of each (a fork of 0 degrees) goes on to `look`, whose reward is the
    fitness. The best `elite` x K stay; the others give way to children of parents that won a tournament of two, with
    their noise rotated by `angle`. Then the population moves to the next rung. The fittest twin of all generations is
    finished. Initial noise and latents on the way are mutated by the same rotation; the original finishes every
    individual to judge it. N places hold K = (N - 1) // 2.

    Attributes:
        rungs: steps (denoiser calls made, ascending) at which the population waits, or shares; one generation each.
        look: denoiser calls after which twins are judged, or that share of the steps; beyond the rungs.
        elite: share of the population that stays as it is.
        angle: degrees by which children differ.
        band: frequencies of the noise that mutate, such as 0, .25 for the layout; None: all.
    """

    rungs: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    look: float = 0.45
    elite: float = 0.4
    angle: float = 35.0
    band: tuple[float, float] | None = None

    RANGES: ClassVar = {"rungs": (0.05, 0.5), "look": (0.2, 0.8), "elite": (0.1, 0.9), "angle": (10.0, 90.0)}

    def __post_init__(self) -> None:
        check_rungs(self.rungs)
        check_rungs((self.look,))
        if not self.rungs or not 0 < self.elite <= 1:
            raise ValueError(f"evolution takes a rung or more, and an elite above 0 and at most 1, got {self.elite}")

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Generation by generation; then finish the fittest."""
        shape, steps, every = problem[:2], problem.num_steps, np.arange(problem.num_prompts)
        size, (rungs, look) = self._size(problem.num_candidates), self._steps(steps)
        if size < 2:
            yield Query(np.ones(shape, dtype=bool), steps)
            return
        population, twins, best = np.arange(size), np.arange(size, 2 * size), 2 * size
        record = np.full(problem.num_prompts, -np.inf)
        for generation, step in enumerate(rungs):
            yield Query(only(shape, population), step)
            yield children_at(shape, twins, population, step)
            fitness = (yield Query(only(shape, twins), look))[:, twins]
            top = fitness.argmax(axis=1)
            better = fitness[every, top] > record
            record = np.where(better, fitness[every, top], record)
            if better.any():
                yield children_at(shape, [best], twins[top][:, None], look, rows=better)
            elite = max(1, round(self.elite * size))
            if generation + 1 == len(rungs) or elite == size:
                continue
            pairs = rng.integers(size, size=(2, size - elite))
            winners = np.where(fitness[:, pairs[0]] >= fitness[:, pairs[1]], pairs[0], pairs[1])
            ranked = order(fitness, np.ones_like(fitness, dtype=bool))
            parents = np.full(shape, -1)
            np.put_along_axis(parents, ranked[:, elite:], winners, axis=1)
            places = np.arange(problem.num_candidates)
            yield children_at(shape, places, parents, step, self.angle, band=self.band)
        yield Query(only(shape, best), steps)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """The population at each rung, its twins at the look, and the one that is finished."""
        size, (rungs, look) = self._size(num_candidates), self._steps(num_steps)
        if size < 2:
            return (Rung(num_steps, num_candidates),)
        stages = ((Rung(step, size), Rung(look, size), Rung(step, 0)) for step in rungs)
        return (*itertools.chain(*stages), Rung(look, 0), Rung(num_steps, 1))

    def _size(self, count: int) -> int:
        """Of the population."""
        return (count - 1) // 2

    def _steps(self, num_steps: int) -> tuple[list[int], int]:
        """Where the population waits, and where twins are judged."""
        look = max(2, step_of(self.look, num_steps))
        return [step for _, step in steps_of(self.rungs, num_steps) if step < look] or [1], look
