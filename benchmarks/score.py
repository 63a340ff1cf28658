"""How fast `ttsnap score` judges files, beside the bare loop of the model over the same pictures in memory.

    python benchmarks/score.py                 # 2,000 pictures, the reward `shapes`: docs/score.md
    python benchmarks/score.py --clip 200      # and 200 of 512 x 512 as JPEG, a small random CLIP reward

The loop has everything ready: tensors in 0..1, batches of the same size, prompts. `score` starts from files: it lists,
reads, hashes and decodes them, fits them to the reward, and keeps a journal. Both take turns; each line is the median.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ttsnap
from ttsnap import rewards
from ttsnap.shapes.scenes import render_batch, sample_scene, sample_spec

sys.path.insert(0, str(Path(__file__).parents[1]))  # the small checkpoints are those of the tests

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
    """Seconds of the clock, and those that this process computed, which other programs on the machine hardly change."""
    return np.array([time.perf_counter(), time.process_time()])


def bare(reward: Callable, images: torch.Tensor, prompt: str) -> np.ndarray:
    """Seconds of the model's loop."""
    start = now()
    with torch.no_grad():
        for batch in images.split(BATCH):
            reward(batch, [prompt] * len(batch), sigma=0.0).cpu()
    return now() - start


def scored(folder: Path, name: str, prompt: str) -> np.ndarray:
    """Seconds of `score`, from the loaded reward to the last one kept."""
    out, started = Path(tempfile.mkdtemp()), now()

    def start(_: int) -> None:
        nonlocal started
        started = now()

    found = ttsnap.score(folder, reward=name, prompt=prompt, out=out, max_batch=BATCH, on_start=start)
    seconds = now() - started
    assert not found.faulty
    shutil.rmtree(out)
    return seconds


def compare(title: str, name: str, count: int, size: int, suffix: str, rounds: int) -> None:
    prompt = "a red circle left of a blue square"
    (reward,) = rewards.load(name).values()
    with tempfile.TemporaryDirectory() as place:
        made = pictures(Path(place), count, size, suffix)
        images = torch.from_numpy(made).permute(0, 3, 1, 2).float() / 255
        bare(reward, images[: 2 * BATCH], prompt)
        pairs = [(bare(reward, images, prompt), scored(Path(place), name, prompt)) for _ in range(rounds)]
    loop, ours = (count / np.median([both[side][0] for both in pairs]) for side in (0, 1))
    wall, computed = np.sort([own / mine for own, mine in pairs], axis=0).T
    print(
        f"{title}: {count} pictures of {size} x {size} ({suffix}), loop {loop:.0f} per second, score {ours:.0f} per "
        f"second, ratio {np.median(wall):.2f} ({wall[0]:.2f} to {wall[-1]:.2f}), of seconds computed "
        f"{np.median(computed):.2f} ({computed[0]:.2f} to {computed[-1]:.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--clip", type=int, default=0, help="pictures for a random CLIP reward")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"{torch.get_num_threads()} threads of torch, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    compare("shapes", "shapes", given.count, 64, "png", given.rounds)
    if given.clip:
        from tests.rewards import reference

        with tempfile.TemporaryDirectory() as place:
            state = reference.to_transformers(reference.open_clip_state(len(reference.clip_tokenizer())))
            reference.save_clip(Path(place), "model.safetensors", state)
            compare("random CLIP", f"clipscore={place}", given.clip, 512, "jpg", given.rounds)


if __name__ == "__main__":
    main()
