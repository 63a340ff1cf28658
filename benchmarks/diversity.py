"""What negative token merging does to the finished images of a prompt, on the embedded model.

    python benchmarks/diversity.py --prompts 60

Same seeds for every row. Distance: root mean square difference of two images (0..1) of one prompt, mean over all pairs.
Intervals: 95 %, bootstrap over prompts.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from equal_cost import SEEDS, interval
from ttsnap.live.session import load_sampler
from ttsnap.pipelines.negtome import attach, parse
from ttsnap.pipelines.outputs import to_uint8
from ttsnap.shapes.checker import check
from ttsnap.shapes.reward import load_reward
from ttsnap.shapes.scenes import held_out_prompts

ROWS = (
    ("stock", None, None),
    ("negtome", "negtome", "merging_alpha=0.5"),
    ("negtome", "negtome", None),
    ("negtome", "negtome", "merging_alpha=2"),
    ("negtome", "negtome", "t_end=700"),
    ("repel", "repel", "merging_alpha=1"),
    ("repel", "repel", None),
)


def measure(sampler, reward, prompts, count):
    """Distance, accuracy, accuracy and reward of the best by reward: each [prompts]."""
    distance, right, best_right, best = [], [], [], []
    for p, prompt in enumerate(prompts):
        texts, seeds = [prompt] * count, [SEEDS * (1 + p) + c for c in range(count)]
        images = sampler.decode(sampler.advance(sampler.start(texts, seeds), sampler.num_steps).x0)
        flat = images.flatten(1)
        distance.append(float(torch.pdist(flat).mean() / flat.shape[1] ** 0.5))
        met = [check(image, prompt).all for image in to_uint8(images)]
        values = reward(images, texts)
        right.append(np.mean(met))
        best_right.append(float(met[int(values.argmax())]))
        best.append(float(values.max()))
        sampler.forget_prompts()
    return [np.array(column) for column in (distance, right, best_right, best)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--candidates", type=int, default=8)
    a = parser.parse_args()
    prompts = held_out_prompts()[: a.prompts]
    sampler, reward, rng = load_sampler("shapes", max_batch=a.candidates), load_reward(), np.random.default_rng(0)
    table = Table(title=f"{len(prompts)} held-out prompts x {a.candidates} candidates; mean ± 95 % interval")
    for name in (
        "",
        "parameters",
        "distance",
        "against stock",
        "all met",
        f"best of {a.candidates} meets all",
        "its reward",
    ):
        table.add_column(name)
    stock = None
    for name, kind, options in ROWS:
        attach(sampler, parse(kind, options))
        found = measure(sampler, reward, prompts, a.candidates)
        stock = stock or found
        gain = (
            ""
            if found is stock
            else f"{interval(100 * (found[0] / stock[0].mean() - stock[0] / stock[0].mean()), rng)} %"
        )
        table.add_row(
            name, options or "", interval(found[0], rng), gain, *(interval(column, rng) for column in found[1:])
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
