"""Feynman-Kac steering: particles are resampled by their rewards on the way (sequential Monte Carlo)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ttsnap.core.grid import FloatArray, Problem, Query, Rung, Search
from ttsnap.policies.places import RESAMPLING, placed
from ttsnap.policies.rungs import check_rungs, steps_of

POTENTIALS = ("max", "difference", "sum")


@dataclass(frozen=True)
class Steering:
    """FK steering (Singhal et al., 2025, arXiv 2501.06848), also SMC as in Wu et al. (2023, arXiv 2306.17775).

    At each rung every particle gets the weight G = exp(strength x f), where f is its highest reward so far (`max`), the
    sum of its rewards so far (`sum`), or how much the reward rose since the last rung (`difference`), and N particles
    are drawn with probability G / sum G. A particle that is drawn again begins a child in the place of one that is not
    drawn. The original lets a stochastic sampler part the copies; here their noise is rotated.

    Attributes:
        rungs: steps (denoiser calls made, ascending) at which particles are resampled, or shares of the steps.
        strength: lambda, per standard deviation of the rewards of the prompt's particles.
        potential: max, difference or sum.
        angle: degrees by which the noise of copies is rotated.
        resampling: systematic, stratified, multinomial or residual.
        threshold: only prompts whose effective sample size 1 / sum w^2 is below this share of N are resampled; 1: all.
    """

    rungs: tuple[float, ...] = (0.15, 0.3, 0.45, 0.6)
    strength: float = 2.0
    potential: str = "max"
    angle: float = 45.0
    resampling: str = "systematic"
    threshold: float = 1.0

    RANGES: ClassVar = {"rungs": (0.05, 0.85), "strength": (0.5, 8.0), "angle": (10.0, 90.0)}

    def __post_init__(self) -> None:
        check_rungs(self.rungs)
        for name, value, known in (
            ("a potential", self.potential, POTENTIALS),
            ("resampling", self.resampling, tuple(RESAMPLING)),
        ):
            if value not in known:
                raise ValueError(f"{name} is {', '.join(known)}, got {value!r}")
        if not (self.strength >= 0 and self.threshold > 0):
            raise ValueError(
                "strength must be at least 0 and the threshold of the effective sample size above 0, "
                f"got {self.strength} and {self.threshold}"
            )

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Look, resample, go on; all particles are finished."""
        everybody = np.ones(problem[:2], dtype=bool)
        rewards: list[FloatArray] = []
        for rung in self._rungs(problem.num_candidates, problem.num_steps):
            rewards.append((yield Query(everybody, rung)))
            weights = self._weights(rewards)
            drawn = RESAMPLING[self.resampling](weights, rng)
            effective = 1 / (weights**2).sum(axis=1) / problem.num_candidates
            drawn[effective > self.threshold] = 1
            fork = placed(drawn, rung, self.angle)
            rewards = [fork.from_parents(known) for known in rewards]
            if fork.children.any():
                yield fork
        yield Query(everybody, problem.num_steps)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """All particles at every rung and at the end."""
        return tuple(Rung(step, num_candidates) for step in (*self._rungs(num_candidates, num_steps), num_steps))

    def _rungs(self, count: int, num_steps: int) -> tuple[int, ...]:
        """Steps to look at; of one particle there is nothing to resample."""
        steps = tuple(step for _, step in steps_of(self.rungs, num_steps))
        return steps if count > 1 else ()

    def _weights(self, rewards: list[FloatArray]) -> FloatArray:
        """Weights [prompts, candidates] that sum to one."""
        now = rewards[-1]
        if self.potential == "max":
            value = np.max(rewards, axis=0)
        elif self.potential == "sum":
            value = np.sum(rewards, axis=0)
        else:
            value = now - rewards[-2] if len(rewards) > 1 else now
        spread = np.maximum(now.std(axis=1, keepdims=True), 1e-12)
        exponent = self.strength * (value - value.max(axis=1, keepdims=True)) / spread
        weights = np.exp(exponent)
        shares: FloatArray = weights / weights.sum(axis=1, keepdims=True)
        return shares
