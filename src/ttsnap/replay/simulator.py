"""Policies on recorded rewards: many trials, many budgets, the same draws for all.

A trial on a prompt draws candidates from the recorded pool without replacement. The draws of all policies and budgets
are the first n of the same permutation, so that policies are compared pairwise. Every trial runs the very policy that
runs live, through the very driver; trials and prompts are rows of one grid.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ttsnap.core.cost import Budget
from ttsnap.core.driver import run
from ttsnap.core.grid import Combine, FloatArray, IntArray, Policy
from ttsnap.core.ranking import read_rule
from ttsnap.policies import BestOfN
from ttsnap.recordings import Recording
from ttsnap.replay.accounting import Accounting
from ttsnap.replay.environment import ReplayEnvironment
from ttsnap.replay.results import Simulation
from ttsnap.replay.statistics import best_of_n

BLOCK = 2**17  # candidates in one call of the driver: few enough for the processor's cache, enough for vectors
DRAWN = 2**24  # drawn candidates held at once


@dataclass(frozen=True)
class Contender:
    """A policy with the guide it sees, under the name it is shown by."""

    name: str
    policy: Policy
    guide: str = "aware"


def draw(prompts: Sequence[int] | IntArray, pool: int, trials: int, size: int, seed: int) -> IntArray:
    """Candidates [prompts, trials, size] without replacement; those of a prompt depend on seed and prompt alone."""
    drawn = np.empty((len(prompts), trials, size), dtype=np.int64)
    candidates = np.broadcast_to(np.arange(pool), (trials, pool))
    for row, prompt in enumerate(prompts):
        drawn[row] = np.random.default_rng([seed, int(prompt)]).permuted(candidates, axis=1)[:, :size]
    return drawn


@dataclass(frozen=True)
class Sampled:
    """What replayed trials yielded.

    Attributes:
        by_prompt: mean reward over trials [prompts, rewards].
        by_trial: mean reward over prompts [trials, rewards].
        nfe: denoiser calls per prompt and trial.
        looks_by_step: looks after each call [num_steps], per prompt and trial.
    """

    by_prompt: FloatArray
    by_trial: FloatArray
    nfe: float
    looks_by_step: FloatArray


@dataclass(frozen=True)
class Task:
    """One policy with one number of candidates on one guide."""

    policy: Policy
    candidates: int
    guide: np.ndarray


def replay(
    tasks: Sequence[Task],
    prompts: IntArray,
    *,
    trials: int,
    seed: int = 0,
    combine: Combine | None = None,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Sampled]:
    """Run policies over many trials on recorded rewards, all on the same draws.

    Args:
        tasks: what to run; guides [prompts, pool, steps, rewards] of one size.
        prompts: index of each prompt, which fixes its draws [prompts].
        trials: trials per prompt.
        seed: of the draws.
        combine: several rewards -> one (default: rank sum).
        threads: worker threads (default: one per core).
        on_progress: called with the blocks done and their number.
    """
    if not tasks:
        return []
    pool, num_rewards = tasks[0].guide.shape[1], tasks[0].guide.shape[3]
    most = max(task.candidates for task in tasks)
    if most > pool:
        raise ValueError(f"{most} candidates are more than the {pool} recorded")
    rewards = np.zeros((len(tasks), len(prompts), trials, num_rewards))
    counts = np.zeros((len(tasks), 1 + tasks[0].guide.shape[2]))
    blocks = list(_blocks(len(prompts), max(1, DRAWN // (trials * most))))
    workers = threads or os.cpu_count() or 1
    done = 0

    def one(index: int, block: slice, drawn: IntArray) -> tuple[int, slice, FloatArray, FloatArray]:
        task = tasks[index]
        first = np.arange(block.start, block.stop)[:, None, None] * pool
        draws = (drawn[:, :, : task.candidates] + first).reshape(-1, task.candidates)
        result = run(
            task.policy,
            ReplayEnvironment(task.guide, draws=draws),
            combine,
            np.random.default_rng([seed, block.start]),
            keep_history=False,
        )
        counted = np.array([result.ledger.nfe.sum(), *result.ledger.looks_by_step.sum(axis=0)], dtype=float)
        return index, block, result.rewards.reshape(block.stop - block.start, trials, num_rewards), counted

    with ThreadPoolExecutor(workers) as executor:
        for block in blocks:
            drawn = draw(prompts[block], pool, trials, most, seed)
            parts = [
                (index, slice(block.start + part.start, block.start + part.stop), drawn[part])
                for index, task in enumerate(tasks)
                for part in _blocks(len(drawn), max(1, BLOCK // (trials * task.candidates)))
            ]
            for number, (index, part, values, counted) in enumerate(executor.map(lambda args: one(*args), parts)):
                rewards[index, part] = values
                counts[index] += counted
                if on_progress:
                    on_progress(done * len(parts) + number + 1, len(blocks) * len(parts))
            done += 1
    rows = len(prompts) * trials
    return [
        Sampled(values.mean(axis=1), values.mean(axis=0), float(counted[0]), counted[1:])
        for values, counted in zip(rewards, counts / rows, strict=True)
    ]


def _blocks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(total, start + size))


def simulate(
    recording: Recording,
    contenders: Sequence[Contender],
    budgets: Sequence[Budget],
    accounting: Accounting,
    *,
    trials: int = 50,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    combine: str | None = None,
    prompts: IntArray | None = None,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Reward of each policy at each budget, and of best-of-N in closed form where there is one.

    Args:
        recording: recorded rewards.
        contenders: the policies to compare.
        budgets: per prompt, ascending, in one unit.
        accounting: how many candidates a budget pays for, and the charge.
        trials: trials per prompt.
        seed: of the draws.
        weights: of several rewards in a weighted sum (default: rank sum over the alive).
        combine: another rule for several rewards, as `ttsnap.core.ranking.read_rule` reads it.
        prompts: indices of recorded prompts to use (default: all recorded).
        threads: worker threads (default: one per core).
        on_progress: called with the parts done and their number.

    Raises:
        ValueError: budgets do not ascend, or no policy can use any of them.
    """
    if not contenders or not budgets:
        raise ValueError("a simulation needs at least one policy and one budget")
    if len({budget.unit for budget in budgets}) > 1:
        raise ValueError("budgets must share one unit")
    if any(b.amount <= a.amount for a, b in itertools.pairwise(budgets)):
        raise ValueError(f"budgets must ascend, got {', '.join(map(str, budgets))}")
    if len({contender.name for contender in contenders}) < len(contenders):
        raise ValueError("two policies have the same name")
    if trials < 1:
        raise ValueError(f"a simulation needs at least one trial, got {trials}")
    prompts = recording.recorded() if prompts is None else np.asarray(prompts)
    _, pool, num_steps, num_rewards = recording.shape
    rule = read_rule(combine, recording.rewards, weights)
    guides = {kind: recording.guide(kind, prompts) for kind in {contender.guide for contender in contenders}}

    charges = {kind: accounting.under(kind) for kind in guides}
    wanted = np.array([[charges[c.guide].candidates(c.policy, b, num_steps) for b in budgets] for c in contenders])
    usable = (wanted >= 1) & (wanted <= pool)
    where = [(int(row), int(column)) for row, column in np.argwhere(usable)]
    tasks = [Task(contenders[r].policy, int(wanted[r, b]), guides[contenders[r].guide]) for r, b in where]
    baseline_sizes = np.array([accounting.candidates(BestOfN(), budget, num_steps) for budget in budgets])
    fine = (baseline_sizes >= 1) & (baseline_sizes <= pool)
    sampled_baseline = not rule.is_order(num_rewards)
    if sampled_baseline:  # ranks depend on who else was drawn: no closed form
        guide = next(iter(guides.values()))
        curve_sizes = np.unique(np.concatenate([_geometric(pool), baseline_sizes[fine]]))
        tasks += [Task(BestOfN(), int(size), guide) for size in curve_sizes]
    results = replay(tasks, prompts, trials=trials, seed=seed, combine=rule, threads=threads, on_progress=on_progress)

    final = np.asarray(recording.clean[prompts, :, -1], dtype=np.float64)
    if sampled_baseline:
        curve = np.stack([result.by_prompt for result in results[len(where) :]])
    else:
        curve_sizes = np.arange(1, pool + 1)
        curve = best_of_n(final, curve_sizes, rule(final, np.ones(final.shape[:2], dtype=bool)))
    shape = (len(contenders), len(budgets))
    by_prompt = np.full((*shape, len(prompts), num_rewards), np.nan)
    by_trial = np.full((*shape, trials, num_rewards), np.nan)
    nfe, looks, tflop = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    for place, result in zip(where, results, strict=False):
        by_prompt[place], by_trial[place], nfe[place], looks[place] = (
            result.by_prompt,
            result.by_trial,
            result.nfe,
            result.looks_by_step.sum(),
        )
        contender = contenders[place[0]]
        policy = contender.policy
        tflop[place] = charges[contender.guide].tflop(
            policy, int(wanted[place]), num_steps, result.nfe, result.looks_by_step
        )

    mean, std = recording.shown_by()
    one_look = np.eye(num_steps)[-1]
    one_image = accounting.tflop(BestOfN(), 1, num_steps, num_steps, one_look)
    baseline = np.full((len(budgets), len(prompts), num_rewards), np.nan)
    baseline[fine] = curve[np.searchsorted(curve_sizes, baseline_sizes[fine])]
    import xarray as xr

    dataset = xr.Dataset(
        {
            "value": (("policy", "budget", "prompt", "reward"), (by_prompt - mean) / std),
            "trial_value": (("policy", "budget", "trial", "reward"), (by_trial - mean) / std),
            "candidates": (("policy", "budget"), wanted),
            "nfe": (("policy", "budget"), nfe),
            "looks": (("policy", "budget"), looks),
            "tflop": (("policy", "budget"), tflop),
            "best_of_n": (("budget", "prompt", "reward"), (baseline - mean) / std),
            "best_of_n_candidates": (("budget",), baseline_sizes),
            "curve": (("size", "prompt", "reward"), (curve - mean) / std),
        },
        coords={
            "policy": [contender.name for contender in contenders],
            "budget": [budget.amount for budget in budgets],
            "prompt": [recording.prompts[index] for index in prompts],
            "reward": list(recording.rewards),
            "size": curve_sizes,
        },
        attrs={
            "unit": budgets[0].unit,
            "trials": trials,
            "seed": seed,
            "accounting": accounting.name,
            "cost_model": accounting.model.name,
            "call_tflop": accounting.model.call_tflop,
            "look_tflop": accounting.model.look_tflop + accounting.model.decode_tflop,
            "early_looks": ", ".join(map(str, accounting.model.early)),
            "one_image_tflop": one_image,
            "pool": pool,
            "num_steps": num_steps,
            "combine": rule.said(recording.rewards),
            "recording": str(recording.path),
        },
    )
    simulation = Simulation(dataset, tuple(_policy_dict(contender) for contender in contenders))
    if not usable.any():
        raise ValueError("; ".join(simulation.notes()))
    return simulation


def _geometric(pool: int) -> IntArray:
    """Sizes from 1 to the pool, every one at first, then every tenth part more."""
    return np.unique(np.round(1.1 ** np.arange(0, 200)).astype(np.int64).clip(1, pool))


def _policy_dict(contender: Contender) -> dict[str, Any]:
    from ttsnap.policies import to_dict

    return {"name": contender.name, "guide": contender.guide} | to_dict(contender.policy)
