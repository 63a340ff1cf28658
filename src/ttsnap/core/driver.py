"""The driver: one loop that runs any policy against any environment, live or replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import replace

import numpy as np

from ttsnap.core.cost import Ledger
from ttsnap.core.grid import BoolArray, Combine, Environment, FloatArray, Fork, Policy, Query, Search
from ttsnap.core.observers import SILENT, Interrupted, Look, Observer, Result, Stop
from ttsnap.core.ranking import RankSum, behind, choose


def run(
    policy: Policy,
    environment: Environment,
    combine: Combine | None = None,
    rng: np.random.Generator | None = None,
    *,
    keep_history: bool = True,
    observer: Observer | None = None,
    before: Result | None = None,
) -> Result:
    """Run a policy to its end and choose the best finished candidate of each prompt.

    Args:
        policy: asks the questions.
        environment: answers them; asked only about candidates that are not yet at the step.
        combine: several rewards -> one number (default: rank sum over the alive).
        rng: randomness of the policy, if it uses any.
        keep_history: keep every look in the result.
        observer: is told of every question and look; it may raise `Stop`.
        before: result (with its history) of an earlier search in the same environment, whose books are carried on.

    Raises:
        ValueError: a reward was NaN or infinite (names prompt, seed and step), or the policy finished no candidate.

    """
    steps = drive(policy, environment, combine, rng, keep_history=keep_history, observer=observer, before=before)
    try:
        query = next(steps)
        while True:
            try:
                observed = environment.fork(query) if isinstance(query, Fork) else environment.observe(query)
            except Stop as stop:
                query = steps.throw(stop)
            else:
                query = steps.send(observed)
    except StopIteration as end:
        result: Result = end.value
        return result


def drive(
    policy: Policy,
    environment: Environment,
    combine: Combine | None = None,
    rng: np.random.Generator | None = None,
    *,
    keep_history: bool = True,
    observer: Observer | None = None,
    before: Result | None = None,
) -> Generator[Query | Fork, FloatArray, Result]:
    """The same as `run`, but the caller observes: he is given queries and sends rewards, or throws `Interrupted`.

    After a fork, which he makes, what he sends does not matter.

    So several searches can go on at a time. Arguments, result and errors are those of `run`; `environment` is not
    asked, only named in messages.
    """
    combine = combine or RankSum()
    tell = observer or SILENT
    problem = environment.problem
    ledger = before.ledger.copy() if before else Ledger(problem)
    history = list(before.history) if before else []
    forks = list(before.forks) if before else []
    seen = [(look.alive, look.rewards) for look in history if not look.draft]  # who was looked at, and the answers
    search = policy.search(problem, rng or np.random.default_rng([0, 0]))
    answer: FloatArray | None = None
    stopped = False

    def ranked(rewards: FloatArray, alive: BoolArray) -> FloatArray:
        return behind(combine(rewards, alive), alive, getattr(environment, "blank", None))

    try:
        while not stopped and (query := _next(search, answer)) is not None:
            if isinstance(query, Fork):
                ledger.fork(query)
                yield query
                if seen:
                    seen.append((query.children, query.from_parents(_latest(seen))))
                answer = np.full(problem[:2], np.nan)
                forks.append((len(history), query))
                tell.forked(query)
                continue
            tell.asked(query)
            new = ledger.charge(query)
            try:
                observed = yield query._replace(mask=new)
            except Interrupted as early:
                stopped, observed = True, early.rewards
                ledger.amend(early.answered, early.lost)
                query, new = query._replace(mask=query.mask & ~new | early.answered), early.answered
            ledger.again = getattr(environment, "again", ledger.again)
            ledger.saved = getattr(environment, "saved", ledger.saved)
            check(environment, new, observed, query.step)
            if not query.draft:
                seen.append((new, observed))
            again = np.count_nonzero(new) < np.count_nonzero(query.mask)
            rewards = np.where(query.mask[..., None], _latest(seen), np.nan) if again else observed
            answer = ranked(rewards, query.mask)
            if (keep_history or observer) and query.mask.any():
                look = Look(query.step, query.mask.copy(), rewards, answer, query.draft)
                if keep_history:
                    history.append(look)
                tell.looked(look, ledger)
    except Stop:
        stopped = True
    finally:
        search.close()

    finished = ledger.finished
    stopped |= before is not None and before.stopped
    if not stopped and not (seen and finished.any(axis=1).all()):
        raise ValueError(f"{policy} brought no candidate of some prompt to the last step ({problem.num_steps})")
    result = replace(_conclude(ranked, ledger, seen, finished, history, stopped), forks=forks)
    with contextlib.suppress(Stop):
        tell.ended(result)
    return result


def _next(search: Search, answer: FloatArray | None) -> Query | Fork | None:
    """The policy's next question or fork; None when it has ended."""
    try:
        return next(search) if answer is None else search.send(answer)
    except StopIteration:
        return None


def _conclude(
    combine: Combine,
    ledger: Ledger,
    seen: list[tuple[BoolArray, FloatArray]],
    finished: BoolArray,
    history: list[Look],
    stopped: bool,
) -> Result:
    """Choose the best finished candidate of each prompt that has one."""
    if not seen:  # stopped before the first look
        none = np.full(len(finished), -1)
        return Result(none, np.full((len(finished), 1), np.nan), finished, ledger, history, stopped)
    new, final = seen[-1]
    if not np.array_equal(new, finished):
        final = np.where(finished[..., None], _latest(seen), np.nan)
    chosen = choose(combine(final, finished), finished)
    rewards = final[np.arange(len(chosen)), chosen]  # NaN where nothing is finished
    if stopped:
        chosen = np.where(finished.any(axis=1), chosen, -1)
    return Result(chosen, rewards, finished, ledger, history, stopped)


def _latest(seen: list[tuple[BoolArray, FloatArray]]) -> FloatArray:
    """Rewards [prompts, candidates, rewards] at each candidate's present position."""
    latest = seen[0][1].copy()
    for mask, rewards in seen[1:]:
        np.copyto(latest, rewards, where=mask[..., None])
    return latest


def check(environment: Environment, asked: BoolArray, observed: FloatArray, step: int) -> None:
    """Raise ValueError about the first reward that is not a finite number, or that was not asked for."""
    if np.count_nonzero(np.isfinite(observed)) == np.count_nonzero(asked) * observed.shape[-1]:
        return
    wrong = np.argwhere(asked & ~np.isfinite(observed).all(axis=-1))
    if not len(wrong):
        raise ValueError(f"{type(environment).__name__} answered about candidates that were not asked about")
    prompt, candidate = wrong[0]
    values = ", ".join(f"{value:g}" for value in observed[prompt, candidate])
    who = environment.describe(int(prompt), int(candidate))
    raise ValueError(f"a reward returned {values} for {who} at step {step} of {environment.problem.num_steps}")
