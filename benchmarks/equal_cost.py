"""One sample, best-of-N and successive halving at equal TFLOP on held-out prompts, same candidate draws.

    python benchmarks/equal_cost.py --prompts 200 --budgets 5,7.5,10

Every denoiser call, decode, look and encoded prompt is charged. Intervals: 95 %, bootstrap over prompts.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from ttsnap.core.cost import Budget, affordable
from ttsnap.core.driver import run
from ttsnap.live.session import prepare
from ttsnap.policies import BestOfN, default_policy
from ttsnap.shapes.checker import check
from ttsnap.shapes.scenes import held_out_prompts

SEEDS = 1000  # of one prompt: those of two prompts never meet
COLUMNS = (
    "budget",
    "method",
    "candidates",
    "GFLOP paid",
    "reward",
    "all constraints met",
    "reward gain",
    "accuracy gain",
)


def search(session, policy, candidates, prompts, seeds, check=check):
    """Reward and checker verdict of the chosen image of each prompt, and the TFLOP each paid."""
    rewards, right, tflop = [], [], []
    for start in range(0, len(prompts), 8):
        block = prompts[start : start + 8]
        grid = session.engine().grid(block, seeds[start : start + 8, :candidates])
        result = run(policy, grid)
        rewards += result.rewards[:, 0].tolist()
        right += [check(grid.finished[p, int(c)], block[p]).all for p, c in enumerate(result.chosen)]
        tflop += result.ledger.tflop(session.cost_model).tolist()
    return np.array(rewards), np.array(right, dtype=float), np.array(tflop)


def halfwidth(values, rng):
    """Half the width of the 95 % interval of the mean, by bootstrap over prompts."""
    means = values[rng.integers(len(values), size=(4000, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return (high - low) / 2


def interval(values, rng):
    """Mean and half the width of its 95 % interval."""
    return f"{values.mean():.3f} ± {halfwidth(values, rng):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--budgets", default="5,7.5,10", help="GFLOP per prompt")
    a = parser.parse_args()
    prompts = held_out_prompts()[: a.prompts]
    seeds = SEEDS * (1 + np.arange(len(prompts))[:, None]) + np.arange(SEEDS)
    session = prepare("shapes", reward="shapes", max_batch=64)
    steps = session.sampler.num_steps
    methods = {
        "best-of-N": BestOfN(),
        "halving, clean reward (TTSp)": default_policy(steps),
        "tuned, clean reward": session.policy,
    }
    rng = np.random.default_rng(0)
    table = Table(
        title=f"{len(prompts)} held-out prompts, shapes, {steps} steps; mean ± 95 % interval; gains over best-of-N"
    )
    for name in COLUMNS:
        table.add_column(name)
    reward, right, tflop = search(session, BestOfN(), 1, prompts, seeds)
    table.add_row("", "one sample", "1", f"{tflop.mean() * 1e3:.2f}", interval(reward, rng), interval(right, rng))
    for gigaflop in a.budgets.split(","):
        budget = Budget.parse(f"{gigaflop}GFLOP")
        base = None
        for name, policy in methods.items():
            n = affordable(policy, budget, session.cost_model, steps)
            reward, right, tflop = search(session, policy, n, prompts, seeds)
            gains = ["", ""] if base is None else [interval(reward - base[0], rng), interval(right - base[1], rng)]
            base = base or (reward, right)
            paid = f"{tflop.mean() * 1e3:.2f}"
            table.add_row(str(budget), name, str(n), paid, interval(reward, rng), interval(right, rng), *gains)
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
