"""Full-size SDXL and FLUX with random weights on a GPU: candidates as suspended calls against one stock batch.

    python benchmarks/gpu_rehearsal.py           # under five minutes on an H100; rows go to $OUT/gpu_rehearsal.md too
    python benchmarks/gpu_rehearsal.py --train   # LoRA on the published rewards' networks instead
    python benchmarks/gpu_rehearsal.py --tiny    # the same lines on a CPU, with small blocks

Eight candidates of one prompt, from noise to the decoded picture. `stock` is one call with `num_images_per_prompt`; the
ratio is of the fastest runs, made in turns. A search's `per call` is its seconds per denoiser call of a candidate over
those of the stock batch, decodes and looks included on both sides. Peak memory is beyond the weights.
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
from ttsnap.live.engine import Clock, Engine, wait
from ttsnap.pipelines.sampler import Sampler
from ttsnap.policies import default_policy

PROMPT = "a red circle left of a blue square"
BATCH = 8
COLUMNS = (
    *("model", "px", "steps", "stock s", "ours s", "ratio", "one by one s", "largest pixel difference"),
    *("peak GiB stock / ours", "waits per call"),
)
HEAD = f"| {' | '.join(COLUMNS)} |"


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
    wait(device)
    start = time.perf_counter()
    made = work()
    wait(device)
    seconds = time.perf_counter() - start
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
    return seconds["stock"]


class Brightness:
    """A reward that takes next to no time."""

    def __call__(self, images, prompts, *, sigma):
        return images.mean((1, 2, 3))


def search(rows, name, pipe, device, size, steps, candidates, stock):
    """What a search takes with each kind of early look, how its seconds divide, and against `stock` seconds a call."""
    from ttsnap.pipelines.previews import attach

    for preview in ("full", "auto"):
        sampler = Sampler(pipe, num_inference_steps=steps, height=size, width=size)
        attach(sampler, preview)
        clock, made = Clock(), []
        for used in (clock, None):  # the first warms up
            engine = Engine(sampler, {"bright": Brightness()}, clock=used)
            grid = engine.grid([PROMPT], np.arange(candidates)[None])
            made.append(peak(device, lambda g=grid: run(default_policy(steps), g)))
        (_, timed, _), (result, seconds, gib) = made
        calls = int(result.ledger.nfe.sum())
        parts = f"{clock.calls / timed:.1%} | {clock.decodes / timed:.1%} | {clock.previews / timed:.1%}"
        rows(
            f"| {name} | {size} | {candidates} | {preview} | {calls} | {parts} | {seconds:.2f} | "
            f"{seconds / calls / stock:.3f} | {gib:.1f} |"
        )


def training(rows, device, tiny):
    """Updates of noise-aware training on the networks of published rewards: LoRA, bf16, pairs of pictures."""
    from accelerate import init_empty_weights

    import rewards
    from ttsnap.rewards import blip, clip, hpsv3
    from ttsnap.rewards.trainable import adapt, save_memory
    from ttsnap.training.losses import preference, squared_error

    if tiny:
        for sizes in (blip.SIZES, clip.VIT_H, hpsv3.SIZES):
            shallow(sizes)
    built = {
        "ImageReward (BLIP)": (rewards.imagereward, 64),
        "PickScore, HPSv2 (CLIP-H)": (lambda: rewards.clip_reward(clip.VIT_H), 64),
        "HPSv3 (Qwen2-VL-7B)": (rewards.hpsv3_reward, 16),
    }
    rows("| reward | parameters | trained | batch | checkpointing | s per update | pictures per s | peak GiB |")
    rows("|---" * 8 + "|")
    for name, (build, batch) in built.items():
        batch = 2 if tiny else batch
        for checkpointing in (False, True):
            with init_empty_weights(include_buffers=False), torch.no_grad():
                reward = build()
            materialise(reward, device, torch.bfloat16 if "Qwen" in name else torch.float32)
            trained = adapt(reward, "lora", 16, 16)
            if checkpointing:
                save_memory(reward)
            adam = torch.optim.AdamW(trained.values(), lr=1e-4)
            images = torch.rand(batch, 3, 512, 512, device=device)
            targets, weights = torch.randn(batch, device=device), torch.ones(batch, device=device)
            reward.train()

            def update(reward=reward, adam=adam, images=images, targets=targets, weights=weights):
                with torch.autocast(device.type, torch.bfloat16):
                    found = reward(images, [PROMPT] * len(images), sigma=0.5).float()
                loss = squared_error(found, targets, weights) + preference(found, targets, weights, 1.0)
                loss.backward()
                adam.step()
                adam.zero_grad()

            try:
                update()
                turns = 1 if tiny else 4
                _, seconds, gib = peak(device, lambda u=update, n=turns: [u() for _ in range(n)])
                found = f"{seconds / turns:.3f} | {turns * batch / seconds:.1f} | {gib:.1f}"
            except torch.cuda.OutOfMemoryError:
                found = "out of memory | - | -"
            rows(
                f"| {name} | {sum(p.numel() for p in reward.parameters()) / 1e6:.0f} M | "
                f"{sum(p.numel() for p in trained.values()) / 1e6:.1f} M | {batch} | {checkpointing} | {found} |"
            )
            del reward, trained, adam, update
            if device.type == "cuda":
                torch.cuda.empty_cache()


def shallow(sizes):
    """One layer instead of many, in place."""
    for name, value in sizes.items():
        if isinstance(value, dict):
            shallow(value)
        elif name in ("num_hidden_layers", "depth"):
            sizes[name] = 1


def materialise(module, device, dtype):
    """Random weights on a device for a network made without; buffers are moved."""
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None and weight.is_meta:
                data = torch.empty(weight.shape, device=device, dtype=dtype).normal_(0, 0.02)
                part._parameters[name] = torch.nn.Parameter(data, requires_grad=False)
    module.to(device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--train", action="store_true")
    a = parser.parse_args()
    device = torch.device("cpu" if a.tiny else "cuda")
    kind, dtype = ("tiny", torch.float32) if a.tiny else ("random", torch.bfloat16)
    sizes = (32, 64) if a.tiny else (512, 1024)
    rows, start = Rows(), time.perf_counter()
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rows(f"{where}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, random weights\n")
    if a.train:
        training(rows, device, a.tiny)
    else:
        generating(rows, device, dtype, kind, sizes)
    rows(f"\n{time.perf_counter() - start:.0f} s in all")


def generating(rows, device, dtype, kind, sizes):
    """Batches against stock batches, and searches, of both models."""
    tiny = kind == "tiny"
    for name, key, steps, repeats, candidates in (
        ("SDXL", "sdxl", (20, 20), (2, 1), 32),
        ("FLUX.1 dev", "flux-dev", (10, 6), (1, 1), 16),
    ):
        build, full = MODELS[f"{key}-{kind}"]
        pipe = build(device, dtype, full)
        rows(f"\n{HEAD}")
        rows("|---" * len(COLUMNS) + "|")
        alone = key == "sdxl"
        compare(rows, name, pipe, device, sizes[0], steps[0], repeats[0], alone=alone)
        stock = compare(rows, name, pipe, device, sizes[1], steps[1], repeats[1])
        rows("\n| search | px | candidates | looks | calls | in calls | decodes | previews | s | per call | peak GiB |")
        rows("|---" * 11 + "|")
        count = 4 if tiny else candidates
        search(rows, name, pipe, device, sizes[1], steps[0], count, stock / BATCH / steps[1])
        del pipe
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
