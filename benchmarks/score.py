"""How fast `ttsnap score` judges files, beside the bare loop of the model over the same pictures in memory.

    python benchmarks/score.py                 # 2,000 pictures, the reward `shapes`: docs/score.md
    python benchmarks/score.py --clip 200      # and 200 of 512 x 512 as JPEG by a CLIP ViT-B/32 of random weights

The loop has everything ready: tensors in 0..1, batches of the same size, prompts. `score` starts from files: it lists,
reads, hashes and decodes them, fits them to the reward, and keeps a journal. Both take turns; each line is the median.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ttsnap
from ttsnap import rewards
from ttsnap.shapes.scenes import render_batch, sample_scene, sample_spec

BATCH = 32


def pictures(folder: Path, count: int, size: int, suffix: str) -> np.ndarray:
    """Write pictures of the world of shapes; returns them [count, size, size, 3]."""
    rng = np.random.default_rng(0)
    images = render_batch([sample_scene(sample_spec(rng), rng) for _ in range(count)], 64)
    scaled = [np.asarray(Image.fromarray(image).resize((size, size))) for image in images]
    for number, image in enumerate(scaled):
        Image.fromarray(image).save(folder / f"{number:05d}.{suffix}")
    return np.stack(scaled)


def now() -> np.ndarray:
    """Seconds of the clock; those that this process computed, which other programs hardly change; with its readers."""
    own = time.process_time()
    return np.array([time.perf_counter(), own, own + os.times().children_user + os.times().children_system])


def bare(reward: Callable, images: torch.Tensor, prompt: str) -> np.ndarray:
    """Seconds of the model's loop."""
    start = now()
    with torch.no_grad():
        for batch in images.split(BATCH):
            reward(batch, [prompt] * len(batch), sigma=0.0).cpu()
    return now() - start


def scored(folder: Path, reward: Any, prompt: str) -> np.ndarray:
    """Seconds of `score`, from the loaded reward to the last one kept."""
    out, started = Path(tempfile.mkdtemp()), now()

    def start(_: int) -> None:
        nonlocal started
        started = now()

    found = ttsnap.score(folder, reward=reward, prompt=prompt, out=out, max_batch=BATCH, on_start=start)
    seconds = now() - started
    assert not found.faulty
    shutil.rmtree(out)
    return seconds


def compare(title: str, named: Any, count: int, size: int, suffix: str, rounds: int) -> None:
    prompt = "a red circle left of a blue square"
    (reward,) = rewards.load(named).values()
    with tempfile.TemporaryDirectory() as place:
        made = pictures(Path(place), count, size, suffix)
        images = torch.from_numpy(made).permute(0, 3, 1, 2).float() / 255
        bare(reward, images[: 2 * BATCH], prompt)
        pairs = [(bare(reward, images, prompt), scored(Path(place), named, prompt)) for _ in range(rounds)]
    loop, ours = (count / np.median([both[side][0] for both in pairs]) for side in (0, 1))
    ratios = np.sort([own / mine for own, mine in pairs], axis=0).T
    wall, computed, readers = (f"{np.median(r):.2f} ({r[0]:.2f} to {r[-1]:.2f})" for r in ratios)
    print(
        f"{title}: {count} pictures of {size} x {size} ({suffix}), loop {loop:.0f} per second, score {ours:.0f} per "
        f"second, ratio {wall}, of seconds computed {computed}, with those of the readers {readers}",
        flush=True,
    )


def vit_b() -> Callable:
    """A CLIP reward of a published size, with random weights."""
    from transformers import CLIPConfig, CLIPModel

    from ttsnap.rewards import clip

    def tokenize(prompt: str) -> torch.Tensor:
        return torch.zeros(1, 77, dtype=torch.long)

    return clip.ClipReward(CLIPModel(CLIPConfig()), tokenize, clip.transformers_crop)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--clip", type=int, default=0, help="pictures for a CLIP reward")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"{torch.get_num_threads()} threads of torch, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    compare("shapes", "shapes", given.count, 64, "png", given.rounds)
    if given.clip:
        compare("CLIP ViT-B/32", {"clip": vit_b()}, given.clip, 512, "jpg", given.rounds)


if __name__ == "__main__":
    main()
