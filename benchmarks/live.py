"""The sampler against the stock pipeline's own batch: seconds, the fixed part, quality.

Of searches `ttsnap bench --speed` tells where the time goes.

    OMP_NUM_THREADS=1 python benchmarks/live.py                                   # the embedded model
    OMP_NUM_THREADS=1 python benchmarks/live.py --model flux-dev-tiny --size 64   # small blocks of FLUX.1's classes
    python benchmarks/live.py --model sdxl-random --size 1024 --device cuda       # full size, random bf16 weights

Models: shapes, flux-dev-random, sdxl-random (full size, made on the device), flux-dev-tiny, sdxl-tiny. Batches are
compared whole, prompt to pictures, with one stock call for as many images, by turns in one run; ratios are medians over
the pairs, with the least and the largest. The fixed part is what is left when denoiser and decoder do nothing. On a CPU
seconds are those of computing, so run with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from batches import Idle, difference, fixed_part, one_by_one, ours, seconds, stock
from random_models import MODELS
from ttsnap.core.cost import Budget, affordable
from ttsnap.core.driver import run
from ttsnap.live.session import prepare
from ttsnap.live.speed import in_turns, now
from ttsnap.pipelines.sampler import Sampler
from ttsnap.policies import BestOfN
from ttsnap.shapes.scenes import held_out_prompts


def against_stock(sampler, batch, repeats):
    """Cells of a row: the sampler and one stock call for as many images, and stock calls one by one."""
    device = sampler.device
    mine, theirs = ours(sampler, batch), stock(sampler, batch)
    works = {"ours": lambda: ours(sampler, batch), "stock": lambda: stock(sampler, batch)}
    took, _ = in_turns(works, device, repeats)
    ratios = took["ours"] / took["stock"]
    alone = seconds(lambda: one_by_one(sampler, batch), device)
    return (
        f"{took['ours'].min():.4g}",
        f"{took['stock'].min():.4g}",
        f"{np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})",
        f"{took['ours'].min() / took['stock'].min():.3f}",
        f"{alone:.4g}",
        f"{difference(mine, theirs)[1]:.2g}",
    )


def profiled(sampler, batch, rows):
    """Where the fixed part goes: functions by their own time, when the models do nothing."""
    profile = cProfile.Profile()
    with Idle(sampler.pipe):
        ours(sampler, batch)
        profile.runcall(ours, sampler, batch)
    stats = pstats.Stats(profile)
    by_own = sorted(stats.stats.items(), key=lambda item: -item[1][2])
    for (file, line, name), (_, count, own, whole, _) in by_own[:rows]:
        yield f"{Path(file).name}:{line} {name}", str(count), f"{1e3 * own:.1f}", f"{1e3 * whole:.1f}"


def quality(budgets, prompts):
    """Seconds per prompt that best-of-N takes for the mean reward that the default search has, on shapes."""
    session = prepare("shapes", max_batch=64)
    sampler, steps = session.sampler, session.sampler.num_steps
    texts = held_out_prompts()[:prompts]

    def measured(policy, n):
        seeds = 1000 * (1 + np.arange(prompts)[:, None]) + np.arange(n)
        start = now(sampler.device)
        result = run(policy, session.engine().grid(texts, seeds))
        return (now(sampler.device) - start) / prompts, float(result.rewards[:, 0].mean())

    curve = [measured(BestOfN(), n) for n in (1, 2, 3, 4, 6, 8, 12)]
    rewards = np.maximum.accumulate([reward for _, reward in curve])
    for text in budgets.split(","):
        n = affordable(session.policy, Budget.parse(f"{text}GFLOP"), session.cost_model, steps)
        took, reward = measured(session.policy, n)
        same = np.interp(reward, rewards, [took for took, _ in curve]) if reward <= rewards[-1] else np.inf
        yield (
            f"{text} GFLOP: reward {reward:.2f}",
            f"{took * 1e3:.0f} ms",
            f"{same * 1e3:.0f} ms",
            f"x{same / took:.2f}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["shapes", *MODELS], default="shapes")
    parser.add_argument("--size", type=int, default=512, help="pixels (64 for shapes)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", default="1,8,16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=40, help="for seconds at equal quality, on shapes")
    parser.add_argument("--budgets", default="5,7.5,10", help="GFLOP, for the same")
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS", help="of the fixed part, on shapes")
    a = parser.parse_args()
    device = torch.device(a.device)
    if a.model == "shapes":
        pipe = prepare("shapes", device=a.device, num_inference_steps=a.steps).sampler.pipe
        options = {"height": 64, "width": 64, "max_sequence_length": 12}
    else:
        build, full = MODELS[a.model]
        pipe = build(device, torch.bfloat16 if full else torch.float32, full)
        options = {"height": a.size, "width": a.size}

    def make(steps):
        return Sampler(pipe, max_batch=32, num_inference_steps=steps, **options)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    console = Console(width=130)
    console.print(f"{a.model}, {options['width']} px, {a.steps} steps, {name}, {a.repeats} repetitions")
    table = Table(
        "batch",
        "s, the sampler",
        "s, one stock call",
        "ratio: median (least to largest)",
        "of the least",
        "s, stock one by one",
        "largest difference of 255",
        title="a batch, prompt to pictures (aim: ratio at most 1.05 at 8, 1.03 at 16)",
    )
    sampler = make(a.steps)
    for batch in map(int, a.batches.split(",")):
        table.add_row(str(batch), *against_stock(sampler, batch, a.repeats))
    console.print(table)
    if a.model == "shapes" and device.type == "cpu":
        table = Table(
            "candidates",
            "ms once per candidate",
            "ms per step and candidate",
            title="beyond one stock call, models idle (aim: at most 3 and .2)",
        )
        for batch in (8, 16, 32):
            once, step = fixed_part(make, batch, 4, a.steps, 4 * a.repeats)
            table.add_row(str(batch), f"{once:.2f}", f"{step:.3f}")
        console.print(table)
        if a.profile:
            table = Table("function", "calls", "ms, its own", "ms, with what it calls", title="16 candidates, idle")
            for row in profiled(sampler, 16, a.profile):
                table.add_row(*row)
            console.print(table)
    if a.model == "shapes" and a.prompts:
        table = Table(
            "budget", "search", "best-of-N for the same reward", "ratio", title=f"seconds, {a.prompts} prompts"
        )
        for row in quality(a.budgets, a.prompts):
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
