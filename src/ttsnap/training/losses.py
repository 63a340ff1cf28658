"""What is minimised. Every loss is a weighted sum over images or pairs: parts of a batch add up to the whole."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def squared_error(rewards: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i (r_i - t_i)^2 of rewards, targets and weights [n]."""
    return (weights * (rewards - targets) ** 2).sum()


def preference(rewards: Tensor, targets: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Bradley-Terry loss over pairs of images 2k and 2k + 1 of one prompt, summed over pairs.

    -log sigmoid((r_better - r_worse) / temperature), where the target says which is better; a tie pulls both together.

    Args:
        rewards: predicted [n].
        targets: clean rewards of the finished images [n].
        weights: of images [n]; both of a pair have the same.
        temperature: in units of the reward.
    """
    difference = (rewards[0::2] - rewards[1::2]) / temperature
    better = (targets[0::2] - targets[1::2]).sign() / 2 + 0.5
    return F.binary_cross_entropy_with_logits(difference, better, weights[0::2], reduction="sum")
