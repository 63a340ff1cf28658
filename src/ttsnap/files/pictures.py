"""Pictures that a pipeline is given beside the prompt: what to start from, what to paint over, what to be led by."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 64_000_000
LONGEST_SIDE = 16_384


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Files of pictures, and how far an image may be left.

    Attributes:
        image: Start from this picture (image-to-image).
        mask: Paint only where this picture is white (inpainting).
        control_image: Be led by this picture (ControlNet pipelines).
        strength: How far from the image, above 0 and at most 1.
    """

    image: Path | None = None
    mask: Path | None = None
    control_image: Path | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength:g}")
        if self.image is None and (self.mask or self.strength is not None):
            raise ValueError(f"{'a mask' if self.mask else 'strength'} needs an image to start from")

    def files(self) -> dict[str, Path]:
        """The files by the name of what they are for."""
        found = {"image": self.image, "mask_image": self.mask, "control_image": self.control_image}
        return {name: path for name, path in found.items() if path is not None}

    def settings(self) -> dict[str, Any]:
        """What decides the result, as a JSON object: the files' contents, not their names.

        Raises:
            ValueError: a file cannot be read.
        """
        found: dict[str, Any] = {}
        for name, path in self.files().items():
            try:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error.strerror}") from error
            read_picture(path)
        return found | ({"strength": self.strength} if self.strength is not None else {})

    def give(self, pipe: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The pipeline that takes these pictures, of the same models, and the arguments of its call with them.

        Where a size is asked for, the pictures are made that large.

        Args:
            pipe: a stock pipeline.
            options: arguments of its call, and options of the sampler.

        Raises:
            ValueError: the pipeline has no such variant, or a file is no picture.
        """
        if self.image:
            pipe = _variant(pipe, "AutoPipelineForInpainting" if self.mask else "AutoPipelineForImage2Image", self)
        taken, name = _taken(pipe), type(pipe).__name__
        given: dict[str, Any] = {use: read_picture(path) for use, path in self.files().items()}
        if "control_image" in given and "control_image" not in taken:
            if "image" not in taken or not hasattr(pipe, "controlnet"):
                raise ValueError(f"{name} takes no control image; load a ControlNet pipeline")
            given["image"] = given.pop("control_image")
        width, height = options.get("width"), options.get("height")
        if width and height:
            given = {use: _resized(picture, (width, height)) for use, picture in given.items()}
        options = {key: value for key, value in options.items() if key not in ("width", "height") or key in taken}
        if self.strength is not None:
            given["strength"] = self.strength
        return pipe, options | given


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
                whole = Image.fromarray(shown(picture).pixels)
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


def _resized(picture: Image, size: tuple[int, int]) -> Image:
    """A picture made as large as is asked for, which knows that and its file."""
    if picture.size == size:
        return picture
    other = picture.resize(size)
    other.filename, other.plain, other.resized = picture.filename, picture.plain, True  # type: ignore[attr-defined]
    return other


def _taken(pipe: Any) -> set[str]:
    return set(inspect.signature(type(pipe).__call__).parameters)


def _variant(pipe: Any, auto: str, pictures: Pictures) -> Any:
    """The pipeline itself where it takes an image (and a mask), else its variant that does."""
    import diffusers

    taken = _taken(pipe)
    leads = hasattr(pipe, "controlnet") and "control_image" not in taken  # its image is the one to be led by
    if "image" in taken and not leads and (pictures.mask is None or "mask_image" in taken):
        return pipe
    try:
        return getattr(diffusers, auto).from_pipe(pipe)
    except (ValueError, TypeError, AttributeError) as error:
        what = "paints over a masked image" if pictures.mask else "starts from an image"
        raise ValueError(f"diffusers has no variant of {type(pipe).__name__} that {what}") from error


def parse_frames(text: str | None) -> list[int | str] | None:
    """Frames of a video such as `first,middle,last` or `0,8,-1`."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part in ("first", "middle", "last") or part.removeprefix("-").isdigit() for part in parts):
        raise ValueError(f"look frames are first, middle, last or indices, such as first,8,last, got {text!r}")
    return [part if part in ("first", "middle", "last") else int(part) for part in parts]
