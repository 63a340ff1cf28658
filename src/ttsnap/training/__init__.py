"""Noise-aware rewards: curriculum self-distillation of a clean reward (TTSnap, Yu et al. 2025, arXiv 2511.22242).

The target of every x0 estimate is the clean reward of its own trajectory's finished image. Training moves from clean to
noisy, one noise level after another, each from the weights of the one before.
"""

from ttsnap.rewards.trainable import TrainableReward
from ttsnap.training.config import Config
from ttsnap.training.loop import Report, train

__all__ = ["Config", "Report", "TrainableReward", "train"]
