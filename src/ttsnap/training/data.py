"""Images of a tree with the clean rewards of their finished images, in an order that only the seed decides."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ttsnap import rewards
from ttsnap.core.grid import FloatArray, IntArray
from ttsnap.files.reading import ahead
from ttsnap.recordings import Recording
from ttsnap.recordings.image_tree import ImageTree
from ttsnap.training.config import Config


@dataclass(frozen=True)
class Data:
    """Trajectories with their targets.

    Attributes:
        tree: their images.
        rows: indices of the prompts in the tree [P].
        targets: clean rewards of the finished images [P, candidates].
    """

    tree: ImageTree
    rows: IntArray
    targets: FloatArray

    @classmethod
    def open(cls, tree: str | Path, labels: str | Path, reward: str) -> Data:
        """Every prompt that is labelled.

        Raises:
            ValueError: tree and recording are not of the same candidates, or the reward is not in the recording.
        """
        images, recording = ImageTree.open(tree), Recording.open(labels)
        prompts, candidates, steps, _ = recording.shape
        if recording.prompts != images.prompts[:prompts] or (candidates, steps) != (
            images.num_candidates,
            images.num_steps,
        ):
            raise ValueError(f"{labels} is not a recording of {tree}: prompts, candidates or steps differ")
        if reward not in recording.rewards:
            raise ValueError(f"{labels} holds {', '.join(recording.rewards)}, but not the reward {reward}")
        rows = recording.recorded()
        if (recording.seeds[rows] != images.seeds[rows]).any():
            raise ValueError(f"{labels} was recorded with other seeds than {tree}")
        column = recording.rewards.index(reward)
        return cls(images, rows, np.asarray(recording.clean[rows, :, -1, column], dtype=np.float64))

    def part(self, prompts: slice, candidates: int | None = None) -> Data:
        """Some prompts, and the first candidates of each."""
        if candidates is not None and candidates > self.targets.shape[1]:
            raise ValueError(f"{self.tree.root} has {self.targets.shape[1]} candidates per prompt, not {candidates}")
        return replace(self, rows=self.rows[prompts], targets=self.targets[prompts, :candidates])

    def without(self, other: Data) -> Data:
        """The prompts whose text does not occur in `other`."""
        texts = {other.tree.prompts[p] for p in other.rows}
        kept = np.array([self.tree.prompts[p] not in texts for p in self.rows], dtype=bool)
        return replace(self, rows=self.rows[kept], targets=self.targets[kept])

    @property
    def fingerprint(self) -> str:
        """Of prompts, seeds and targets."""
        digest = hashlib.sha256()
        for row, targets in zip(self.rows, self.targets, strict=True):
            digest.update(self.tree.prompts[row].encode() + self.tree.seeds[row].tobytes() + targets.tobytes())
        return digest.hexdigest()[:16]

    def images(self, items: IntArray, call: int) -> np.ndarray:
        """Images [n, h, w, 3] uint8 after a call, of (prompt, candidate) pairs [n, 2] of this data."""
        return np.stack([self.tree.read(int(self.rows[p]), int(c), call) for p, c in items])


@dataclass(frozen=True)
class Part:
    """What a process computes at once.

    Attributes:
        images: [n, h, w, 3] uint8.
        prompts: one per image.
        targets: [n].
        weights: 1, or 0 for images that only fill up the share of a process [n].
        size: images of the whole update, over all processes and parts.
        mean: of the targets of the whole update.
        std: of the targets of the whole update.
    """

    images: np.ndarray
    prompts: list[str]
    targets: FloatArray
    weights: FloatArray
    size: int
    mean: float
    std: float


def open_data(config: Config) -> tuple[Data, Data]:
    """The data to train on, and the held-out ones (perhaps none); no prompt is in both.

    Raises:
        ValueError: they do not fit together, or nothing is left to train on.
    """
    (reward,) = rewards.names_of(config.reward)
    data = Data.open(config.tree, config.labels, reward)
    held_out = config.held_out
    if held_out is None:
        held_out = 0 if config.eval_tree else len(data.rows) // 10
    if held_out >= len(data.rows):
        raise ValueError(f"{config.tree} has {len(data.rows)} labelled prompts; {held_out} of them cannot be held out")
    test = data.part(slice(len(data.rows) - held_out, None))
    data = data.part(slice(len(data.rows) - held_out))
    if config.eval_tree and config.eval_labels:
        data = data.without(test)
        test = Data.open(config.eval_tree, config.eval_labels, reward)
    data = data.without(test).part(slice(config.train_prompts), config.per_prompt)
    if not len(data.rows):
        raise ValueError(f"no prompt of {config.tree} is left to train on: all are held out")
    if config.pairs and data.targets.shape[1] < 2:
        raise ValueError("the preference loss compares candidates of a prompt: it needs at least 2 of each")
    return data, test


def updates_in_level(data: Data, config: Config) -> int:
    """Updates of one level, all its epochs together."""
    images = data.targets.size
    if config.pairs:
        images += len(data.rows) * (data.targets.shape[1] % 2)
    return config.epochs_per_level * -(-images // config.batch)


def _epoch(data: Data, config: Config, rng: np.random.Generator) -> IntArray:
    """(prompt, candidate) of every image, shuffled [n, 2]; with pairs, two of one prompt follow each other."""
    prompts, candidates = data.targets.shape
    order = np.argsort(rng.random((prompts, candidates)), axis=1)
    if not config.pairs:
        items = np.stack([np.repeat(np.arange(prompts), candidates), order.ravel()], axis=1)
        return items[rng.permutation(len(items))]
    if candidates % 2:
        order = np.concatenate([order, order[:, :1]], axis=1)
    items = np.stack([np.repeat(np.arange(prompts), order.shape[1]), order.ravel()], axis=1)
    return items.reshape(-1, 2, 2)[rng.permutation(len(items) // 2)].reshape(-1, 2)


def batches(
    data: Data, config: Config, *, stage: int, call: int, first: int = 0, process: int = 0, processes: int = 1
) -> Iterator[list[Part]]:
    """One process's share of each update of a level, in `accumulate` parts; images are read ahead on threads.

    Which images an update holds depends on the seed, the stage and its number alone.

    Args:
        data: what to train on.
        config: batch, accumulation, epochs, seed.
        stage: number of the level.
        call: whose images.
        first: updates to leave out.
        process: which share.
        processes: how many shares.
    """
    plans = []
    for epoch in range(config.epochs_per_level):
        items = _epoch(data, config, np.random.default_rng([config.seed, stage, epoch]))
        plans += [items[start : start + config.batch] for start in range(0, len(items), config.batch)]
    unit, shares = 2 if config.pairs else 1, processes * config.accumulate
    work = []
    for items in plans[first:]:
        targets = data.targets[items[:, 0], items[:, 1]]
        size, mean, std = len(items), float(targets.mean()), max(float(targets.std()), 1e-6)
        groups = np.arange(size).reshape(-1, unit)
        for part in range(config.accumulate):
            mine = groups[part * processes + process :: shares]
            fill = -(-len(groups) // shares) - len(mine)  # every process takes part in every step
            chosen = np.concatenate([mine, groups[:fill]]).ravel()
            weights = np.repeat([1.0, 0.0], [mine.size, fill * unit])
            work.append((items[chosen], targets[chosen], weights, size, mean, std))

    def load(items: IntArray, targets: FloatArray, weights: FloatArray, size: int, mean: float, std: float) -> Part:
        prompts = [data.tree.prompts[data.rows[p]] for p, _ in items]
        return Part(data.images(items, call), prompts, targets, weights, size, mean, std)

    threads = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="image-reader") as pool:
        parts = ahead(pool, load, work, 2 * threads)
        try:
            for _ in plans[first:]:
                yield [next(parts) for _ in range(config.accumulate)]
        finally:
            parts.close()
