"""When a reward fails: what can be saved of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from ttsnap.samplers.views import View


def apart(look: Callable[[Sequence[int]], None], parts: Sequence[Sequence[int]]) -> list[Exception | None]:
    """Look at all rows at once; where that fails, at each part alone.

    Args:
        look: judges some rows; may raise.
        parts: rows that stand and fall together, such as those of one prompt.

    Returns:
        For each part its error, or None.
    """
    errors: list[Exception | None] = [None] * len(parts)
    try:
        look([row for rows in parts for row in rows])
    except Exception:
        for number, rows in enumerate(parts):
            try:
                look(rows)
            except Exception as error:
                errors[number] = error
    return errors


def judge_in_halves(name: str, reward: Any, seen: Tensor | View, prompts: Sequence[str], sigma: float) -> np.ndarray:
    """Rewards [n] of images [n, 3, h, w] or a view; where memory runs out, of half as many at a time.

    Raises:
        MemoryError: not even one image fits.
        ValueError: the reward did not answer with one number per image.
    """
    import torch

    from ttsnap.environments.live import judge

    try:
        return judge(name, reward, seen, prompts, sigma)
    except torch.OutOfMemoryError as error:
        if len(seen) == 1:
            raise MemoryError(f"one image of reward {name!r} does not fit into memory") from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(seen) // 2
    parts = (slice(None, half), slice(half, None))
    return np.concatenate([judge_in_halves(name, reward, seen[part], prompts[part], sigma) for part in parts])
