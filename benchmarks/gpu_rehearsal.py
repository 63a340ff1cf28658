"""Full-size SDXL and FLUX with random weights on a GPU: candidates as suspended calls against one stock batch.

    python benchmarks/gpu_rehearsal.py           # under five minutes on an H100; rows go to $OUT/gpu_rehearsal.md too
    python benchmarks/gpu_rehearsal.py --tiny    # the same lines on a CPU, with small blocks

Eight candidates of one prompt, from noise to the decoded picture. `stock` is one call with `num_images_per_prompt`; the
ratio is of the fastest runs, made in turns. Peak memory is beyond the weights.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from random_models import MODELS
from ttsnap.core.driver import run
from ttsnap.live.engine import Clock, Engine
from ttsnap.pipelines.sampler import Sampler
from ttsnap.policies import SuccessiveHalving

PROMPT = "a red circle left of a blue square"
BATCH = 8
COLUMNS = (
    *("model", "px", "steps", "stock s", "ours s", "ratio", "one by one s", "largest pixel difference"),
    *("peak GiB stock / ours", "waits per call"),
)
HEAD = f"| {' | '.join(COLUMNS)} |"


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Rows:
    """Prints rows, and keeps them as soon as they are there."""

    def __init__(self):
        out = os.environ.get("OUT")
        self.file = Path(out) / "gpu_rehearsal.md" if out else None

    def __call__(self, line):
        print(line, flush=True)
        if self.file:
            with self.file.open("a") as file:
                file.write(line + "\n")


def peak(device, work):
    """What work made, its seconds, and GiB beyond what was there."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = now(device)
    made = work()
    seconds = now(device) - start
    gib = (torch.cuda.max_memory_allocated(device) - before) / 2**30 if device.type == "cuda" else 0.0
    return made, seconds, gib


def syncs(sampler, device):
    """Times that the host waited for the device, per denoiser call of a batch."""
    if device.type != "cuda":
        return float("nan")
    state = sampler.advance(sampler.start([PROMPT] * BATCH, range(BATCH)), 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        sampler.advance(state, sampler.num_steps - 1)
        torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchroniz" in str(w.message).lower()]
    return len(found) / (sampler.num_steps - 2)


def compare(rows, name, pipe, device, size, steps, repeats, alone=False):
    arguments = {"num_inference_steps": steps, "height": size, "width": size}
    sampler = Sampler(pipe, **arguments, max_batch=BATCH)
    assert not sampler.notes, sampler.notes

    def stock():
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(BATCH)]
        made = pipe(PROMPT, **arguments, num_images_per_prompt=BATCH, generator=generators, output_type="np").images
        return torch.from_numpy(np.asarray(made)).movedim(-1, 1)

    def ours(limit=BATCH):
        sampler.max_batch = limit
        return sampler.look(sampler.advance(sampler.start([PROMPT] * BATCH, range(BATCH)), steps)).cpu()

    runs = {"stock": [], "ours": []}
    for turn in range(repeats + 1):
        for kind, work in (("stock", stock), ("ours", ours)):
            sampler.forget_prompts()
            runs[kind].append(peak(device, work))
        if not turn:  # the first ones warm up
            difference = float((runs["stock"][0][0] - runs["ours"][0][0]).abs().max())
    seconds = {kind: min(run[1] for run in made[1:]) for kind, made in runs.items()}
    memory = {kind: max(run[2] for run in made) for kind, made in runs.items()}
    single = f"{peak(device, lambda: ours(1))[1]:.2f}" if alone else "-"
    rows(
        f"| {name} | {size} | {steps} | {seconds['stock']:.3f} | {seconds['ours']:.3f} | "
        f"{seconds['ours'] / seconds['stock']:.3f} | {single} | {difference:.1e} | "
        f"{memory['stock']:.1f} / {memory['ours']:.1f} | {syncs(sampler, device):.2f} |"
    )


class Brightness:
    """A reward that takes next to no time."""

    def __call__(self, images, prompts, *, sigma):
        return images.mean((1, 2, 3))


def shares(rows, name, pipe, device, size, steps, candidates):
    """Where the time of a search goes, and how long it takes without the clock that waits for the device."""
    sampler = Sampler(pipe, num_inference_steps=steps, height=size, width=size)
    policy = SuccessiveHalving((3, 7, 12), keep=(0.4, 0.4, 0.5))
    clock = Clock()
    parts = []
    for used in (None, clock, None):
        engine = Engine(sampler, {"bright": Brightness()}, clock=used)
        _, seconds, gib = peak(device, lambda e=engine: run(policy, e.grid([PROMPT], np.arange(candidates)[None])))
        parts.append((seconds, gib))
    timed = parts[1][0]
    rest = timed - clock.calls - clock.decodes - clock.looks - clock.previews
    rows(
        f"| {name} | {size} | {candidates} | {clock.calls / timed:.1%} | {clock.decodes / timed:.1%} | "
        f"{(rest + clock.looks) / timed:.1%} | {timed:.2f} | {parts[2][0]:.2f} | {parts[2][1]:.1f} |"
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    device = torch.device("cpu" if tiny else "cuda")
    kind, dtype = ("tiny", torch.float32) if tiny else ("random", torch.bfloat16)
    sizes = (32, 64) if tiny else (512, 1024)
    rows, start = Rows(), time.perf_counter()
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rows(f"{where}, torch {torch.__version__}, batch {BATCH}, {str(dtype).removeprefix('torch.')}, random weights\n")
    rows(HEAD)
    rows("|---" * 10 + "|")
    build, full = MODELS[f"sdxl-{kind}"]
    pipe = build(device, dtype, full)
    steps = 5 if tiny else 20
    compare(rows, "SDXL", pipe, device, sizes[0], steps, 2, alone=True)
    compare(rows, "SDXL", pipe, device, sizes[1], steps, 1)
    rows("\n| search | px | candidates | calls | decodes | all else | s with the clock | s | peak GiB |")
    rows("|---" * 9 + "|")
    shares(rows, "SDXL", pipe, device, sizes[1], 20, 4 if tiny else 32)
    del pipe
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rows(f"\n{HEAD}")
    rows("|---" * 10 + "|")
    build, full = MODELS[f"flux-dev-{kind}"]
    pipe = build(device, dtype, full)
    compare(rows, "FLUX.1 dev", pipe, device, sizes[0], 10, 1)
    compare(rows, "FLUX.1 dev", pipe, device, sizes[1], 6, 1)
    rows(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
