"""Pictures as people have them, decoded as a viewer shows them: upright, on white, in 8 bits of sRGB.

What cannot be shown is a `ValueError` that says in a few words what is wrong with the file, without its name.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap.files.pictures import LONGEST_SIDE, MOST_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_BYTES = 1 << 30  # of a file
LONGEST_SHAPE = 32  # times as long as wide; rewards scale the short side to 224 pixels
# Those that Pillow decodes by itself; EPS and the like would start another program.
FORMATS = (
    "PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "ICO", "ICNS", "PPM", "TGA", "JPEG2000", "QOI",
    "PSD", "PCX", "SGI", "DDS",
)  # fmt: skip
SUFFIXES = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".avifs", ".gif", ".tif", ".tiff",
    ".bmp", ".dib", ".ico", ".icns", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".jpf", ".jpx", ".qoi",
    ".psd", ".pcx", ".sgi", ".dds", ".heic", ".heif", ".jxl", ".svg",
))  # fmt: skip
_OTHERS = (  # begins with; what it is
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "a zip archive"),
    (b"<svg", "SVG, a drawing"),
    (b"<?xml", "XML"),
    (b"<!DOCTYPE html", "a web page"),
    (b"<html", "a web page"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
)


@dataclass(frozen=True)
class Decoded:
    """A picture.

    Attributes:
        picture: in RGB, upright.
        note: what else is in the file and is not shown; empty if nothing is.
        info: text chunks and comments, by name.
        exif: EXIF values by tag, those of the camera's own part too.
    """

    picture: Image
    note: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)
    exif: Mapping[int, Any] = field(default_factory=dict)


@cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def read_file(path: Path) -> bytes:
    """The bytes of a picture file.

    Raises:
        ValueError: there is no file, it cannot be read, or it is no picture by its size or kind.
    """
    try:
        told = path.stat()
        if not stat.S_ISREG(told.st_mode):
            raise ValueError("is a folder" if stat.S_ISDIR(told.st_mode) else "is not a regular file")
        if not told.st_size:
            raise ValueError("is empty")
        if told.st_size > MOST_BYTES:
            raise ValueError(f"has {told.st_size / 2**30:.1f} GiB; at most {MOST_BYTES >> 30} GiB are read")
        return path.read_bytes()
    except FileNotFoundError:
        gone = f"is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else "is not there"
        raise ValueError(gone) from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error


def decode(data: bytes, *, least: int | None = None) -> Decoded:
    """A picture from the bytes of its file.

    Args:
        data: the whole file.
        least: pixels of the longer side that suffice; JPEG files are then decoded at a fraction of their size.

    Raises:
        ValueError: what is wrong with it.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=formats()) as picture:
            return shown(picture, least=least)
    except UnidentifiedImageError:
        raise ValueError(_what_else(data)) from None
    except Image.DecompressionBombError:
        raise ValueError(f"has too many pixels; at most {MOST_PIXELS // 10**6} million are taken") from None
    except _Refused:
        raise
    except MemoryError:
        raise ValueError("does not fit into memory") from None
    except Exception as error:  # of a damaged file, decoders raise whatever they stumble over
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError("is truncated" if "truncated" in said.lower() else f"is damaged: {said}") from error


def shown(picture: Image, *, least: int | None = None) -> Decoded:
    """An open picture, decoded; see `decode`.

    Raises:
        ValueError: it has too many pixels, or they are no picture's.
    """
    _check_size(*picture.size)
    if least:
        picture.draft("RGB", (least, least))
    animated = bool(getattr(picture, "is_animated", False)) and picture.format not in ("MPO", "ICO", "PSD")
    picture.load()
    note = "the first of its pages" if picture.format == "TIFF" else "the first frame of an animation"
    info = {str(name): value for name, value in picture.info.items()}
    return Decoded(_upright(picture), note if animated else "", info, _exif(picture))


class _Refused(ValueError):
    """A picture that can be decoded but is not taken."""


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
        most = f"{MOST_PIXELS // 10**6} million and {LONGEST_SIDE} a side"
        raise _Refused(f"has {width} x {height} pixels; at most {most} are taken")
    if max(width, height) > LONGEST_SHAPE * min(width, height):
        raise _Refused(f"has {width} x {height} pixels; no side may be more than {LONGEST_SHAPE} times the other")


def _exif(picture: Image) -> dict[int, Any]:
    """EXIF values by tag; a damaged block counts as none."""
    if not _may_have_exif(picture):
        return {}
    try:
        exif = picture.getexif()
        return {**exif, **exif.get_ifd(0x8769)}
    except Exception:
        return {}


def _may_have_exif(picture: Image) -> bool:
    """Whether there can be an orientation in a picture's metadata; asking Pillow takes as long as a small decode."""
    return picture.format in ("TIFF", "MPO", None) or any("exif" in name or "xmp" in name for name in picture.info)


def _upright(picture: Image) -> Image:
    """A picture in RGB as a viewer shows it."""
    from PIL import Image, ImageOps

    profile = picture.info.get("icc_profile")
    if _may_have_exif(picture):
        with contextlib.suppress(Exception):  # a damaged EXIF block turns nothing
            picture = ImageOps.exif_transpose(picture)
    if picture.mode == "RGB" and profile is None and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _eight_bits(picture)
    alpha = picture.has_transparency_data
    if alpha:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        opaque = Image.alpha_composite(ground, picture).convert("RGB")
    else:
        opaque = picture
    return _in_srgb(opaque, profile).convert("RGB")


def _eight_bits(picture: Image) -> Image:
    """A picture of one channel of 16 or 32 bits, or of floating-point numbers, in 8 bits."""
    import numpy as np
    from PIL import Image

    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())
    if not (0 <= low <= high):  # also where one is not a number
        raise _Refused(f"holds numbers from {low:g} to {high:g}, which are no picture's")
    if picture.mode == "F":
        top = 1.0 if high <= 1 else 255.0
    else:
        top = 65535.0 if picture.mode.startswith("I;16") or high > 255 else 255.0
    if high > top:
        raise _Refused(f"holds numbers up to {high:g}; {top:g} is the most that is taken for white")
    return Image.fromarray((values.astype(np.float64) * (255 / top)).round().astype(np.uint8))


def _in_srgb(picture: Image, profile: Any) -> Image:
    """A picture whose colours are in a profile of another space, in sRGB; one that cannot be used counts as none."""
    if not isinstance(profile, bytes) or b"sRGB" in profile or picture.mode not in ("RGB", "CMYK", "L"):
        return picture
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        made = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return made or picture
    except Exception:
        return picture


def _what_else(data: bytes) -> str:
    """What a file is that is no picture."""
    start = data[:64].lstrip()
    for beginning, name in _OTHERS:
        if start.startswith(beginning):
            return f"is {name}" if " " in name else f"is {name}, not a picture that can be read"
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypheif"):
        return "is HEIC, which is not read; convert it to JPEG or PNG"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "is AVIF, damaged or cut off"
    if data[4:8] == b"ftyp":
        return "is a video, not a picture"
    try:
        text = data[:4096].decode("utf-8")
    except UnicodeDecodeError:
        return "is not a picture that can be read"
    return "is text, not a picture" if text.isprintable() or "\n" in text else "is not a picture that can be read"


def is_picture(path: Path) -> bool:
    """Whether a file without a picture's name begins as a picture does."""
    from PIL import Image

    try:
        with path.open("rb") as file, Image.open(file, formats=formats()):
            return True
    except Exception:
        return False
