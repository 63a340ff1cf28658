"""Where the time of a live search goes, against the stock pipeline's own loop, and what its candidates take of memory.

    python benchmarks/live.py --model shapes                                    # the embedded model, two cores
    python benchmarks/live.py --model flux-dev-tiny --size 64                   # small blocks of the classes of FLUX.1
    python benchmarks/live.py --model flux-dev-random --size 1024 --device cuda # full size, random bf16 weights

Models: shapes, flux-dev-random, sdxl-random (full size, made on the device), flux-dev-tiny, sdxl-tiny. Seconds per call
are differences of runs with many and with few steps, in turns, so that prompts, noise and decoding cancel out; on a CPU
they are seconds of computing, so run with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from random_models import MODELS
from ttsnap import samplers
from ttsnap.cost import Budget, affordable
from ttsnap.environments.live import LiveEnvironment
from ttsnap.generation import prepare
from ttsnap.policies import BestOfN, default_policy
from ttsnap.samplers import previews
from ttsnap.samplers.flops import cost_model
from ttsnap.search import run
from ttsnap.shapes.scenes import held_out_prompts

PROMPT = "a red circle left of a blue square"


def wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device) -> float:
    """Seconds; on a CPU those that this process computed, which other programs on the machine hardly change."""
    wait(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def seconds(work, device) -> float:
    start = now(device)
    work()
    return now(device) - start


def per_call(make, pipe, batch, few, many, repeats):
    """Seconds of one call of a batch: ttsnap's and the stock pipeline's, from the fastest of runs in turns."""
    short, long = (make(num_steps=steps) for steps in (few, many))
    device = long.device

    def mine(sampler):
        sampler.forget_prompts()
        sampler.advance(sampler.start([PROMPT] * batch, list(range(batch))), sampler.num_steps)

    def theirs(sampler):
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(batch)]
        pipe([PROMPT] * batch, generator=generators, output_type="latent", **sampler.call_options())

    for work in (mine, theirs):
        work(short)
    best = {}
    for _ in range(repeats):
        for work, sampler in itertools.product((mine, theirs), (short, long)):
            took = seconds(lambda w=work, s=sampler: w(s), device)
            best[work, sampler] = min(took, best.get((work, sampler), np.inf))
    return [(best[work, long] - best[work, short]) / (many - few) for work in (mine, theirs)]


def shares(sampler, judges, policy, candidates, repeats):
    """Share of a search's time in calls, decodes, previews, looks and everything else; means over searches."""
    parts = []
    for number in range(repeats + 1):
        seeds = 1000 * number + np.arange(candidates)[None]
        environment = LiveEnvironment(sampler, judges, [PROMPT], seeds, previews=True)
        start = time.perf_counter()
        run(policy, environment)
        wait(sampler.device)
        wall = time.perf_counter() - start
        clock = environment.clock
        busy = [clock.calls, clock.decodes, clock.previews, clock.looks]
        parts.append([part / wall for part in (*busy, wall - sum(busy))])
    return np.mean(parts[1:], axis=0)


def memory(sampler, judges, policy, candidates):
    """MiB of a search beyond what was there before: the peak, and what the environment still holds in the end."""
    cuda = sampler.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(sampler.device)
        before = torch.cuda.memory_allocated(sampler.device)
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # Linux: what earlier searches freed is given back,
        Path("/proc/self/clear_refs").write_text("5")  # and the peak starts from now
        before = resident("VmRSS")
    environment = LiveEnvironment(sampler, judges, [PROMPT], np.arange(candidates)[None])
    run(policy, environment)
    peak = torch.cuda.max_memory_allocated(sampler.device) if cuda else resident("VmHWM")
    return f"{(peak - before) / 2**20:.0f}", f"{environment.held() / 2**20:.2f}"


def resident(field):
    """Bytes of this process in main memory: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def quality(budgets, prompts):
    """Seconds per prompt that best-of-N takes for the mean reward that the default search has, on shapes."""
    searcher = prepare("shapes", max_batch=64)
    sampler, judges, steps = searcher.sampler, searcher.judges, searcher.sampler.num_steps
    texts = held_out_prompts()[:prompts]

    def measured(policy, n):
        seeds = 1000 * (1 + np.arange(prompts)[:, None]) + np.arange(n)
        environment = LiveEnvironment(sampler, judges, texts, seeds)
        start = now(sampler.device)
        result = run(policy, environment)
        return (now(sampler.device) - start) / prompts, float(result.rewards[:, 0].mean())

    curve = [measured(BestOfN(), n) for n in (1, 2, 3, 4, 6, 8, 12)]
    rewards = np.maximum.accumulate([reward for _, reward in curve])
    for text in budgets.split(","):
        n = affordable(searcher.policy, Budget.parse(f"{text}GFLOP"), searcher.cost_model, steps)
        took, reward = measured(searcher.policy, n)
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
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--candidates", default="8,32", help="for shares and memory")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--preview", help="as of ttsnap generate")
    parser.add_argument("--prompts", type=int, default=40, help="for seconds at equal quality, on shapes")
    parser.add_argument("--budgets", default="5,7.5,10", help="GFLOP, for the same")
    a = parser.parse_args()
    device = torch.device(a.device)
    if a.model == "shapes":
        searcher = prepare("shapes", device=a.device, num_steps=a.steps)
        pipe, judges, policy = searcher.sampler.pipe, searcher.judges, searcher.policy
        options = {"height": 64, "width": 64, "max_sequence_length": 12}
    else:
        build, full = MODELS[a.model]
        pipe = build(device, torch.bfloat16 if full else torch.float32, full)
        judges, policy = {"brightness": Brightness()}, default_policy(a.steps)
        options = {"height": a.size, "width": a.size}

    def make(num_steps, max_batch=32):
        return samplers.for_pipeline(pipe, num_steps=num_steps, max_batch=max_batch, **options)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    console = Console(width=110)
    console.print(f"{a.model}, {options['width']} px, {a.steps} steps, {name}")
    table = Table("batch", "s per call", "stock pipeline", "ratio", title="denoiser calls")
    for batch in map(int, a.batches.split(",")):
        ours, stock = per_call(make, pipe, batch, max(1, a.steps // 4), a.steps, a.repeats)
        table.add_row(str(batch), f"{ours:.4g}", f"{stock:.4g}", f"{ours / stock:.3f}")
    console.print(table)
    sampler = make(a.steps)
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
