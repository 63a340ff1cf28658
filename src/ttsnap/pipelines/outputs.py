"""What stock pipelines return and take, as numbers and as text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

PREVIEW_SIDE = 256
FRAMES = ("first", "middle", "last")


def as_images(output: Any, device: torch.device) -> Tensor:
    """Images [1, 3, h, w] in 0..1 (fp32) of what a pipeline returned; of a video, its frames [1, frames, 3, h, w].

    Raises:
        ValueError: it is not one image or one video.
    """
    first = output[0]
    if isinstance(first, list):
        first = np.stack([_array(item) for item in first])
    if isinstance(first, Tensor):
        images = first
    elif isinstance(first, np.ndarray):
        images = torch.from_numpy(first).movedim(-1, -3)
    else:
        raise ValueError(f"a pipeline must return images or a video, got {type(first).__name__}")
    if images.ndim not in (4, 5) or len(images) != 1 or images.shape[-3] not in (1, 3, 4):
        raise ValueError(f"a candidate must be one image or one video, got an array of shape {list(images.shape)}")
    images = images.to(device).float()
    return images[..., :3, :, :] if images.shape[-3] > 1 else images.expand(*images.shape[:-3], 3, *images.shape[-2:])


def to_uint8(images: Tensor) -> np.ndarray:
    """Images [..., 3, h, w] in 0..1 as uint8 [..., h, w, 3], rounded as the stock pipelines do."""
    array: np.ndarray = (images * 255).round().clamp(0, 255).byte().movedim(-3, -1).cpu().numpy()
    return array


def shrink(images: Tensor) -> Tensor:
    """Images with a longest side of at most PREVIEW_SIDE pixels; of videos the middle frame."""
    if images.ndim == 5:
        images = images[:, images.shape[1] // 2]
    longest = max(images.shape[-2:])
    if longest <= PREVIEW_SIDE:
        return images
    size = [max(1, round(side * PREVIEW_SIDE / longest)) for side in images.shape[-2:]]
    return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)


def _array(item: Any) -> Any:
    """A picture, an array or a list of them, as an array in 0..1 with the colours last."""
    if isinstance(item, list):
        return np.stack([_array(one) for one in item])
    if isinstance(item, Tensor):
        return item.float().movedim(-3, -1).cpu().numpy()
    if isinstance(item, np.ndarray):
        return item
    array = np.asarray(item.convert("RGB"), dtype=np.float32) / 255
    return array


def objections(output: Any) -> list[bool]:
    """Which of the images that a pipeline returned its safety checker made black; empty where it has none."""
    return [bool(one) for one in getattr(output, "nsfw_content_detected", None) or []]


def warn_of_blanks(blank: Sequence[bool], prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Warn of each finished image that the pipeline's safety checker made black."""
    for one, prompt, seed in zip(blank, prompts, seeds, strict=True):
        if one:
            warnings.warn(
                f"the pipeline's safety checker made the finished image of prompt {prompt!r}, seed {seed} black",
                stacklevel=3,
            )


def chosen_frames(frames: Sequence[int | str] | None, count: int) -> list[int]:
    """Indices of the frames that are looked at, ascending; empty where there is no video.

    Raises:
        ValueError: no such frame, or no video.
    """
    if not count:
        if frames is not None:
            raise ValueError("look frames belong to videos, this pipeline makes images")
        return []
    names = dict(zip(FRAMES, (0, count // 2, count - 1), strict=True))
    chosen = set()
    for frame in FRAMES if frames is None else frames:
        index = names.get(frame) if isinstance(frame, str) else frame
        if index is None or not -count <= index < count:
            raise ValueError(f"look frames are {', '.join(FRAMES)} or indices below {count}, got {frame!r}")
        chosen.add(index % count)
    if not chosen:
        raise ValueError("a look at a video needs at least one frame")
    return sorted(chosen)


def written(name: str, value: Any) -> str:
    """An argument as Python writes it; a picture by its file, other objects by the argument's own name."""
    return _written(value) or name


def _written(value: Any) -> str | None:
    if pictures := getattr(value, "beside", None):
        return None if (listed := _written(pictures)) is None else f"ttsnap.beside({listed})"
    if file := getattr(value, "filename", None):
        resized = f".resize({value.size})" if getattr(value, "resized", False) else ""
        if not getattr(value, "plain", True):  # on its side, transparent, or of 16 bits
            return f"ttsnap.read_picture({str(file)!r}){resized}"
        return f"PIL.Image.open({str(file)!r}).convert({value.mode!r}){resized}"
    if isinstance(value, list | tuple):
        items = [_written(item) for item in value]
        if None in items:
            return None
        inside = ", ".join(map(str, items))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(items) == 1)})"
    if isinstance(value, dict):
        pairs = [(_written(key), _written(item)) for key, item in value.items()]
        return None if any(None in pair for pair in pairs) else f"{{{', '.join(f'{k}: {v}' for k, v in pairs)}}}"
    return repr(value) if isinstance(value, str | int | float | bool | None) else None
