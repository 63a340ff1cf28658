"""One sample, best-of-N, TTSp and TTSnap at equal TFLOP on held-out prompts, live, on the same candidate draws.

    python benchmarks/snap.py --prompts 200 --budgets 3.5,5,7.5          # prints the README's table as Markdown
    python benchmarks/snap.py --level shapes-hard
    python benchmarks/snap.py --part 0:100 --out a.npz                   # or in parts, on several processes, and then
    python benchmarks/snap.py --merge a.npz b.npz

TTSp looks with the clean reward on decoded x0 estimates, TTSnap with the noise-aware reward on the denoiser's features;
finished images are always judged by the clean reward. Every denoiser call, decode, look and encoded prompt is charged.
Intervals: 95 %, bootstrap over prompts. The compute multiplier says how many times its compute best-of-N would need.
Seconds are those that all threads together computed, so that other work on the machine hardly changes them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from equal_cost import SEEDS, halfwidth, search
from ttsnap.core.cost import Budget, affordable
from ttsnap.core.grid import Query
from ttsnap.live.leaderboard import interval
from ttsnap.live.session import prepare
from ttsnap.policies import BestOfN, default_policy
from ttsnap.shapes import checker, hard, scenes

METHODS = {  # name -> what follows the model's name in that of the reward, whether tuned
    "TTSp, published schedule": ("", False),
    "TTSp, tuned schedule": ("", True),
    "TTSnap, published schedule": ("-aware", False),
    "TTSnap, tuned schedule": ("-aware", True),
}
LEVELS = {
    "shapes": (checker.check, scenes.held_out_prompts, "3.5,5,7.5", 6),
    "shapes-hard": (hard.check, hard.held_out_prompts, "9,18,36", 32),
}
BASE = "best-of-N"


def finish_all(session, prompts, seeds, check):
    """Clean rewards and checker verdicts [prompts, candidates] of finished images, and seconds per candidate."""
    rewards, right = np.empty(seeds.shape), np.empty(seeds.shape)
    start = time.process_time()
    for row in range(0, len(prompts), 8):
        block = prompts[row : row + 8]
        grid = session.engine().grid(block, seeds[row : row + 8])
        everybody = np.ones(grid.seeds.shape, dtype=bool)
        rewards[row : row + 8] = grid.observe(Query(everybody, session.sampler.num_steps))[..., 0]
        for (p, c), image in grid.finished.items():
            right[row + p, c] = check(image, block[p]).all
        session.sampler.forget_prompts()
    return rewards, right, (time.process_time() - start) / seeds.size


def measure(level, prompts, seeds, budgets, most, methods, save=lambda found: None):
    """Everything per prompt: name -> array; best-of-N up to `most` from one pool. `save` is told of it as it grows."""
    found, check = {}, LEVELS[level][0]
    if BASE in methods:
        session = prepare(level, reward=level, max_batch=64)
        rewards, right, seconds = finish_all(session, prompts, seeds[:, :most], check)
        one = session.cost_model.of_plan(BestOfN().plan(1, session.sampler.num_steps)).tflop
        found |= {"pool/reward": rewards, "pool/right": right, "pool/seconds": np.full(len(prompts), seconds)}
        found["pool/tflop"] = np.full(len(prompts), one)
        found["pool/prompt"] = np.full(len(prompts), session.cost_model.prompt_tflop)
        save(found)
    for name in methods:
        if name == BASE:
            continue
        reward, tuned = METHODS[name]
        session = prepare(level, reward=level + reward, max_batch=64)
        steps = session.sampler.num_steps
        policy = session.policy if tuned else default_policy(steps)
        for gigaflop in budgets:
            n = affordable(policy, Budget(gigaflop / 1e3, "TFLOP"), session.cost_model, steps)
            start = time.process_time()
            values, right, tflop = search(session, policy, n, prompts, seeds, check)
            seconds = (time.process_time() - start) / len(prompts)
            key = f"{name}/{gigaflop:g}"
            kinds = {"reward": values, "right": right, "tflop": tflop, "seconds": np.full(len(prompts), seconds)}
            found |= {f"{key}/{kind}": value for kind, value in kinds.items()}
            found[f"{key}/started"] = np.full(len(prompts), n)
            save(found)
            print(
                f"{key}: {n} started, reward {values.mean():.3f}, right {right.mean():.3f}, {seconds:.2f} s", flush=True
            )
    return found


def best(pool, n):
    """Index of the best of the first n [prompts]."""
    return pool["pool/reward"][:, :n].argmax(1)


def multiplier(pool, tflop, reward):
    """How many times `tflop` [prompts] best-of-N needs for the mean of `reward` [prompts], by interpolation."""
    curves = np.maximum.accumulate(pool["pool/reward"], axis=1)
    sizes = np.arange(1, curves.shape[1] + 1)

    def times(who):
        needed = np.interp(reward[who].mean(), curves[who].mean(0), sizes)
        return _cost(pool, needed) / tflop[who].mean()

    low, high = interval(times, len(curves))
    beyond = "at least " if reward.mean() > curves[:, -1].mean() else ""
    return f"{beyond}x{times(slice(None)):.2f} ({low:.2f} to {high:.2f})"


def _cost(pool, n):
    prompt = pool["pool/prompt"][0]
    return n * (pool["pool/tflop"][0] - prompt) + prompt


def table(found, budgets, rng):
    """The README's table."""
    pool = found
    rows = [
        "| budget | | started | paid | reward | right | gain in reward | gain in right | compute | seconds |",
        "|" + "---|" * 10,
    ]

    def row(budget, name, started, tflop, reward, right, base, times, seconds):
        cells = [budget, name, str(started), f"{tflop * 1e3:.2f}"]
        cells += [f"{reward.mean():.2f} ± {halfwidth(reward, rng):.2f}"]
        cells += [f"{100 * right.mean():.1f} ± {100 * halfwidth(right, rng):.1f} %"]
        if base:
            gains = reward - base[0], right - base[1]
            cells += [f"{gains[0].mean():+.2f} ± {halfwidth(gains[0], rng):.2f}"]
            cells += [f"{100 * gains[1].mean():+.1f} ± {100 * halfwidth(gains[1], rng):.1f} %"]
        else:
            cells += ["", ""]
        rows.append("| " + " | ".join([*cells, times, f"{seconds:.2f}"]) + " |")

    everybody, seconds = np.arange(len(pool["pool/reward"])), pool["pool/seconds"].mean()
    first = pool["pool/reward"][:, 0], pool["pool/right"][:, 0]
    row("", "one sample", 1, _cost(pool, 1), *first, None, "", seconds)
    for gigaflop in budgets:
        prompt = pool["pool/prompt"][0]
        n = int((gigaflop / 1e3 - prompt) / (pool["pool/tflop"][0] - prompt) * (1 + 1e-12))
        chosen = best(pool, n)
        base = pool["pool/reward"][everybody, chosen], pool["pool/right"][everybody, chosen]
        row(f"{gigaflop:g} GFLOP", BASE, n, _cost(pool, n), *base, None, "", seconds * n)
        for name in METHODS:
            key = f"{name}/{gigaflop:g}"
            if f"{key}/reward" in found:
                kinds = {k: found[f"{key}/{k}"] for k in ("reward", "right", "tflop", "seconds", "started")}
                paid = kinds["tflop"].mean()
                times = multiplier(pool, kinds["tflop"], kinds["reward"])
                row(
                    "",
                    name,
                    int(kinds["started"][0]),
                    paid,
                    kinds["reward"],
                    kinds["right"],
                    base,
                    times,
                    kinds["seconds"].mean(),
                )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--level", default="shapes", choices=LEVELS)
    parser.add_argument("--budgets", help="GFLOP per prompt")
    parser.add_argument("--most", type=int, help="candidates of the pool for best-of-N")
    parser.add_argument("--part", help="prompts first:last, for several processes")
    parser.add_argument("--methods", help=f"some of {BASE}, {', '.join(METHODS)}, separated by ;")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--merge", type=Path, nargs="+", help="files of --out")
    a = parser.parse_args()
    _, held_out, budgets, most = LEVELS[a.level]
    budgets, most = [float(text) for text in (a.budgets or budgets).split(",")], a.most or most
    if a.merge:
        parts = [np.load(path) for path in a.merge]
        spans = sorted({tuple(part["part"]) for part in parts})
        found = {}
        for name in {name for part in parts for name in part.files} - {"part"}:
            by_span = {tuple(part["part"]): part[name] for part in parts if name in part.files}
            if len(by_span) == len(spans):
                found[name] = np.concatenate([by_span[span] for span in spans])
    else:
        first, last = map(int, a.part.split(":")) if a.part else (0, a.prompts)
        prompts = held_out()[first:last]
        seeds = SEEDS * (1 + np.arange(first, first + len(prompts))[:, None]) + np.arange(SEEDS)
        methods = a.methods.split(";") if a.methods else [BASE, *METHODS]
        part = np.array([first, first + len(prompts)])
        save = (lambda found: np.savez(a.out, part=part, **found)) if a.out else (lambda found: None)
        found = measure(a.level, prompts, seeds, budgets, most, methods, save)
    if "pool/reward" in found:
        print(table(found, budgets, np.random.default_rng(0)))


if __name__ == "__main__":
    main()
