"""What cheaper looks at x0 estimates buy at equal cost: previews on the embedded model.

    python benchmarks/previews.py --prompts 100 --candidates 48

For each kind of look the best of a grid of schedules at one budget, replayed: chosen on the even prompts, reported on
the odd ones. How the rankings agree is what `ttsnap bench` prints.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np
from rich.console import Console
from rich.table import Table

from ttsnap.core.cost import Budget, affordable
from ttsnap.live.session import load_sampler
from ttsnap.pipelines import previews
from ttsnap.pipelines.flops import cost_model
from ttsnap.policies import BestOfN, SuccessiveHalving
from ttsnap.replay.simulator import Task, replay
from ttsnap.rewards import load
from ttsnap.shapes.scenes import held_out_prompts

KEEPS = (0.15, 0.25, 0.4, 0.6)


def looks(sampler, kinds, reward, prompts, per_prompt, calls):
    """Rewards [prompts, candidates, steps] by kind of look, NaN after calls that are not looked at."""
    found = {kind: np.full((len(prompts), per_prompt, sampler.num_steps), np.nan) for kind in kinds}
    for p, prompt in enumerate(prompts):
        state = sampler.start([prompt] * per_prompt, [1000 * (p + 1) + c for c in range(per_prompt)])
        for call in (*calls, sampler.num_steps):
            state = sampler.advance(state, call)
            for kind, preview in kinds.items():
                sampler.preview = preview
                found[kind][p, :, call - 1] = reward(sampler.look(state), state.prompts, sigma=0.0).detach()
        sampler.forget_prompts()
    return found


def schedules(calls):
    """No look, one, or two."""
    yield BestOfN()
    for rungs in itertools.chain(itertools.combinations(calls, 1), itertools.combinations(calls, 2)):
        for keep in itertools.product(KEEPS, repeat=len(rungs)):
            yield SuccessiveHalving(rungs, keep)


def best_schedule(guide, model, budget, calls, trials):
    """The best schedule on even prompts, with its mean rewards by odd prompt and the candidates it starts."""
    steps, pool = guide.shape[2], guide.shape[1]
    least = model.of_plan(BestOfN().plan(1, steps)).tflop
    tasks = []
    for policy in schedules(calls):
        if model.of_plan(policy.plan(1, steps)).tflop <= budget.amount and least <= budget.amount:
            n = affordable(policy, budget, model, steps)
            if n <= pool:
                tasks.append(Task(policy, n, np.ascontiguousarray(guide[..., None])))
    results = replay(tasks, np.arange(len(guide)), trials=trials, threads=1)
    means_of = np.stack([result.by_prompt[:, 0] for result in results])
    chosen = int(means_of[:, ::2].mean(1).argmax())
    return tasks[chosen], means_of[chosen, 1::2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=48)
    parser.add_argument("--calls", default="2,3,4,5,6,7,9,12,15")
    parser.add_argument("--kinds", default="full,small,linear", help="as --preview takes them, by commas")
    parser.add_argument("--budgets", default="5,7.5,10", help="GFLOP per prompt")
    parser.add_argument("--trials", type=int, default=100)
    a = parser.parse_args()
    calls = [int(call) for call in a.calls.split(",")]
    judges = load("shapes")
    sampler = load_sampler("shapes", max_batch=a.candidates)
    kinds, models = {}, {}
    for text in a.kinds.split(","):
        previews.attach(sampler, text)
        kinds[text], models[text] = sampler.preview, cost_model(sampler, judges)
    found = looks(sampler, kinds, judges["shapes"], held_out_prompts()[: a.prompts], a.candidates, calls)
    console = Console(width=150)
    rng = np.random.default_rng(0)
    table = Table(title="the best schedule of a grid at equal cost, chosen on the even prompts; reward on the odd ones")
    for name in ("budget", "look", "started", "schedule", "reward", "gain over full decodes, ± 95 %"):
        table.add_column(name)
    for amount in a.budgets.split(","):
        budget, base = Budget.parse(f"{amount}GFLOP"), None
        for text in kinds:
            task, reward = best_schedule(found[text], models[text], budget, calls, a.trials)
            base = reward if base is None else base
            gain = reward - base
            means = gain[rng.integers(len(gain), size=(4000, len(gain)))].mean(1)
            half = np.ptp(np.percentile(means, [2.5, 97.5])) / 2
            name = task.policy if isinstance(task.policy, BestOfN) else f"{task.policy.rungs} {task.policy.keep}"
            table.add_row(
                str(budget),
                text,
                str(task.candidates),
                str(name),
                f"{reward.mean():.3f}",
                f"{gain.mean():+.3f} ± {half:.3f}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
