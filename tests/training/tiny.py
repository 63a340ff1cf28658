"""Noise for images and numbers for rewards: the least that can be trained on."""

from __future__ import annotations

import numpy as np

from ttsnap.recordings import Recording
from ttsnap.recordings.image_tree import ImageTree
from ttsnap.training import Config

PROMPTS = (
    "a red circle",
    "a blue square",
    "a green triangle left of a red circle",
    "a cyan circle above a blue square",
    "a purple square",
    "a yellow circle right of a red square",
)
SIGMAS = (1.0, 0.75, 0.5, 0.25)


def make_data(folder, prompts=4, candidates=4, seed=0, side=16, reward="shapes"):
    """A tree of 4 calls in folder/tree and its recording in folder/labels."""
    rng = np.random.default_rng(seed)
    texts = PROMPTS[:prompts]
    tree = ImageTree(
        folder / "tree",
        texts,
        np.arange(prompts * candidates).reshape(prompts, candidates),
        num_steps=4,
        calls=(1, 2, 3, 4),
        sigmas=SIGMAS,
        size=(side, side),
    )
    tree.save()
    recording = Recording.create(
        folder / "labels", prompts=texts, num_candidates=candidates, num_steps=4, rewards=[reward], sigmas=SIGMAS
    )
    for p in range(prompts):
        for c in range(candidates):
            for call in tree.calls:
                tree.write(tree.path(p, c, call), rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        clean = np.full((candidates, 4, 1), np.nan)
        clean[:, -1, 0] = rng.normal(size=candidates)
        recording.write_prompt(p, clean, seeds=tree.seeds[p])


def config(folder, **changes):
    values = {"tree": str(folder / "tree"), "labels": str(folder / "labels"), "levels": [3, 2], "batch": 8}
    return Config.of({**values, "held_out": 0, "learning_rate": 1e-3, **changes})


def options(folder, *more):
    """The same on the command line."""
    more = list(map(str, more))
    usual = {"--levels": "3,2", "--batch": "8", "--held-out": "0", "--learning-rate": "1e-3"}
    rest = [part for name, value in usual.items() if name not in more for part in (name, value)]
    return ["train", str(folder / "tree"), str(folder / "labels"), *rest, "--cpu", *more]
