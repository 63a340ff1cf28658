"""Hand-picked: at each rung a person decides which candidates go on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ttsnap.core.grid import BoolArray, FloatArray, IntArray, Policy, Problem, Query, Rung, Search
from ttsnap.core.ranking import top
from ttsnap.policies.places import placed
from ttsnap.policies.successive_halving import SuccessiveHalving


class Proposal(NamedTuple):
    """What the person who picks is shown.

    Attributes:
        step: denoiser calls made.
        next_step: where those who go on are brought to.
        alive: who was looked at [prompts, candidates].
        rewards: combined rewards [prompts, candidates], NaN where not alive.
        keep: who would go on by the rewards [prompts, candidates].
    """

    step: int
    next_step: int
    alive: BoolArray
    rewards: FloatArray
    keep: BoolArray


class Picked(NamedTuple):
    """What the person answers where something is to be made like a candidate.

    Attributes:
        keep: who goes on [prompts, candidates]; those dropped earlier may come back.
        more: how many children each of them has [prompts, candidates], in the places of those who do not go on.
    """

    keep: BoolArray
    more: IntArray


Pick = Callable[[Proposal], BoolArray | Picked]
"""Answers which candidates go on [prompts, candidates], or with more like some of them. May raise `Stop`."""


def agree(proposal: Proposal) -> BoolArray:
    """Pick what the rewards propose."""
    return proposal.keep


@dataclass(frozen=True)
class HandPicked:
    """Look where another policy looks; it proposes the best, and `pick` decides.

    With `agree` it is that policy, if that drops all but the best by a fixed plan, as halving does. Where somebody
    keeps more or fewer, the share that its plan keeps at the next rung is proposed again; who keeps more than proposed
    pays more than planned. More like a candidate are forks of it, which take the places of dropped ones.

    Attributes:
        proposer: its plan says where to look and how many to propose.
        pick: decides; not part of the record.
        angle: degrees by which the noise of more like a candidate differs from its own.
    """

    proposer: Policy = field(default_factory=SuccessiveHalving)
    pick: Pick = field(default=agree, repr=False, compare=False)
    angle: float = 40.0

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Look, let pick, go on with the picked; a candidate without a rival is not looked at."""
        alive = np.ones(problem[:2], dtype=bool)
        for rung, following in itertools.pairwise(self.plan(problem.num_candidates, problem.num_steps)):
            compared = alive & (alive.sum(axis=1, keepdims=True) > 1)
            if not compared.any():
                break
            rewards = yield Query(compared, rung.step)
            keep = top(rewards, compared, share(compared, following.size / rung.size)) | (alive & ~compared)
            answer = self.pick(Proposal(rung.step, following.step, compared, rewards, keep))
            picked = np.array(answer.keep if isinstance(answer, Picked) else answer, dtype=bool)
            if picked.shape != alive.shape or not picked.any(axis=1).all():
                raise ValueError("at least one candidate of each prompt must be kept")
            alive = picked
            if isinstance(answer, Picked) and (answer.more > 0).any():
                if (answer.more[~(picked & compared)] > 0).any():
                    raise ValueError("more can be made of candidates that were looked at and go on")
                fork = placed(picked + answer.more, rung.step, self.angle, ~picked)
                yield fork
                alive = picked | fork.children
        yield Query(alive, problem.num_steps)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """That of the proposer: what it costs if the person agrees."""
        return self.proposer.plan(num_candidates, num_steps)


def share(alive: BoolArray, ratio: float) -> IntArray:
    """That share of the alive [prompts], rounded as halving does; at least 1."""
    size: IntArray = np.maximum(1, np.round(alive.sum(axis=1) * ratio)).astype(np.int64)
    return size
