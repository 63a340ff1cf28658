"""Tuning: the schedule for a budget or a range of budgets, fitted on some prompts and reported on the others."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ttsnap import policies
from ttsnap.core.cost import Budget
from ttsnap.core.grid import IntArray, Policy
from ttsnap.core.ranking import Constrained, Rule, read_rule, worth
from ttsnap.policies import BestOfN, SuccessiveHalving
from ttsnap.recordings import Recording
from ttsnap.replay import fitting
from ttsnap.replay.accounting import Accounting
from ttsnap.replay.results import SAMPLES, Simulation
from ttsnap.replay.simulator import Contender, simulate
from ttsnap.replay.statistics import interval, resample

if TYPE_CHECKING:
    import xarray as xr

TRIALS = 3200
PER_STUDY = 800  # schedules after which a fresh start finds more than going on
MOST_PROMPTS = 400  # that the search looks at; the finalists are judged on all
MOST_STUDIES = 8  # for one set of prompts
TUNED = "tuned"


class Fold(NamedTuple):
    """The schedule fitted on some prompts: its gain there, how many were tried, how many wanted more than the pool."""

    policy: Policy
    fit: IntArray
    test: IntArray
    gain: float
    tried: int
    too_large: int


@dataclass(frozen=True)
class Tuning:
    """A tuned policy and what it is worth on prompts that it was not fitted on.

    Attributes:
        policy: the schedule to use; best-of-N when no schedule is better beyond the interval.
        better: whether a schedule is.
        held_out: rewards of every prompt under a schedule fitted without it, beside best-of-N.
        folds: the schedules of `held_out`, and which prompts were used for what.
        provenance: recording, budgets, accounting, folds, seed, versions, number of schedules tried.
        notes: sentences about budgets and schedules left out.
    """

    policy: Policy
    better: bool
    held_out: Simulation
    folds: tuple[Fold, ...]
    provenance: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def figures(self) -> dict[str, Any]:
        """Held-out figures as a JSON object: per budget, and over all."""
        rows, merits = self.held_out.rows
        drop = ("policy", "hyperparameters")
        return {
            "better_than_best_of_n": self.better,
            "sentence": self.sentence,
            "prompts": self.held_out.dataset.sizes["prompt"],
            "budgets": [{key: value for key, value in row.items() if key not in drop} for row in rows],
            "over_all": [{key: value for key, value in row.items() if key not in drop} for row in merits],
            "folds": [
                {"fitted_on": len(fold.fit), "reported_on": len(fold.test), "gain_when_fitted": fold.gain}
                | policies.to_dict(fold.policy)
                for fold in self.folds
            ],
        }

    @property
    def sentence(self) -> str:
        """The result in words."""
        rows, merits = self.held_out.rows
        parts = []
        for row, merit in zip(rows[:: len(rows) // len(merits)], merits, strict=True):
            if len(self.held_out.dataset.budget) > 1:
                value, pair, unit = merit["relative_increase_percent"], merit["relative_increase_ci95"], " %"
            else:
                value, pair, unit = row["gain"], row["gain_ci95"], ""
            figures = ["unknown" if figure is None else f"{figure:+.4g}" for figure in (value, *pair)]
            parts.append(f"{row['reward_name']} {figures[0]}{unit} ({figures[1]} to {figures[2]})")
        kind = "relative increase" if len(self.held_out.dataset.budget) > 1 else "gain"
        what = f"{kind} over best-of-N on held-out prompts, 95 % interval: {', '.join(parts)}"
        return what if self.better else f"no schedule is better than best-of-N beyond its interval; {what}"

    def to_dict(self) -> dict[str, Any]:
        """Policy, provenance and held-out figures as one JSON object, as a policy file holds them."""
        return policies.to_dict(self.policy) | {"provenance": self.provenance, "held_out": self.figures}

    def save(self, path: str | Path) -> None:
        """Write a policy file that `generate --policy` and `simulate --policy` read."""
        policies.save(self.policy, path, provenance=self.provenance, held_out=self.figures)


def tune(
    recording: Recording,
    budgets: Sequence[Budget],
    accounting: Accounting,
    *,
    guide: str = "aware",
    folds: int = 4,
    fit: Sequence[int] | IntArray | None = None,
    test: Sequence[int] | IntArray | None = None,
    weights: Sequence[float] | None = None,
    combine: str | None = None,
    trials: int = TRIALS,
    seconds: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    on_progress: Callable[[int, int, float], bool | None] | None = None,
) -> Tuning:
    """The best schedule of successive halving (rungs, their steps, keep ratios) at equal and honest cost.

    Over several budgets the schedule with the highest relative increase, at one budget that with the highest reward.
    Each prompt is reported under a schedule that was fitted without it; the policy itself is fitted on all prompts.

    Args:
        recording: recorded rewards.
        budgets: per prompt, ascending, in one unit.
        accounting: how many candidates a budget pays for, and the charge.
        guide: what schedules see: `aware` (noise-aware rewards where there are any) or `clean`.
        folds: prompts are split into so many parts; each is reported under a schedule fitted on the others.
        fit: instead of folds, the prompts to fit on (indices of recorded prompts), for the policy itself too; and
        test: those to report on.
        weights: of several rewards in a weighted sum (default: rank sum over the alive).
        combine: another rule for several rewards, as `ttsnap.core.ranking.read_rule` reads it. A schedule gains in
            what the rule aims at; one that misses a bound by more than best-of-N does is none.
        trials: schedules to try, for all folds together.
        seconds: stop the search early after so long; the result then depends on the machine.
        seed: of folds, draws and proposals; the same seed gives the same result.
        threads: worker threads (default: one per core).
        on_progress: called with the schedules tried, their number, and the best gain so far; where it answers False,
            no more are tried and the best so far is taken.

    Raises:
        ValueError: what was wrong and what would work.
    """
    import optuna

    started = time.monotonic()
    accounting = accounting.under(guide)
    splits = _splits(recording, folds, fit, test, seed)
    used, notes = _usable(recording, budgets, accounting)
    _check(recording, trials, seconds)
    rule = read_rule(combine, recording.rewards, weights)
    steps = _steps(recording, guide, notes)
    studies = len(splits) * min(max(1, trials // (PER_STUDY * len(splits))), MOST_STUDIES)
    per_study = max(1, trials // studies)
    done, highest, lock = 0, -np.inf, threading.Lock()
    stop, limited = threading.Event(), threading.Event()
    limit = None if seconds is None else 0.8 * seconds * min(studies, threads or os.cpu_count() or 1) / studies

    def judge(prompts: IntArray, effort: float, draws: int) -> fitting.Judge:
        return fitting.Judge(
            recording.guide(guide, prompts),
            used,
            accounting,
            steps=steps,
            rule=rule,
            drawn=round(effort * fitting.DRAWN),
            seed=seed + draws,
        )

    def study(number: int) -> tuple[dict[SuccessiveHalving, float], int]:
        began = time.monotonic()

        def proceed(best: float) -> bool:
            nonlocal done, highest
            with lock:
                done, highest = done + 1, max(highest, best)
                if on_progress and on_progress(done, studies * per_study, highest) is False:
                    limited.set()
                    stop.set()
            late = limit is not None and time.monotonic() - began > limit
            if late:
                limited.set()
            return not (late or stop.is_set())

        prompts = _some(splits[number % len(splits)][0], MOST_PROMPTS)
        first = judge(prompts, 1, 0)
        gains, too_large = fitting.explore(first, trials=per_study, seed=seed + number // len(splits), proceed=proceed)
        if len(used) == 1 and accounting.name == "calls":
            gains |= fitting.resized(first, fitting.best(gains, 8))
        return gains, too_large

    def conclude(number: int, found: list[tuple[dict[SuccessiveHalving, float], int]]) -> Fold:
        fitted_on, reported_on = splits[number]
        gains = {policy: gain for part, _ in found for policy, gain in part.items()}
        judges = (judge(fitted_on, effort, 1000 * (i + 1)) for i, (_, effort) in enumerate(fitting.FINALS))
        policy, gain = fitting.select(judges, gains)
        return Fold(policy, fitted_on, reported_on, gain, len(gains), sum(part for _, part in found))

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with ThreadPoolExecutor(threads or os.cpu_count()) as executor:
            try:
                found = list(executor.map(study, range(studies)))
                fitted = list(executor.map(lambda i: conclude(i, found[i :: len(splits)]), range(len(splits))))
            except BaseException:
                stop.set()
                raise
    finally:
        optuna.logging.set_verbosity(verbosity)
    final = fitted[-1]
    reported = tuple(fold for fold in fitted if len(fold.test))
    held_out = _report(recording, reported, used, accounting, guide, weights, combine, seed, threads)
    if too_large := sum(fold.too_large for fold in fitted):
        notes.append(
            f"{too_large} schedules would have started more candidates than the {recording.shape[1]} recorded; left out"
        )
    better = _is_better(held_out, recording, rule) and not isinstance(final.policy, BestOfN)
    return Tuning(
        policy=final.policy if better else BestOfN(),
        better=better,
        held_out=held_out,
        folds=reported,
        provenance={
            "made_by": "ttsnap tune",
            "recording": recording.path.name,
            "recording_provenance": recording.provenance,
            "rewards": list(recording.rewards),
            "guide": guide,
            "guides": recording.provenance.get("guides", list(recording.rewards))
            if guide == "aware"
            else list(recording.rewards),
            "combine": held_out.dataset.attrs["combine"],
            "weights": None if weights is None else list(weights),
            "num_steps": recording.shape[2],
            "candidates_recorded": recording.shape[1],
            "budgets": [budget.amount for budget in used],
            "budget_unit": used[0].unit,
            "accounting": accounting.name,
            "cost_model": accounting.model.tflops(),
            "folds": None if fit is not None else folds,
            "policy_fitted_on": "the prompts given" if fit is not None else "all recorded prompts",
            "policy_fitted_on_prompts": len(final.fit),
            "seed": seed,
            "schedules_tried": sum(fold.tried for fold in fitted),
            "stopped_early": limited.is_set(),
            "seconds": round(time.monotonic() - started, 1),
            "notes": notes,
            "versions": _versions(),
        },
        notes=tuple(notes),
    )


def _splits(
    recording: Recording,
    folds: int,
    fit: Sequence[int] | IntArray | None,
    test: Sequence[int] | IntArray | None,
    seed: int,
) -> list[tuple[IntArray, IntArray]]:
    """Fitting and reporting prompts of each fit; the last one makes the policy."""
    recorded = recording.recorded()
    if (fit is None) != (test is None):
        raise ValueError("prompts to fit on and prompts to test on are needed together")
    if fit is not None and test is not None:
        parts = [np.unique(np.asarray(part, dtype=np.int64)) for part in (fit, test)]
        for name, part in zip(("fit", "test"), parts, strict=True):
            if len(part) < 2:
                raise ValueError(f"at least 2 prompts to {name} on are needed, got {len(part)}")
            if len(strange := np.setdiff1d(part, recorded)):
                raise ValueError(f"prompt {strange[0]} is to be used to {name}, but it is not recorded")
        if len(both := np.intersect1d(parts[0], parts[1])):
            raise ValueError(f"prompt {both[0]} is to be used to fit and to test; a report must be held out")
        return [(parts[0], parts[1])]
    if not 2 <= folds <= len(recorded) // 2:
        raise ValueError(
            f"folds must be in 2..{len(recorded) // 2} (at least 2 prompts each, {len(recorded)} recorded), got {folds}"
            if len(recorded) >= 4
            else f"tuning needs at least 4 recorded prompts, got {len(recorded)}"
        )
    shuffled = np.random.default_rng([seed, 2]).permutation(recorded)
    tests = [np.sort(part) for part in np.array_split(shuffled, folds)]
    return [*((np.setdiff1d(recorded, part), part) for part in tests), (recorded, recorded[:0])]


def _usable(recording: Recording, budgets: Sequence[Budget], accounting: Accounting) -> tuple[list[Budget], list[str]]:
    """The budgets at which there is a best-of-N to compare with, and sentences about the others."""
    if not budgets:
        raise ValueError("tuning needs a budget")
    if len({budget.unit for budget in budgets}) > 1:
        raise ValueError("budgets must share one unit")
    if any(later.amount <= earlier.amount for earlier, later in itertools.pairwise(budgets)):
        raise ValueError(f"budgets must ascend, got {', '.join(map(str, budgets))}")
    pool, num_steps = recording.shape[1:3]
    sizes = [accounting.candidates(BestOfN(), budget, num_steps) for budget in budgets]
    used = [budget for budget, size in zip(budgets, sizes, strict=True) if 1 <= size <= pool]
    notes = []
    if small := [budget for budget, size in zip(budgets, sizes, strict=True) if size < 1]:
        notes.append(f"{small[-1]} pays for not even one image; budgets up to there are left out")
    if large := [(budget, size) for budget, size in zip(budgets, sizes, strict=True) if size > pool]:
        notes.append(
            f"best-of-N at {large[0][0]} would start {large[0][1]} candidates, more than the {pool} recorded; "
            "budgets from there on are left out"
        )
    if not used:
        raise ValueError("; ".join(notes))
    counts = {size for size in sizes if 1 <= size <= pool}
    if len(used) > 1 and len(counts) == 1:
        raise ValueError(
            f"best-of-N is best-of-{counts.pop()} at all budgets from {used[0]} to {used[-1]}; "
            "give one budget or a wider range"
        )
    return used, notes


def _check(recording: Recording, trials: int, seconds: float | None) -> None:
    _, pool, num_steps, _ = recording.shape
    if num_steps < 2 or pool < 2:
        raise ValueError(f"tuning needs at least 2 steps and 2 candidates, recorded are {num_steps} and {pool}")
    if trials < 1:
        raise ValueError(f"tuning must try at least 1 schedule, got {trials}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"the seconds to tune must be above 0, got {seconds:g}")


def _steps(recording: Recording, guide: str, notes: list[str]) -> tuple[int, ...]:
    """The steps at which every recorded candidate was judged, but for the last; the others are noted."""
    seen = recording.guide(guide)
    last = recording.shape[2]
    steps = tuple(step for step in range(1, last) if np.isfinite(seen[:, :, step - 1]).all())
    if not steps:
        raise ValueError(f"recording {recording.path} has no step but the last at which every candidate was judged")
    if len(steps) < last - 1:
        judged = ", ".join(map(str, steps))
        notes.append(f"schedules look at steps {judged} only: at the others not every candidate was judged")
    return steps


def _some(prompts: IntArray, most: int) -> IntArray:
    """At most so many, evenly spread."""
    return prompts[np.linspace(0, len(prompts) - 1, min(most, len(prompts))).astype(np.int64)]


def _report(
    recording: Recording,
    folds: Sequence[Fold],
    budgets: Sequence[Budget],
    accounting: Accounting,
    guide: str,
    weights: Sequence[float] | None,
    combine: str | None,
    seed: int,
    threads: int | None,
) -> Simulation:
    """All held-out prompts in one simulation, each under the schedule fitted without it."""
    import xarray as xr

    parts = []
    for fold in folds:
        contender = Contender(TUNED, fold.policy, guide)
        dataset = simulate(
            recording,
            [contender],
            budgets,
            accounting,
            weights=weights,
            combine=combine,
            prompts=fold.test,
            seed=seed,
            threads=threads,
        ).dataset
        if isinstance(fold.policy, BestOfN):
            dataset["value"] = dataset.best_of_n.expand_dims(policy=[TUNED])
        parts.append(dataset)
    shares = np.array([len(fold.test) for fold in folds], dtype=float)
    shares /= shares.sum()
    whole: xr.Dataset = xr.concat(parts, dim="prompt", data_vars="minimal", coords="minimal", compat="override")
    for name in ("trial_value", "nfe", "looks", "tflop"):
        whole[name] = sum(share * part[name] for share, part in zip(shares, parts, strict=True))
    whole["candidates"] = (
        sum(share * part.candidates for share, part in zip(shares, parts, strict=True)).round().astype(int)
    )
    return Simulation(whole, ({"name": TUNED, "guide": guide},))


def _is_better(held_out: Simulation, recording: Recording, rule: Rule) -> bool:
    """Whether the 95 % interval of what the schedules gain on held-out prompts lies above zero."""
    dataset = held_out.dataset
    (mean, std), aims = recording.shown_by(), -1 if isinstance(rule, Constrained) else None
    sample = resample(dataset.sizes["prompt"], SAMPLES, np.random.default_rng([dataset.attrs["seed"], 3]))
    rewards, baseline = (
        np.einsum("sp,bpr->sbr", sample, worth(rule, values * std + mean)[..., :aims])
        for values in (dataset.value.values[0], dataset.best_of_n.values)
    )
    final = worth(rule, np.asarray(recording.clean[recording.recorded(), :, -1], dtype=np.float64))[..., :aims]
    gains = fitting.merit(dataset.budget.values, rewards, baseline, final.std(axis=1).mean(axis=0))
    return bool(interval(gains)[0] > 0)


def _versions() -> dict[str, str]:
    import optuna

    from ttsnap.core import __version__

    return {"ttsnap": __version__, "optuna": optuna.__version__, "numpy": np.__version__}
