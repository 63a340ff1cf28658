"""Tuning a policy live: hyperparameters are tried on some prompts, and reported on others, at equal cost."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ttsnap import policies
from ttsnap.core.cost import Budget, affordable
from ttsnap.core.grid import FloatArray, Policy
from ttsnap.core.ranking import worth
from ttsnap.live.leaderboard import interval
from ttsnap.live.session import Session, check_prompts
from ttsnap.policies import BestOfN
from ttsnap.policies.space import ranges, suggest, values

BLOCK = 8  # prompts that run together, after which a poor trial is pruned
STARTUP = 8  # random trials before any is pruned, or proposed by the model
SEEDS = 10_000  # apart, so that no two prompts share candidates


@dataclass(frozen=True)
class LiveTuning:
    """A tuned policy and what it is worth on prompts that it was not tuned on.

    Attributes:
        policy: the best on the prompts it was tuned on; the one it began with if that is not worse held out.
        better: whether it beats the one it began with on held-out prompts, beyond the 95 % interval.
        num_steps: denoiser calls of a finished image that go with it.
        rewards: of held-out prompts [prompts] by `tuned`, `before`, `best-of-n`, and, where the number of steps was
            tuned, too, `best-of-n at its best steps`; all at equal cost.
        tflop: that each prompt paid, the same keys.
        trials: hyperparameters and mean reward of each trial that was finished, in order.
        provenance: model, reward, budget, prompts, seed.
    """

    policy: Policy
    better: bool
    num_steps: int
    rewards: dict[str, FloatArray]
    tflop: dict[str, FloatArray]
    trials: list[dict[str, Any]]
    provenance: dict[str, Any]

    def gain(self, over: str) -> tuple[float, float, float]:
        """Mean gain of the tuned policy over `before` or `best-of-n` on held-out prompts, with its 95 % interval."""
        return _interval(self.rewards["tuned"] - self.rewards[over])

    @property
    def figures(self) -> dict[str, Any]:
        """Held-out figures as a JSON object."""
        others = [name for name in self.rewards if name != "tuned"]
        gains = {f"gain_over_{re.sub('[^a-z]', '_', name)}": list(self.gain(name)) for name in others}
        means = {name: float(found.mean()) for name, found in self.rewards.items()}
        paid = {name: float(found.mean()) for name, found in self.tflop.items()}
        return {"prompts": len(self.rewards["tuned"]), "better": self.better, "reward": means, "tflop": paid} | gains

    def to_dict(self) -> dict[str, Any]:
        """Policy, provenance, held-out figures and trials as one JSON object."""
        found = policies.to_dict(self.policy) | {"provenance": self.provenance, "held_out": self.figures}
        return found | {"trials": self.trials}


def save(found: Sequence[LiveTuning], path: str | Path) -> None:
    """Write a policy file that `generate --policy` reads, of what was tuned for one budget or several, ascending.

    The file's own policy is that of the largest budget; each budget has its entry.
    """
    last = found[-1]
    notes: dict[str, Any] = {"provenance": last.provenance, "held_out": last.figures}
    if len(found) > 1:
        notes["by_budget"] = [
            {"budget": one.provenance["budget"], "policy": policies.to_dict(one.policy), "held_out": one.figures}
            | ({"num_steps": one.num_steps} if "steps" in one.provenance else {})
            for one in found
        ]
    policies.save(last.policy, path, **notes)


def tune(
    session: Session,
    prompts: Sequence[str],
    policy: Policy,
    budget: Budget,
    *,
    steps: Sequence[int] = (),
    trials: int = 40,
    seconds: float | None = None,
    seed: int = 0,
    on_progress: Callable[[int, float], None] | None = None,
) -> LiveTuning:
    """Find good hyperparameters of a policy for a model, its rewards and a budget, by searching with them.

    Every other prompt is for tuning, by Optuna's TPE; a trial whose mean reward so far is below the median is pruned.
    On the held-out others the best is compared with the policy it began with and with best-of-N, on the same seeds,
    each with as many candidates as the budget pays for.

    Args:
        session: model and rewards.
        prompts: at least 4.
        policy: where to begin; it says how many rungs there are.
        budget: per prompt, in NFE or TFLOP.
        steps: numbers of steps to choose from, beside the session's own; fewer steps pay for more candidates.
        trials: to make.
        seconds: begin no trial after so long; the result then depends on the machine.
        seed: of the candidates and proposals.
        on_progress: told the trials made and the best mean reward.

    Raises:
        ValueError: too few prompts or trials, a budget in seconds or too small, or a policy without hyperparameters.
    """
    import optuna

    check_prompts(prompts)
    if len(prompts) < 4:
        raise ValueError(f"tuning needs at least 4 prompts, half of them held out, got {len(prompts)}")
    if trials < 1:
        raise ValueError(f"tuning makes at least 1 trial, got {trials}")
    if budget.unit == "s":
        raise ValueError("tuning takes a budget in NFE or TFLOP; seconds depend on what else the machine does")
    if len(session.judges) > 1 and worth(session.combine, np.zeros(len(session.judges))).shape != (1,):
        raise ValueError(
            "live, several rewards are tuned for as one number: give --weights, such as 1,.5, and --combine minimum "
            "for the least of them; ranks and bounds are tuned for on a recording"
        )
    ranges(policy)
    sessions = _payable([session, *(session.with_steps(n) for n in dict.fromkeys(steps))], policy, budget)
    own = session.sampler.num_steps if session.sampler.num_steps in sessions else max(sessions)
    fit, test = list(prompts[::2]), list(prompts[1::2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `multivariate` is called experimental
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=STARTUP)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    choice = {"steps": own} if len(sessions) > 1 else {}
    study.enqueue_trial(values(policy, own) | choice)
    began, found = time.monotonic(), list[tuple[float, Policy, int]]()
    made: list[dict[str, Any]] = []
    try:
        while len(made) < trials and (seconds is None or not found or time.monotonic() - began < seconds):
            trial = study.ask()
            try:
                count = trial.suggest_categorical("steps", sorted(sessions)) if choice else own
                tried = suggest(policy, trial) if found else policy
                reward = _objective(sessions[count], tried, budget, fit, seed, trial)
            except ValueError as error:
                if not found:
                    raise
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                if len(study.trials) > 20 * trials:
                    raise ValueError(f"hardly any hyperparameters of {policy} make a search: {error}") from error
                continue
            if reward is None:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(trial, reward)
                found.append((reward, tried, count))
            made.append(policies.to_dict(tried) | {"num_steps": count, "reward": reward})
            if on_progress:
                on_progress(len(made), max(found, key=lambda entry: entry[0])[0])
    finally:
        optuna.logging.set_verbosity(verbosity)
    _, best, count = max(found, key=lambda entry: entry[0])
    judged: dict[str, tuple[Policy, int]] = {
        "tuned": (best, count),
        "before": (policy, own),
        "best-of-n": (BestOfN(), own),
    }
    if choice:
        plain = {n: measure(one, BestOfN(), budget, fit, seed)[0].mean() for n, one in sorted(sessions.items())}
        judged["best-of-n at its best steps"] = BestOfN(), max(plain, key=lambda n: plain[n])
    start = seed + SEEDS * len(fit)
    measured = {name: measure(sessions[n], one, budget, test, start) for name, (one, n) in judged.items()}
    rewards, tflop = ({name: found[i] for name, found in measured.items()} for i in (0, 1))
    low = _interval(rewards["tuned"] - rewards["before"])[1]
    kept, kept_steps = judged["tuned" if rewards["tuned"].mean() >= rewards["before"].mean() else "before"]
    provenance = {
        "tuned": "live",
        "model": session.model,
        "rewards": session.targets,
        "guides": list(session.judges),
        "num_steps": kept_steps,
        "budget": str(budget),
        "prompts": len(prompts),
        "trials": len(made),
        "seed": seed,
    }
    if choice:
        provenance |= {"steps": sorted(sessions), "best_of_n_steps": judged["best-of-n at its best steps"][1]}
    return LiveTuning(kept, bool(low > 0), kept_steps, rewards, tflop, made, provenance)


def _payable(made: Sequence[Session], policy: Policy, budget: Budget) -> dict[int, Session]:
    """Sessions by their number of steps, those whose images a budget pays for."""
    found: dict[int, Session] = {}
    refused: list[ValueError] = []
    for one in made:
        try:
            affordable(policy, budget, one.cost_model, one.sampler.num_steps)
            found.setdefault(one.sampler.num_steps, one)
        except ValueError as error:
            refused.append(error)
    if not found:
        raise refused[-1]
    return found


def measure(
    session: Session, policy: Policy, budget: Budget, prompts: Sequence[str], seed: int
) -> tuple[FloatArray, FloatArray]:
    """Reward of the chosen image [prompts], by the session's combination of rewards, and TFLOP paid [prompts].

    Args:
        session: model and rewards.
        policy: searches.
        budget: per prompt; it pays for as many candidates as it can.
        prompts: what is painted.
        seed: of the first candidate of the first prompt; prompts are SEEDS apart.
    """
    parts = [_block(session, policy, budget, prompts, start, seed) for start in range(0, len(prompts), BLOCK)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _objective(
    session: Session, policy: Policy, budget: Budget, prompts: Sequence[str], seed: int, trial: Any
) -> float | None:
    """Mean reward; None where the trial was pruned."""
    rewards: list[float] = []
    for start in range(0, len(prompts), BLOCK):
        rewards += _block(session, policy, budget, prompts, start, seed)[0].tolist()
        trial.report(float(np.mean(rewards)), step=start)
        if trial.should_prune() and start + BLOCK < len(prompts):
            return None
    return float(np.mean(rewards))


def _block(
    session: Session, policy: Policy, budget: Budget, prompts: Sequence[str], start: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """Rewards and TFLOP of some prompts, searched together."""
    from ttsnap.core.driver import run

    count = affordable(policy, budget, session.cost_model, session.sampler.num_steps)
    some = prompts[start : start + BLOCK]
    seeds = seed + SEEDS * (start + np.arange(len(some)))[:, None] + np.arange(count)
    grid = session.engine().grid(some, seeds)
    result = run(policy, grid, session.combine, np.random.default_rng([seed, start]), keep_history=False)
    session.sampler.forget_prompts()
    return worth(session.combine, result.rewards)[:, 0], result.ledger.tflop(session.cost_model)


def _interval(differences: FloatArray) -> tuple[float, float, float]:
    """Mean and 95 % interval by bootstrap over prompts."""
    low, high = interval(lambda who: float(differences[who].mean()), len(differences))
    return float(differences.mean()), low, high
