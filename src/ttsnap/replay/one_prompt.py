"""One prompt of a recording under a policy, look by look."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ttsnap.core.driver import run
from ttsnap.core.grid import Combine, IntArray, Policy
from ttsnap.core.observers import Result, Seen
from ttsnap.live.result import history_of
from ttsnap.replay.environment import ReplayEnvironment

if TYPE_CHECKING:
    from ttsnap.recordings import Recording


class Replayed(NamedTuple):
    """What a policy did on one prompt: the result, per seed every look at it, and the seeds [candidates].

    Rewards are in the recording's scale. Candidates recorded without seeds go by their numbers.
    """

    result: Result
    history: dict[int, list[Seen]]
    seeds: IntArray


def replay_prompt(
    recording: Recording,
    prompt: int,
    policy: Policy,
    candidates: int,
    *,
    guide: str = "aware",
    combine: Combine | None = None,
) -> Replayed:
    """Run a policy on the first candidates of a recorded prompt.

    Args:
        recording: recorded rewards.
        prompt: index of the prompt.
        policy: what looks and drops.
        candidates: how many are started.
        guide: what it sees: `aware` or `clean`.
        combine: several rewards -> one number (default: rank sum).

    Raises:
        ValueError: the prompt is not recorded, or has fewer candidates.
    """
    if prompt not in recording.recorded():
        raise ValueError(f"prompt {prompt} is not recorded in {recording.path}")
    pool, num_steps = recording.shape[1:3]
    if not 1 <= candidates <= pool:
        raise ValueError(f"{candidates} candidates cannot be drawn from the {pool} recorded")
    seeds = recording.seeds[prompt, :candidates]
    if len(np.unique(seeds)) < candidates or (seeds < 0).any():
        seeds = np.arange(candidates)
    mean, deviation = np.array([recording.scales.get(name, (0.0, 1.0)) for name in recording.rewards]).T
    rewards = (recording.guide(guide, np.array([prompt]))[:, :candidates] - mean) / deviation
    result = run(policy, ReplayEnvironment(rewards, [recording.prompts[prompt]], seeds[None]), combine)
    return Replayed(result, history_of(result, 0, seeds, num_steps), seeds)
