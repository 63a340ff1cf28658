"""Feynman-Kac steering: particles are resampled by their rewards on the way (sequential Monte Carlo)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttsnap.core.grid import BoolArray, FloatArray, Fork, IntArray, Problem, Query, Rung, Search
from ttsnap.policies.successive_halving import check_rungs

POTENTIALS = ("max", "difference", "sum")
SHARES = (0.15, 0.3, 0.45, 0.6)


def rungs_of(
    rungs: tuple[int, ...] | None, num_steps: int, shares: tuple[float, ...] = SHARES
) -> list[tuple[int, int]]:
    """Index and step of each rung: those given, or shares of the steps; of several at one step the last.

    Raises:
        ValueError: a rung is not below `num_steps`.
    """
    if rungs is not None:
        check_rungs(rungs, num_steps)
        return list(enumerate(rungs))
    steps = {max(1, round(share * num_steps)): index for index, share in enumerate(shares)}
    return [(index, step) for step, index in steps.items() if step < num_steps]


@dataclass(frozen=True)
class Steering:
    """FK steering (Singhal et al., 2025, arXiv 2501.06848), also SMC as in Wu et al. (2023, arXiv 2306.17775).

    At each rung every particle gets the weight G = exp(strength x f), where f is its highest reward so far (`max`), the
    sum of its rewards so far (`sum`), or how much the reward rose since the last rung (`difference`), and N particles
    are drawn with probability G / sum G (systematic resampling). A particle that is drawn again begins a child in the
    place of one that is not drawn. The original lets a stochastic sampler part the copies; here their noise is rotated.

    Attributes:
        rungs: steps (denoiser calls made, ascending) at which particles are resampled; None: at 15, 30, 45 and 60 %.
        strength: lambda, per standard deviation of the rewards of the prompt's particles.
        potential: max, difference or sum.
        angle: degrees by which the noise of copies is rotated.
    """

    rungs: tuple[int, ...] | None = None
    strength: float = 2.0
    potential: str = "max"
    angle: float = 45.0

    def __post_init__(self) -> None:
        check_rungs(self.rungs or ())
        if self.potential not in POTENTIALS:
            raise ValueError(f"a potential is {', '.join(POTENTIALS)}, got {self.potential!r}")
        if not self.strength >= 0:
            raise ValueError(f"strength must be at least 0, got {self.strength}")

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Look, resample, go on; all particles are finished."""
        everybody = np.ones(problem[:2], dtype=bool)
        rewards: list[FloatArray] = []
        for rung in self._rungs(problem.num_candidates, problem.num_steps):
            rewards.append((yield Query(everybody, rung)))
            parents = systematic(self._weights(rewards), rng)
            fork = placed(parents, rung, self.angle)
            rewards = [fork.from_parents(known) for known in rewards]
            yield fork
        yield Query(everybody, problem.num_steps)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """All particles at every rung and at the end."""
        return tuple(Rung(step, num_candidates) for step in (*self._rungs(num_candidates, num_steps), num_steps))

    def _rungs(self, count: int, num_steps: int) -> tuple[int, ...]:
        """Steps to look at; of one particle there is nothing to resample."""
        steps = tuple(step for _, step in rungs_of(self.rungs, num_steps))
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


def systematic(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """How often each particle is drawn [prompts, candidates], by systematic resampling of as many as there are."""
    rows, count = weights.shape
    points = np.tile((rng.random() + np.arange(count)) / count, (rows, 1))  # the same for all: rows do not meet
    edges = np.cumsum(weights, axis=1)
    edges[:, -1] = 1.0
    below = (points[:, None, :] < edges[:, :, None]).sum(axis=2)
    times: IntArray = np.diff(below, axis=1, prepend=0)
    return times


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
