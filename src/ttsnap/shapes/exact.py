"""The exact checker as a reward: the share of what a prompt asks for that an image shows.

It is the held-out reward of the embedded models unless another is named: it is not learned, and nothing was trained on
it, so that a search that only pleases its reward shows there. A prompt outside this world gets NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ttsnap.shapes.checker import Verdict, check


class CheckerReward:
    """Images and prompts -> count, colours, shapes, relation (and holes): how many of them are met, 0..1.

    Attributes:
        check: an image [h, w, 3] (uint8) and a prompt -> a verdict.
        kinds: those of a verdict that count.
        perfect: what a picture gets that shows all of it.
    """

    perfect = 1.0
    tflop = text_tflop = 0.0  # image analysis, no network
    perfect = 1.0  # nothing is wrong

    def __init__(self, check: Callable[[Any, str], Verdict], kinds: Sequence[str]) -> None:
        self.check, self.kinds = check, kinds

    def __call__(self, images: Any, prompts: Sequence[str], *, sigma: float = 0.0) -> Any:
        """Rewards [n] of images [n, 3, h, w] in 0..1; takes no notice of `sigma`."""
        import torch

        from ttsnap.rewards.own import array

        return torch.tensor([self._of(image, prompt) for image, prompt in zip(array(images), prompts, strict=True)])

    def _of(self, image: Any, prompt: str) -> float:
        try:
            verdict = self.check(image, prompt)
        except ValueError:  # not a prompt of this world
            return float("nan")
        return float(np.mean([getattr(verdict, kind) for kind in self.kinds]))


def load_checker(device: Any = "cpu") -> CheckerReward:
    """The checker of the first level."""
    return CheckerReward(check, ("count", "colour", "shape", "relation"))


def load_hard_checker(device: Any = "cpu") -> CheckerReward:
    """The checker of the harder level."""
    from ttsnap.shapes import hard

    return CheckerReward(hard.check, ("count", "colour", "shape", "relation", "hollow"))
