"""Pictures that a pipeline is given beside the prompt: what to start from, what to paint over, what to be led by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 64_000_000
LONGEST_SIDE = 16_384


def read_picture(path: Path | str) -> Image:
    """A picture in RGB as a viewer shows it: upright, on white where it is transparent, 16 bits as 8.

    Raises:
        ValueError: no such file, no picture, or one that is too large.
    """
    import io

    from PIL import Image, UnidentifiedImageError

    from ttsnap.files.decoding import read_file, shown

    try:
        data = read_file(Path(path))
    except ValueError as error:
        raise ValueError(f"cannot read {path}: it {error}") from error
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MOST_PIXELS or max(picture.size) > LONGEST_SIDE:
                raise ValueError(f"{path} has {picture.width} x {picture.height} pixels; at most 64 million are taken")
            plain = picture.convert("RGB")
            try:
                whole = Image.merge("RGB", shown(picture).picture.split())  # without what its file says
            except ValueError as error:
                raise ValueError(f"{path} {error}") from error
            whole.filename = str(path)  # type: ignore[attr-defined]  # says how to make it again
            whole.plain = whole.tobytes() == plain.tobytes()  # type: ignore[attr-defined]
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has too many pixels; at most 64 million are taken") from error
    except (UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{path} is not a picture that can be read") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    return whole


def resized(picture: Image, size: tuple[int, int]) -> Image:
    """A picture made as large as is asked for, which knows that and its file."""
    if picture.size == size:
        return picture
    other = picture.resize(size)
    if file := getattr(picture, "filename", None):
        other.filename, other.plain, other.resized = file, getattr(picture, "plain", True), True  # type: ignore[attr-defined]
    return other


def beside(pictures: Sequence[Image]) -> Image:
    """Pictures side by side, all as high as the first: how a model that takes one reference is shown several."""
    from PIL import Image

    height = pictures[0].height
    scaled = [p.resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    whole = Image.new("RGB", (sum(p.width for p in scaled), height))
    left = 0
    for picture in scaled:
        whole.paste(picture, (left, 0))
        left += picture.width
    whole.beside = list(pictures)  # type: ignore[attr-defined]  # says how to make it again
    return whole


def parse_frames(text: str | None) -> list[int | str] | None:
    """Frames of a video such as `first,middle,last` or `0,8,-1`."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part in ("first", "middle", "last") or part.removeprefix("-").isdigit() for part in parts):
        raise ValueError(f"look frames are first, middle, last or indices, such as first,8,last, got {text!r}")
    return [part if part in ("first", "middle", "last") else int(part) for part in parts]
