"""Training of heads on the denoiser's features: data in memory, no image but the finished one is ever decoded.

Each trajectory gives the features of every call and one target: the clean reward of its own finished image. One network
learns all noise levels at once; trajectories of fewer steps than will be searched with are as good, for the head knows
noise levels and not steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ttsnap.core.grid import FloatArray, IntArray
from ttsnap.rewards.feature_head import FeatureHead, HeadConfig


@dataclass(frozen=True)
class Trails:
    """What trajectories of one number of steps left behind; those of a prompt come in groups of one size.

    Attributes:
        prompts: texts [P].
        words: states of each prompt's words, padded [P, words, width], and
        mask: which of them there are [P, words].
        prompt: index of each group's prompt [groups].
        cells: features [groups, size, calls, cells, channels], half precision.
        targets: what to foretell [groups, size, outputs], the clean reward of the finished image first.
        sigmas: noise level of each call [calls].
        latents: x0 estimates [groups, size, calls, ...], half precision, if they were to be kept.
    """

    prompts: tuple[str, ...]
    words: Tensor
    mask: Tensor
    prompt: IntArray
    cells: Tensor
    targets: Tensor
    sigmas: FloatArray
    latents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt)


def train_head(
    trails: Sequence[Trails],
    config: HeadConfig,
    *,
    updates: int = 4000,
    batch: int = 256,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.05,
    preference: float = 1.0,
    temperature: float = 0.5,
    average: float = 0.998,
    lowest: float = 0.0,
    seed: int = 0,
    device: Any = "cpu",
    on_update: Callable[[int, dict[str, float], FeatureHead], None] | None = None,
) -> FeatureHead:
    """A head that foretells targets from features, at all noise levels at once.

    The loss is the mean squared error of all outputs (each in its own standard deviations), and for the reward a
    Bradley-Terry loss over all pairs of a group: cross entropy of sigmoid(d / temperature) with that of the targets.

    Args:
        trails: data; a batch comes from one of them, in proportion to their sizes.
        config: sizes of the head; mean, std and outputs are set by the data.
        updates: of AdamW.
        batch: trajectories in an update, in whole groups, each group at one noise level.
        learning_rate: at the top; it rises over the first twentieth and then falls along a cosine.
        weight_decay: of AdamW.
        preference: scale of the Bradley-Terry loss.
        temperature: of that loss, in standard deviations of the reward.
        average: decay of the average of the weights that is returned.
        lowest: noise levels below are not trained.
        seed: of weights and batches.
        device: where to compute; the data stay where they are.
        on_update: called with the number of updates, the losses, and the averaged head.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    everything = torch.cat([part.targets.flatten(0, 1) for part in trails])
    mean, std = everything.mean(0), everything.std(0).clamp_min(1e-6)
    values = {**config.__dict__, "outputs": len(mean), "mean": float(mean[0]), "std": float(std[0])}
    head = FeatureHead(HeadConfig(**values)).train()
    head.cell_mean, head.cell_std = _spread(trails)
    head = head.to(device)
    mean, std = mean.to(device), std.to(device)
    averaged = copy.deepcopy(head).requires_grad_(False)
    optimiser = torch.optim.AdamW(head.parameters(), learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98))
    calls = [np.flatnonzero(part.sigmas >= lowest) for part in trails]
    shares = np.array([len(part) for part in trails], dtype=float) / sum(map(len, trails))
    for update in range(updates):
        rate = learning_rate * min(1.0, (update + 1) / (0.05 * updates + 1))
        for group in optimiser.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * update / updates))
        number = int(rng.choice(len(trails), p=shares))
        part, size = trails[number], trails[number].targets.shape[1]
        groups = rng.integers(len(part), size=max(1, batch // size))
        levels = rng.choice(calls[number], size=len(groups))
        cells = part.cells[groups, :, levels].flatten(0, 1).to(device).float()
        prompts = part.prompt[groups].repeat(size)
        sigma = torch.from_numpy(part.sigmas[levels].repeat(size)).float().to(device)
        outputs = head(cells, part.words[prompts].to(device).float(), part.mask[prompts].to(device), sigma)
        targets = ((part.targets[groups].to(device) - mean) / std).flatten(0, 1)
        mse = F.mse_loss(outputs, targets)
        found, wanted = (
            (x[:, 0].view(-1, size, 1) - x[:, 0].view(-1, 1, size)) / temperature for x in (outputs, targets)
        )
        ranking = F.binary_cross_entropy_with_logits(found, wanted.sigmoid())
        optimiser.zero_grad()
        (mse + preference * ranking).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimiser.step()
        decay = min(average, (update + 1) / (update + 10))
        for kept, new in zip(averaged.parameters(), head.parameters(), strict=True):
            kept.lerp_(new.detach(), 1 - decay)
        if on_update:
            on_update(update + 1, {"mse": mse.item(), "ranking": ranking.item()}, averaged)
    return averaged.eval()


def _spread(trails: Sequence[Trails]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [channels] of cells, over a part of the groups."""
    some = torch.cat([part.cells[:: max(1, len(part) // 64)].flatten(0, -2).float() for part in trails])
    return some.mean(0), some.std(0).clamp_min(1e-3)


def foretell(head: FeatureHead, trails: Trails, batch: int = 512) -> Any:
    """Rewards that a head foretells [groups, size, calls], in units of the clean reward."""
    found, device = torch.empty(*trails.cells.shape[:3]), head.summary.device
    prompts = trails.prompt.repeat(trails.cells.shape[1])
    flat = trails.cells.flatten(0, 1)
    with torch.no_grad():
        for call, sigma in enumerate(trails.sigmas):
            for start in range(0, len(flat), batch):
                rows = slice(start, start + batch)
                cells, who = flat[rows, call].to(device).float(), prompts[rows]
                noise = torch.full((len(cells),), float(sigma), device=device)
                outputs = head(cells, trails.words[who].to(device).float(), trails.mask[who].to(device), noise)
                values = outputs[:, 0] * head.config.std + head.config.mean
                found.view(-1, found.shape[2])[rows, call] = values.cpu()
    return found.numpy()
