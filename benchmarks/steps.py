"""The number of steps: best-of-N at several, at equal cost, beside what more steps buy in fidelity.

    python benchmarks/steps.py --level shapes-hard --prompts 60 --budgets 9,18
    python benchmarks/steps.py --level shapes --prompts 120 --budgets 2.3,4.6

Held-out prompts, the same seeds for all; every call, decode, look and encoded prompt is charged. "right" is the exact
checker's verdict on the chosen image, "fidelity" how cleanly it is drawn (0..1, `ttsnap.shapes.checker.fidelity`); both
steer nothing. `one` is the mean over all candidates. Intervals: 95 %, bootstrap over prompts. What is measured is kept
in `--out` and not measured again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from equal_cost import SEEDS, halfwidth
from snap import LEVELS
from ttsnap.core.grid import Query
from ttsnap.live.session import prepare
from ttsnap.policies import BestOfN
from ttsnap.shapes import checker, hard

DETECT = {"shapes": checker.detect, "shapes-hard": hard.detect}
BLOCK = 10


def finished(session, level, prompts, seeds):
    """Clean reward, verdict and fidelity [3, prompts, candidates] of finished images."""
    check = LEVELS[level][0]
    found = np.empty((3, *seeds.shape))
    grid = session.engine().grid(prompts, seeds)
    found[0] = grid.observe(Query(np.ones(seeds.shape, dtype=bool), session.sampler.num_steps))[..., 0]
    for place, image in grid.finished.items():
        things = DETECT[level](image)
        found[1:, *place] = check(image, prompts[place[0]]).all, checker.fidelity(things)
    session.sampler.forget_prompts()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=list(LEVELS), default="shapes-hard")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--steps", default="3,4,6,8,12,20")
    parser.add_argument("--budgets", default="9,18", help="GFLOP per prompt")
    parser.add_argument("--out", type=Path, default=Path("runs/steps.npz"))
    a = parser.parse_args()
    prompts = LEVELS[a.level][1]()[: a.prompts]
    known = dict(np.load(a.out)) if a.out.exists() else {}
    budgets, rng = sorted(map(float, a.budgets.split(","))), np.random.default_rng(0)
    columns = [f"{kind} at {budget:g} GFLOP" for budget in budgets for kind in ("N", "reward", "right", "fidelity")]
    print(f"| steps | one: GFLOP | reward | right | fidelity | {' | '.join(columns)} |\n{'|---' * (5 + len(columns))}|")
    for steps in map(int, a.steps.split(",")):
        session = prepare(a.level, reward=a.level, num_inference_steps=steps, max_batch=64)
        one, text = session.cost_model.of_plan(BestOfN().plan(1, steps)).tflop, session.cost_model.prompt_tflop
        sizes = [max(1, int((budget / 1e3 - text) / (one - text) * (1 + 1e-12))) for budget in budgets]
        seeds = SEEDS * (1 + np.arange(len(prompts))[:, None]) + np.arange(sizes[-1])
        parts = []
        for first in range(0, len(prompts), BLOCK):
            key = f"{a.level} {steps} {first} {sizes[-1]}"
            if key not in known:
                known[key] = finished(session, a.level, prompts[first : first + BLOCK], seeds[first : first + BLOCK])
                a.out.parent.mkdir(parents=True, exist_ok=True)
                np.savez(a.out.with_suffix(".new.npz"), **known)
                a.out.with_suffix(".new.npz").replace(a.out)
            parts.append(known[key])
        pool = np.concatenate(parts, axis=1)[:, : len(prompts)]
        row = [f"{steps}", f"{one * 1e3:.2f}", *(f"{value:.3g}" for value in pool.mean(axis=(1, 2)))]
        for size in sizes:
            best = pool[0, :, :size].argmax(axis=1)
            chosen = np.take_along_axis(pool, best[None, :, None], axis=2)[..., 0]
            spread = [halfwidth(values, rng) for values in chosen]
            row += [f"{size}", *(f"{v.mean():.3g} ± {s:.2g}" for v, s in zip(chosen, spread, strict=True))]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
