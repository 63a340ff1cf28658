"""A live search against the stock pipeline's own batch: seconds, the sampler's fixed part, shares, memory, quality.

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
import ctypes
import pstats
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from batches import PROMPT, Idle, difference, fixed_part, in_turns, now, one_by_one, ours, seconds, stock, wait
from random_models import MODELS
from ttsnap.core.cost import Budget, affordable
from ttsnap.core.driver import run
from ttsnap.live.engine import Clock, Engine
from ttsnap.live.session import prepare
from ttsnap.pipelines import previews
from ttsnap.pipelines.flops import cost_model
from ttsnap.pipelines.sampler import Sampler
from ttsnap.policies import BestOfN, default_policy
from ttsnap.shapes.scenes import held_out_prompts


def against_stock(sampler, batch, repeats):
    """Cells of a row: the sampler and one stock call for as many images, and stock calls one by one."""
    device = sampler.device
    mine, theirs = ours(sampler, batch), stock(sampler, batch)
    works = {"ours": lambda: ours(sampler, batch), "stock": lambda: stock(sampler, batch)}
    took = in_turns(works, device, repeats)
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


def shares(sampler, judges, policy, candidates, repeats):
    """Share of a search's time in calls, decodes, previews, looks and everything else; means over searches."""
    parts = []
    for number in range(repeats + 1):
        seeds = 1000 * number + np.arange(candidates)[None]
        clock = Clock()
        grid = Engine(sampler, judges, clock=clock).grid([PROMPT], seeds, previews=True)
        start = time.perf_counter()
        run(policy, grid)
        wait(sampler.device)
        wall = time.perf_counter() - start
        busy = [clock.calls, clock.decodes, clock.previews, clock.looks]
        parts.append([part / wall for part in (*busy, wall - sum(busy))])
    return np.mean(parts[1:], axis=0)


def memory(sampler, judges, policy, candidates):
    """MiB of a search beyond what was there before: the peak, and what the grid still holds in the end."""
    cuda = sampler.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(sampler.device)
        before = torch.cuda.memory_allocated(sampler.device)
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # Linux: what earlier searches freed is given back,
        Path("/proc/self/clear_refs").write_text("5")  # and the peak starts from now
        before = resident("VmRSS")
    grid = Engine(sampler, judges).grid([PROMPT], np.arange(candidates)[None])
    run(policy, grid)
    peak = torch.cuda.max_memory_allocated(sampler.device) if cuda else resident("VmHWM")
    return f"{(peak - before) / 2**20:.0f}", f"{grid.held() / 2**20:.2f}"


def resident(field):
    """Bytes of this process in main memory: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


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


class Brightness:
    """A reward that takes next to no time, so that what is left is the search itself."""

    def __call__(self, images, prompts, *, sigma):
        return images.mean((1, 2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["shapes", *MODELS], default="shapes")
    parser.add_argument("--size", type=int, default=512, help="pixels (64 for shapes)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", default="1,8,16")
    parser.add_argument("--candidates", default="8,32", help="for shares and memory")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--preview", help="as of ttsnap generate")
    parser.add_argument("--prompts", type=int, default=40, help="for seconds at equal quality, on shapes")
    parser.add_argument("--budgets", default="5,7.5,10", help="GFLOP, for the same")
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS", help="of the fixed part, on shapes")
    a = parser.parse_args()
    device = torch.device(a.device)
    if a.model == "shapes":
        session = prepare("shapes", device=a.device, num_inference_steps=a.steps)
        pipe, judges, policy = session.sampler.pipe, session.judges, session.policy
        options = {"height": 64, "width": 64, "max_sequence_length": 12}
    else:
        build, full = MODELS[a.model]
        pipe = build(device, torch.bfloat16 if full else torch.float32, full)
        judges, policy = {"brightness": Brightness()}, default_policy(a.steps)
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
    previews.attach(sampler, a.preview)
    model = cost_model(sampler, judges)
    table = Table(
        "candidates", "calls", "decodes", "previews", "looks", "all else", title=f"share of a search ({policy})"
    )
    rest = Table("candidates", "peak beyond the model, MiB", "held by the search, MiB", title="memory on the device")
    for candidates in map(int, a.candidates.split(",")):
        part = shares(sampler, judges, policy, candidates, a.repeats)
        table.add_row(str(candidates), *(f"{100 * share:.1f} %" for share in part))
        rest.add_row(str(candidates), *memory(sampler, judges, policy, candidates))
    console.print(table)
    console.print(rest)
    console.print(
        f"a call {model.call_tflop:.4g} TFLOP, a decode {model.decode_tflop:.4g}; early looks: {model.look(1)}"
    )
    if a.model == "shapes" and a.prompts:
        table = Table(
            "budget", "search", "best-of-N for the same reward", "ratio", title=f"seconds, {a.prompts} prompts"
        )
        for row in quality(a.budgets, a.prompts):
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
