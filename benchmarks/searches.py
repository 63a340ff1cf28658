"""Published searches at equal cost on the hard level, live, on the same first seeds, against best-of-N.

    python benchmarks/searches.py --budgets 18,36 --prompts 60                 # all policies, held-out prompts
    python benchmarks/searches.py --policies my.json --train --out found.npz   # one of your own, on training prompts

Every denoiser call, decode, look and encoded prompt is charged; a child pays for its own calls only. Finished images
are judged by the clean reward, which the guide is (`--guide shapes-hard`) or foretells (`shapes-hard-aware`), and by
the exact checker, which no policy sees. The compute multiplier says how many times its compute best-of-N would need
for the same mean reward; intervals are 95 %, bootstrap over prompts, multiplier and pool resampled together. What is
measured is kept in `--out`, prompt block by prompt block, and not measured again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from equal_cost import SEEDS, search
from snap import finish_all
from ttsnap import policies
from ttsnap.core.cost import Budget, affordable
from ttsnap.live.session import prepare
from ttsnap.policies import BestOfN, default_policy
from ttsnap.shapes import hard

BLOCK = 20


def contenders(steps):
    """Name -> policy; None: the schedule that ships."""
    known = {"halving, published schedule (TTSnap)": default_policy(steps), "halving, tuned": None}
    names = (
        "psp dog-trim early-selection beam dsearch svdd trajectory-greedy fk-max fk-difference fk-sum smc zero-order"
    )
    names += " epsilon-greedy search-over-paths restart best-first evosearch spectral rbf"
    return known | {name: policies.named(name) for name in names.split()}


def curve(pool, who):
    """Mean reward of best-of-1, 2, ... over prompts `who`."""
    return np.maximum.accumulate(pool[who], axis=1).mean(0)


def multiplier(pool, one, prompt, paid, reward, who):
    """How many times the compute best-of-N needs; the pool's end where it does not get there."""
    means = curve(pool, who)
    sizes = np.arange(1, len(means) + 1)
    wanted = reward[who].mean()
    n = sizes[-1] if wanted >= means[-1] else np.interp(wanted, means, sizes)
    return (n * (one - prompt) + prompt) / paid[who].mean()


def interval(function, count, times=2000):
    """95 % interval of a function of resampled prompts, by the same samples for every policy."""
    rng = np.random.default_rng(0)
    return np.percentile([function(rng.integers(count, size=count)) for _ in range(times)], [2.5, 97.5])


def plot(figures, path):
    """Multipliers with their intervals, one panel per budget: (policy, N of best-of-N) -> estimate, low, high."""
    import matplotlib.pyplot as plt

    sizes = sorted({size for _, size in figures})
    fig, axes = plt.subplots(1, len(sizes), figsize=(4.6 * len(sizes), 6), sharey=True, squeeze=False)
    names = sorted({name for name, _ in figures}, key=lambda name: figures.get((name, sizes[0]), (0,))[0])
    for axis, size in zip(axes[0], sizes, strict=True):
        for place, name in enumerate(names):
            if (name, size) in figures:
                middle, low, high = figures[name, size]
                axis.plot([low, high], [place, place], color="#7a9cc6", linewidth=4, solid_capstyle="round")
                axis.plot(middle, place, "o", color="#1f3a5f")
        axis.axvline(1, color="#999999", linewidth=1)
        axis.set(title=f"at the cost of best-of-{size}", xlabel="compute multiplier (95 %)")
        axis.set_yticks(range(len(names)), names)
        axis.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--train", action="store_true", help="training prompts, to choose by")
    parser.add_argument("--budgets", default="18,36", help="GFLOP per prompt")
    parser.add_argument("--guide", default="shapes-hard-aware")
    parser.add_argument("--most", type=int, default=32, help="candidates of the pool for best-of-N")
    parser.add_argument("--policies", nargs="*", help="names of the table, or policy files (default: all)")
    parser.add_argument("--plot", type=Path, help="a picture of the table")
    parser.add_argument("--out", type=Path, default=Path("runs/searches.npz"))
    a = parser.parse_args()
    prompts = (hard.train_prompts()[1000:] if a.train else hard.held_out_prompts())[a.first : a.first + a.prompts]
    seeds = SEEDS * (1 + a.first + np.arange(len(prompts))[:, None]) + np.arange(SEEDS)
    session = prepare("shapes-hard", reward=a.guide, max_batch=64)
    steps, model = session.sampler.num_steps, session.cost_model
    field = contenders(steps)
    if a.policies:
        field = {name: field[name] if name in field else policies.load(name) for name in a.policies}
    known = dict(np.load(a.out)) if a.out.exists() else {}
    where = "train" if a.train else "held-out"

    def measured(key, work):
        """[3, prompts]: reward, right, TFLOP."""
        parts = []
        for first in range(0, len(prompts), BLOCK):
            name = f"{where} {key} {a.first + first}"
            if name not in known:
                known[name] = np.array(work(prompts[first : first + BLOCK], seeds[first : first + BLOCK]))
                a.out.parent.mkdir(parents=True, exist_ok=True)
                np.savez(a.out.with_suffix(".new.npz"), **known)
                a.out.with_suffix(".new.npz").replace(a.out)
            parts.append(known[name])
        return np.concatenate(parts, axis=1)

    clean = prepare("shapes-hard", reward="shapes-hard", max_batch=64)
    pool, right = measured("pool", lambda p, s: finish_all(clean, p, s[:, : a.most], hard.check)[:2])
    one, prompt = clean.cost_model.of_plan(BestOfN().plan(1, steps)).tflop, clean.cost_model.prompt_tflop
    everybody = np.arange(len(prompts))
    print("| budget | policy | started | paid | reward | right | compute (95 %) |\n" + "|---" * 7 + "|")
    figures = {}
    for gigaflop in map(float, a.budgets.split(",")):
        budget = Budget(gigaflop / 1e3, "TFLOP")
        n = int((budget.amount - prompt) / (one - prompt) * (1 + 1e-12))
        best, size = pool[:, :n].argmax(1), n
        row = f"{gigaflop:g} GFLOP | best-of-N | {n} | {(n * (one - prompt) + prompt) * 1e3:.2f}"
        print(f"| {row} | {pool[everybody, best].mean():.2f} | {100 * right[everybody, best].mean():.1f} % | x1 |")
        for name, policy in field.items():
            policy = policy or session.policy
            n = affordable(policy, budget, model, steps)
            key = f"{a.guide} {gigaflop:g} {policies.to_dict(policy)} {n}"
            reward, correct, paid = measured(
                key, lambda p, s, policy=policy, n=n: search(session, policy, n, p, s, hard.check)
            )
            times = [multiplier(pool, one, prompt, paid, reward, everybody)]
            times += list(
                interval(lambda who, p=paid, r=reward: multiplier(pool, one, prompt, p, r, who), len(prompts))
            )
            row = f"| {name} | {n} | {paid.mean() * 1e3:.2f} | {reward.mean():.2f} | {100 * correct.mean():.1f} %"
            print(f"| {row} | x{times[0]:.2f} ({times[1]:.2f} to {times[2]:.2f}) |", flush=True)
            figures[name, size] = times
    if a.plot:
        plot(figures, a.plot)


if __name__ == "__main__":
    main()
