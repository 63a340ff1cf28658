"""Fitting a schedule to recorded rewards: how one is judged, what is searched, and how."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.core.cost import Budget
from ttsnap.core.driver import run
from ttsnap.core.grid import FloatArray, Policy
from ttsnap.core.ranking import Constrained, Rule, worth
from ttsnap.policies import BestOfN, SuccessiveHalving
from ttsnap.replay.accounting import Accounting
from ttsnap.replay.environment import ReplayEnvironment
from ttsnap.replay.statistics import best_of_n, relative_increase

if TYPE_CHECKING:
    import optuna

MAX_RUNGS = 6
NO_LOOK = 0.955  # a keep ratio from which on a look is left out
SWITCHED = 0.15  # share of the variations that put a look in, or take one out
STARTUP = 60  # schedules at random before good ones are varied
ELITE = 40  # good schedules to vary
DRAWN = 2**19  # candidates drawn to judge one schedule in the search
MOST_REPEATS = 64  # permutations of a prompt's pool: more would not say more about other prompts
FINALS = ((20, 4), (5, 16))  # how many schedules are judged again, on how many times as many candidates
BLOCK = 2**17  # candidates in one call of the driver
MISSED = 0.01  # of a bound: a schedule that misses it by so much more than best-of-N does is worse than that


class Judge:
    """Judges schedules against best-of-N, on fixed draws: the same for all schedules, others for each budget.

    The draws of a prompt are disjoint parts of permutations of its pool: every candidate is used about equally often.
    """

    def __init__(
        self,
        guide: np.ndarray,
        budgets: Sequence[Budget],
        accounting: Accounting,
        *,
        steps: tuple[int, ...] = (),
        rule: Rule,
        drawn: int = DRAWN,
        seed: int = 0,
    ) -> None:
        """Draw, and judge best-of-N.

        Args:
            guide: recorded rewards [prompts, pool, steps, rewards]; the last step is the target.
            budgets: per prompt; best-of-N can use all of them.
            accounting: how many candidates a budget pays for.
            steps: at which a schedule may look (default: all but the last).
            rule: how several rewards become one.
            drawn: about how many candidates to draw for one judgement.
            seed: of the draws.
        """
        self.guide, self.budgets, self.accounting = guide, budgets, accounting
        self.rule = rule
        self.amounts = np.array([budget.amount for budget in budgets])
        prompts, pool, self.num_steps, rewards = guide.shape
        self.steps = steps or tuple(range(1, self.num_steps))
        share = drawn / (len(budgets) * prompts)  # candidates per prompt and budget
        self.width = max(1, min(pool, int(share)))
        repeats = min(max(1, round(share / pool)), MOST_REPEATS)
        candidates = np.broadcast_to(np.arange(pool), (prompts, repeats, pool))
        first = np.arange(prompts)[:, None, None] * pool
        self.draws = [
            np.random.default_rng([seed, index]).permuted(candidates, axis=2) + first for index in range(len(budgets))
        ]
        self._known: dict[tuple[Policy, int], FloatArray | None] = {}
        final = np.asarray(guide[:, :, -1], dtype=np.float64)
        aims = worth(rule, final)
        self.aims = aims.shape[-1] - isinstance(rule, Constrained)  # the last is how far bounds are missed
        self.spread = aims[..., : self.aims].std(axis=1).mean(axis=0)
        if rule.is_order(rewards):
            sizes = np.array([accounting.candidates(BestOfN(), budget, self.num_steps) for budget in budgets])
            self.baseline = best_of_n(aims, sizes, rule(final, np.ones((prompts, pool), dtype=bool))).mean(axis=1)
        else:
            sampled = [self._reward(BestOfN(), index) for index in range(len(budgets))]
            self.baseline = np.array(sampled, dtype=np.float64)

    def gain(self, policy: Policy, which: Iterable[int] | None = None) -> float | None:
        """What a policy gains over best-of-N (see `merit`); None if more candidates than recorded would start.

        Args:
            policy: to be judged.
            which: indices of the budgets (default: all).
        """
        chosen = list(range(len(self.budgets)) if which is None else which)
        aims = np.empty((len(chosen), self.baseline.shape[1]))
        for row in reversed(range(len(chosen))):  # the largest first: it shows whether the pool is large enough
            key = policy, chosen[row]
            if key not in self._known:
                self._known[key] = self._reward(*key)
            if (reward := self._known[key]) is None:
                return None
            aims[row] = reward
        baseline, reached = self.baseline[chosen], slice(0, self.aims)
        if (missed := float((baseline - aims)[:, self.aims :].mean() if self.aims < aims.shape[1] else 0)) > MISSED:
            return -100 * missed
        return float(merit(self.amounts[chosen], aims[:, reached], baseline[:, reached], self.spread))

    def _reward(self, policy: Policy, budget: int) -> FloatArray | None:
        """Mean of what is aimed at [aims] at one budget (an index); None if more than the recorded would start."""
        size = self.accounting.candidates(policy, self.budgets[budget], self.num_steps)
        if not 1 <= size <= self.guide.shape[1]:
            return None
        draws = self.draws[budget][:, :, : max(1, self.width // size) * size].reshape(-1, size)
        rows = max(1, BLOCK // size)
        total: FloatArray = np.zeros(1)
        for start in range(0, len(draws), rows):
            environment = ReplayEnvironment(self.guide, draws=draws[start : start + rows])
            chosen = run(policy, environment, self.rule, keep_history=False).rewards
            total = total + worth(self.rule, chosen).sum(axis=0)
        return total / len(draws)


def merit(amounts: FloatArray, rewards: FloatArray, baseline: FloatArray, spread: FloatArray) -> FloatArray:
    """What rewards [..., budgets, rewards] gain over best-of-N's, the mean over rewards [...].

    Over several budgets it is the relative increase in percent; at one budget the gain in units of `spread` [rewards],
    the standard deviation of the finished images of a prompt.
    """
    if len(amounts) == 1:
        return np.asarray(((rewards - baseline)[..., 0, :] / spread).mean(axis=-1))
    increase = relative_increase(amounts, np.swapaxes(rewards, -1, -2), np.swapaxes(baseline, -1, -2))
    return np.asarray(increase.mean(axis=-1))


def explore(
    judge: Judge, *, trials: int, seed: int, proceed: Callable[[float], bool] = lambda best: True
) -> tuple[dict[SuccessiveHalving, float], int]:
    """Try schedules: at random at first, then mostly small changes of good ones, the others from Optuna's TPE model.

    Args:
        judge: on the fitting prompts.
        trials: schedules to try.
        seed: of the proposals.
        proceed: told the best gain so far after each schedule; answers whether to go on.

    Returns:
        The gains of the schedules that were judged at all budgets, and how many would have started more candidates
        than recorded.
    """
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `multivariate` is called experimental
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=STARTUP)
    pruner = optuna.pruners.PercentilePruner(20, n_startup_trials=STARTUP)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    for rungs, keep in (((0.25, 0.5), (0.4, 0.5)), ((0.15, 0.35, 0.6), (0.4, 0.4, 0.5))):
        study.enqueue_trial(_parameters(rungs, keep, judge))
    # A few budgets first: a schedule that is poor there is not judged at the others.
    coarse = sorted({*range(0, len(judge.budgets), 4), len(judge.budgets) - 1}) if len(judge.budgets) >= 8 else None
    rng = np.random.default_rng(seed)
    gains: dict[SuccessiveHalving, float] = {}
    rough: dict[SuccessiveHalving, float | None] = {}
    elite: list[tuple[float, dict[str, Any]]] = []
    for number in range(trials):
        if number and not proceed(elite[0][0] if elite else -np.inf):
            break
        if number < STARTUP and not study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.WAITING]):
            study.enqueue_trial(_random(len(judge.steps), rng))
        elif number >= STARTUP and number % 8 and elite:
            rank = rng.geometric(0.05 * 8 ** (number / trials)) - 1  # choosier towards the end
            study.enqueue_trial(_vary(elite[min(rank, len(elite) - 1)][1], len(judge.steps), rng))
        trial = study.ask()
        policy = _suggest(trial, judge.steps)
        if policy not in rough:
            rough[policy] = judge.gain(policy, coarse)
        gain = rough[policy]
        if gain is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        if coarse is not None and policy not in gains:
            trial.report(gain, step=0)
            if trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                continue
        if policy not in gains:
            gain = judge.gain(policy) if coarse is not None else gain
            assert gain is not None
            gains[policy] = gain
            elite = sorted([*elite, (gain, trial.params)], key=lambda pair: -pair[0])[:ELITE]
        study.tell(trial, gains[policy])
    return gains, sum(gain is None for gain in rough.values())


def select(judges: Iterator[Judge], gains: dict[SuccessiveHalving, float]) -> tuple[Policy, float]:
    """The best of many schedules and its gain: fewer and fewer are judged, each time on more and other draws.

    Best-of-N, with gain zero, if none is better.

    Args:
        judges: one for each round of FINALS.
        gains: what the search found.
    """
    for (keep, _), judge in zip(FINALS, judges, strict=True):
        judged = {policy: judge.gain(policy) for policy in best(gains, keep) if policy.rungs}
        gains = {policy: gain for policy, gain in judged.items() if gain is not None}
    policy = next(iter(best(gains, 1)), None)
    return (BestOfN(), 0.0) if policy is None or not gains[policy] > 0 else (policy, gains[policy])


def best(gains: dict[SuccessiveHalving, float], count: int) -> list[SuccessiveHalving]:
    """The `count` schedules that gain most."""
    return sorted(gains, key=lambda policy: -gains[policy])[:count]


def resized(judge: Judge, policies: Iterable[SuccessiveHalving]) -> dict[SuccessiveHalving, float]:
    """Gains at one budget with whole sizes in place of ratios, and with one survivor more or less at each rung."""
    gains: dict[SuccessiveHalving, float] = {}
    for policy in policies:
        plan = policy.plan(judge.accounting.candidates(policy, judge.budgets[0], judge.num_steps), judge.num_steps)
        sizes = [rung.size for rung in plan[1:]]
        for place in range(len(sizes)):
            for change in (0, -1, 1):
                near = tuple(max(1, size + change * (place == index)) for index, size in enumerate(sizes))
                schedule = SuccessiveHalving(tuple(rung.step for rung in plan[:-1]), sizes=near)
                gain = judge.gain(schedule) if schedule not in gains else None
                if gain is not None:
                    gains[schedule] = gain
    return gains


def _suggest(trial: optuna.Trial, steps: tuple[int, ...]) -> SuccessiveHalving:
    """Up to MAX_RUNGS looks; a keep ratio close to one is no look, several looks at one step are one."""
    keep: dict[int, float] = {}
    for rung in range(MAX_RUNGS):
        step = steps[trial.suggest_int(f"step {rung}", 0, len(steps) - 1)]
        ratio = trial.suggest_float(f"keep {rung}", 0.1, 1.0, step=0.01)
        if ratio < NO_LOOK:
            keep[step] = keep.get(step, 1.0) * ratio
    rungs = tuple(sorted(keep))
    return SuccessiveHalving(rungs, tuple(max(0.01, round(keep[step], 2)) for step in rungs))


def _parameters(rungs: Sequence[float], keep: Sequence[float], judge: Judge) -> dict[str, Any]:
    """What `_suggest` must draw for looks at these shares of the steps."""
    parameters: dict[str, Any] = {f"keep {rung}": 1.0 for rung in range(MAX_RUNGS)}
    for rung, (share, ratio) in enumerate(zip(rungs, keep, strict=True)):
        parameters[f"step {rung}"] = int(np.argmin(np.abs(np.array(judge.steps) - share * judge.num_steps)))
        parameters[f"keep {rung}"] = ratio
    return parameters


def _random(num_places: int, rng: np.random.Generator) -> dict[str, Any]:
    """A schedule of one to MAX_RUNGS looks anywhere: all numbers of looks are tried as often."""
    looks = rng.integers(1, MAX_RUNGS + 1)
    found: dict[str, Any] = {f"step {rung}": int(rng.integers(num_places)) for rung in range(MAX_RUNGS)}
    return found | {f"keep {r}": round(float(rng.uniform(0.1, 0.9)), 2) if r < looks else 1.0 for r in range(MAX_RUNGS)}


def _vary(parameters: dict[str, Any], num_places: int, rng: np.random.Generator) -> dict[str, Any]:
    """Change one to three of a good schedule's parameters a little; now and then put a look in, or take one out."""
    varied = dict(parameters)
    if rng.random() < SWITCHED:
        rung = rng.integers(MAX_RUNGS)
        looks = varied[f"keep {rung}"] < NO_LOOK
        varied[f"keep {rung}"] = 1.0 if looks else round(float(rng.uniform(0.3, 0.9)), 2)
        varied[f"step {rung}"] = int(rng.integers(num_places))
        return varied
    for name in rng.choice(sorted(varied), rng.integers(1, 4), replace=False):
        if name.startswith("step"):
            varied[name] = int(np.clip(varied[name] + rng.choice((-2, -1, 1, 2)), 0, num_places - 1))
        else:
            change = rng.choice((0.01, 0.02, 0.05, 0.1)) * rng.choice((-1, 1))
            varied[name] = float(np.clip(round(varied[name] + change, 2), 0.1, 1.0))
    return varied
