"""Image sizes: of a ratio at the area that a model is made for, and sizes that a pipeline takes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

FINE, COARSE = 16, 64  # pixels that sides of a ratio are multiples of: of models for small pictures, and of others
LARGE = 512
WIDEST = 8.0
DIVISIBLE = re.compile(r"(?:divisible by|multiple of) (\d+)")  # what pipelines say of sizes that they refuse


def read_ratio(text: str) -> float:
    """Width to height of `3:2`.

    Raises:
        ValueError: it is no ratio.
    """
    width, _, height = text.partition(":")
    try:
        ratio = float(width) / float(height)
    except (ValueError, ZeroDivisionError):
        ratio = math.nan
    if not 1 / WIDEST <= ratio <= WIDEST:
        raise ValueError(f"a ratio is width:height, such as 3:2, from 1:{WIDEST:g} to {WIDEST:g}:1, got {text!r}")
    return ratio


def sized(pipe: Any, ratio: str, own: Mapping[str, Any]) -> dict[str, int]:
    """Height and width of a ratio, at about the area of the pictures that a model is made for.

    Args:
        pipe: a stock pipeline.
        ratio: width:height.
        own: arguments that the model is used with unless told otherwise.

    Raises:
        ValueError: the pipeline does not tell its own size.
    """
    area = own["height"] * own["width"] if own.get("height") and own.get("width") else _own_side(pipe) ** 2
    unit = COARSE if area >= LARGE**2 else FINE
    width = math.sqrt(area * read_ratio(ratio))
    sides = {"height": area / width, "width": width}
    return {side: max(unit, unit * round(pixels / unit)) for side, pixels in sides.items()}


def rounded(error: BaseException, arguments: Mapping[str, Any]) -> dict[str, int] | None:
    """The nearest size that a pipeline takes, from the sentence with which it refused one; None if that says none."""
    found = DIVISIBLE.search(str(error))
    given = {side: arguments[side] for side in ("height", "width") if isinstance(arguments.get(side), int)}
    if found is None or not given:
        return None
    unit = int(found[1])
    nearest = {side: max(unit, unit * math.floor(pixels / unit + 0.5)) for side, pixels in given.items()}
    return None if nearest == given else nearest


def _own_side(pipe: Any) -> int:
    """Pixels of a side of the square pictures that a model is made for."""
    denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    latent = getattr(pipe, "default_sample_size", None) or getattr(
        getattr(denoiser, "config", None), "sample_size", None
    )
    scale = getattr(pipe, "vae_scale_factor", None)
    if not isinstance(latent, int) or not isinstance(scale, int):
        raise ValueError(f"{type(pipe).__name__} does not tell its own size; give --size in pixels, such as 1216x832")
    return latent * scale
