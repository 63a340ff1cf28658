"""How well a reward of x0 estimates foretells the clean reward of the finished images, on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ttsnap.core.grid import FloatArray
from ttsnap.core.ranking import kendall_tau
from ttsnap.training.data import Data

RATIOS = np.arange(1, 20) / 20
METRICS = ("kendall_tau", "mse", "top_accuracy_25", "top_gap_25", "top_accuracy", "top_gap")


def top_select(values: FloatArray, targets: FloatArray, ratio: float) -> tuple[float, float]:
    """How often the best candidate survives when the best `ratio` by `values` are kept, and the mean reward lost.

    The gap is the best target less the best target among the survivors; ties go to the lower index, one always
    survives.

    Args:
        values: [prompts, candidates].
        targets: [prompts, candidates].
        ratio: kept part, 0..1.
    """
    keep = max(1, int(ratio * values.shape[1] + 1e-9))
    kept = np.argsort(-values, axis=1, kind="stable")[:, :keep]
    gap = targets.max(1) - np.take_along_axis(targets, kept, axis=1).max(1)
    return float((gap < 1e-10).mean()), float(gap.mean())


def measure(values: FloatArray, targets: FloatArray) -> dict[str, float | None]:
    """All METRICS of values against targets [prompts, candidates]; None where a metric is not defined."""
    tau = kendall_tau(values, targets)
    over_ratios = np.mean([top_select(values, targets, ratio) for ratio in RATIOS], axis=0)
    accuracy, gap = top_select(values, targets, 0.25)
    return {
        "kendall_tau": float(np.nanmean(tau)) if np.isfinite(tau).any() else None,
        "mse": float(((values - targets) ** 2).mean()),
        "top_accuracy_25": accuracy,
        "top_gap_25": gap,
        "top_accuracy": float(over_ratios[0]),
        "top_gap": float(over_ratios[1]),
    }


def evaluate(
    reward: Any,
    data: Data,
    calls: Iterable[int],
    *,
    device: Any,
    batch: int = 64,
    on_images: Callable[[int], None] | None = None,
) -> dict[str, dict[str, float | None]]:
    """METRICS by call (as text, for JSON) of a reward that looks at the x0 estimates after each call.

    Args:
        reward: see `ttsnap.core.grid.Reward`.
        data: held-out trajectories.
        calls: after which calls to look.
        device: where the reward takes its images.
        batch: images in one look.
        on_images: called with the number of images just judged.
    """
    import torch

    from ttsnap.live.judging import judge

    items = np.argwhere(np.ones_like(data.targets, dtype=bool))
    prompts = [data.tree.prompts[data.rows[p]] for p, _ in items]
    found = {}
    for call in calls:
        sigma = 0.0 if call == data.tree.num_steps else data.tree.sigmas[call - 1]
        values = []
        for start in range(0, len(items), batch):
            rows = slice(start, start + batch)
            images = torch.from_numpy(data.images(items[rows], call)).to(device).permute(0, 3, 1, 2).float() / 255
            values.append(judge("trained", reward, images, prompts[rows], sigma))
            if on_images:
                on_images(len(images))
        found[str(call)] = measure(np.concatenate(values).reshape(data.targets.shape), data.targets)
    return found
