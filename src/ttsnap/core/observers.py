"""Watching a search, and stopping it: what the driver and the environment tell while they work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ttsnap.core.cost import CostModel, Ledger
from ttsnap.core.grid import BoolArray, FloatArray, Fork, IntArray, Policy, Problem, Query, Rung


class Stop(Exception):
    """Raised by an observer, or by the person who picks candidates: end the search and keep what is finished.

    It is no error: the driver ends the policy and returns a result that says `stopped`. Denoiser calls whose outcome is
    dropped stay charged.
    """


class Interrupted(Stop):
    """How an environment answers when it is stopped in the middle of a query.

    Attributes:
        answered: those of the query that it got to [prompts, candidates].
        rewards: their rewards [prompts, candidates, rewards], NaN for the others.
        lost: denoiser calls made for nothing [prompts].
    """

    def __init__(self, answered: BoolArray, rewards: FloatArray, lost: IntArray) -> None:
        super().__init__("the search was stopped")
        self.answered = answered
        self.rewards = rewards
        self.lost = lost


class Start(NamedTuple):
    """What is known before the first denoiser call.

    Attributes:
        prompts: one per row of the grid.
        seeds: seeds [prompts, candidates].
        problem: size of the grid.
        policy: what will ask.
        plan: sizes per rung for one prompt; an upper bound where they depend on rewards.
        cost_model: what a call, a decode and a look cost.
        rewards: names of the rewards.
        budget: as the user gave it, if so.
        pictures: small x0 previews [h, w, 3] (uint8) by (prompt, candidate, step); fills while the search runs. A look
            need not leave one.
    """

    prompts: Sequence[str]
    seeds: IntArray
    problem: Problem
    policy: Policy
    plan: tuple[Rung, ...]
    cost_model: CostModel
    rewards: Sequence[str]
    budget: str | None
    pictures: Mapping[tuple[int, int, int], np.ndarray]


class Look(NamedTuple):
    """What the driver saw at one query.

    `alive` [prompts, candidates] was asked about at `step`; `rewards` [prompts, candidates, rewards] are what the
    environment answered and `combined` [prompts, candidates] what the policy was told, both NaN where not asked.
    Of a `draft`, `step` is the number of its own steps.
    """

    step: int
    alive: BoolArray
    rewards: FloatArray
    combined: FloatArray
    draft: bool = False


class Seen(NamedTuple):
    """One look at one candidate; `kept` tells whether it went on, or at the last step whether it won.

    `wins`: it is the winner, or became it by forks. Of a `draft`, `step` is the number of its own steps.
    """

    step: int
    reward: float
    kept: bool
    picture: Any = None
    wins: bool = False
    draft: bool = False


@dataclass(frozen=True)
class Result:
    """The choice of a search and what it cost.

    Attributes:
        chosen: index of the chosen candidate [prompts]; -1 where the search was stopped before one was finished.
        rewards: its rewards on the finished image [prompts, rewards]; NaN where there is none.
        finished: candidates that reached the last step [prompts, candidates].
        ledger: calls, decodes and looks per prompt.
        history: every look in order (empty if the driver was told not to keep it).
        stopped: an observer, or the person who picked, ended it before the policy did.
        forks: children that were begun, each after so many of the looks in `history`.
    """

    chosen: IntArray
    rewards: FloatArray
    finished: BoolArray
    ledger: Ledger
    history: list[Look] = field(repr=False, default_factory=list)
    stopped: bool = False
    forks: list[tuple[int, Fork]] = field(repr=False, default_factory=list)


class Observer:
    """Is told what a search does, in this order: started, then for each query asked, called, judged, looked; ended.

    The base class does nothing; override what is of interest. All methods run in the thread of the search, between its
    denoiser calls, and may raise `Stop` (from `ended` it has no effect).
    """

    def started(self, start: Start) -> None:
        """The search begins, or goes on with the same grid after it had ended."""

    def asked(self, query: Query) -> None:
        """The policy's next question. Who was looked at last and is not in it was cut, at least for now."""

    def forked(self, fork: Fork) -> None:
        """Children have taken their places."""

    def called(self, calls: int) -> None:
        """So many candidates had one denoiser call each."""

    def judged(self, step: int, rewards: FloatArray) -> None:
        """One more batch of the candidates asked about is judged.

        Args:
            step: denoiser calls made.
            rewards: what is known of the answer so far [prompts, candidates, rewards]; NaN elsewhere.
        """

    def looked(self, look: Look, ledger: Ledger) -> None:
        """The whole query is answered and charged."""

    def ended(self, result: Result) -> None:
        """The policy has ended, by itself or because it was stopped, and the winner is chosen."""


SILENT = Observer()


def spread(calls: int, rows: IntArray, num_prompts: int) -> IntArray:
    """Denoiser calls per prompt [num_prompts] of `calls` made in turn for candidates of the prompts `rows` [n]."""
    counts = np.full(len(rows), calls // max(1, len(rows)))
    counts[: calls - int(counts.sum())] += 1
    result = np.zeros(num_prompts, dtype=np.int64)
    np.add.at(result, rows, counts)
    return result
