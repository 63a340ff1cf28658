"""What a picture file says about how it was made.

Two texts. `parameters` is the one that AUTOMATIC1111 introduced and that its successors, ComfyUI and most viewers read:

    a red circle left of a blue square
    Negative prompt: blurry
    Steps: 20, Sampler: Euler, CFG scale: 3.5, Seed: 7, Size: 64x64, Model hash: 1f0d2b3c4d, Model: shapes

`ttsnap` is a JSON object with all that a search knows. In a PNG both are text chunks of those names. In JPEG and WebP
they lie in the EXIF data: `parameters` as the user comment, where those viewers look for it, and `ttsnap` as the maker
note. Nothing in either depends on the moment or the machine, so equal searches write equal files.
"""

from __future__ import annotations

import io
import json
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ttsnap.files.decoding import read_file

if TYPE_CHECKING:
    from PIL.Image import Image

PARAMETERS, OWN = "parameters", "ttsnap"  # names of the chunks of a PNG
EXIF_IFD, USER_COMMENT, MAKER_NOTE = 0x8769, 0x9286, 0x927C
TIFF_HEAD, LONG, UNDEFINED = 8, 4, 7  # bytes of the head; types of values
UNICODE = b"UNICODE\0"  # says how the user comment is written
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
NEGATIVE = "Negative prompt:"
FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
FEWEST = 3  # fields in the last line of `parameters`, else it belongs to the prompt


@dataclass(frozen=True)
class Parameters:
    """What the text `parameters` says.

    Attributes:
        prompt: what was to be painted.
        negative: what guidance led away from.
        fields: Steps, Sampler, Seed and so on, as text.
    """

    prompt: str
    negative: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The text. The line of the negative prompt is always there: ComfyUI reads nothing without it."""
        values = ", ".join(f"{name}: {_quoted(value)}" for name, value in self.fields.items())
        return f"{self.prompt}\n{NEGATIVE} {self.negative}\n{values}"

    @classmethod
    def parse(cls, text: str) -> Parameters:
        """What such a text says, whoever wrote it."""
        *lines, last = text.strip().split("\n")
        found = FIELD.findall(last)
        if len(found) < FEWEST:
            lines, found = [*lines, last], []
        start = next((n for n, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
        prompt = "\n".join(line.strip() for line in lines[:start])
        negative = "\n".join(line.strip() for line in lines[start:]).removeprefix(NEGATIVE).strip()
        return cls(prompt, negative, {name: _plain(value) for name, value in found})


@dataclass(frozen=True)
class Metadata:
    """What a picture file says about how it was made.

    Attributes:
        parameters: for the viewers of others.
        own: the JSON object of ttsnap; None where another program made the picture.
    """

    parameters: Parameters
    own: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        known = self.parameters
        return {
            "parameters": {"prompt": known.prompt, "negative_prompt": known.negative, **known.fields},
            "ttsnap": None if self.own is None else dict(self.own),
        }


def encode(image: Image, metadata: Metadata | None = None, *, kind: str = "PNG", **options: Any) -> bytes:
    """An image as the bytes of a file.

    Args:
        image: what is shown.
        metadata: what the file says about it; None: nothing.
        kind: PNG, JPEG or WEBP.
        **options: of Pillow's `save`, such as `quality`.
    """
    if metadata is not None:
        options["pnginfo" if kind == "PNG" else "exif"] = _chunks(metadata) if kind == "PNG" else _exif(metadata)
    buffer = io.BytesIO()
    try:
        image.save(buffer, format=kind, **options)
    except ValueError as error:
        if metadata is None or "too long" not in str(error):
            raise
        warnings.warn("a JPEG holds at most 64 KiB of metadata; this one is saved without", stacklevel=2)
        return encode(image, kind=kind, **{name: value for name, value in options.items() if name != "exif"})
    return buffer.getvalue()


def read(source: str | Path | IO[bytes]) -> Metadata:
    """What a picture file says about how it was made.

    Raises:
        ValueError: no such file, no picture, or one that says nothing; the message says which.
    """
    from PIL import Image, UnidentifiedImageError

    name = source if isinstance(source, str | Path) else "the picture"
    if isinstance(source, str | Path):
        try:
            source = io.BytesIO(read_file(Path(source)))
        except ValueError as error:
            raise ValueError(f"cannot read {name}: it {error}") from error
    try:
        with Image.open(source) as image:
            image.load()  # chunks of text may follow the image
            parameters, own = _texts(image)
    except (UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is not a picture that can be read") from error
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror or error}") from error
    if parameters is None and own is None:
        raise ValueError(f"{name} does not say how it was made: it holds no metadata of ttsnap or AUTOMATIC1111")
    try:
        data = None if own is None else json.loads(own)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: its metadata is not valid JSON") from error
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"{name} is damaged: its metadata is no JSON object")
    return Metadata(Parameters.parse(parameters or ""), data)


def _texts(image: Image) -> tuple[str | None, str | None]:
    """Both texts as they lie in a file."""
    found = [image.info.get(name) for name in (PARAMETERS, OWN)]
    exif = image.getexif().get_ifd(EXIF_IFD)
    note = exif.get(MAKER_NOTE)
    if found[0] is None:
        found[0] = comment(exif.get(USER_COMMENT))
    if found[1] is None and isinstance(note, bytes) and note.startswith(b"{"):
        found[1] = note.decode("utf-8", "replace")
    return tuple(str(text) if text is not None else None for text in found)  # type: ignore[return-value]


def comment(value: Any) -> str | None:
    """The text of a user comment of EXIF, whichever way it is written: eight bytes name its encoding, text follows."""
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        return None
    kind, text = value[:8], value[8:]
    if kind == UNICODE:
        # The standard leaves the order of the bytes open: most characters are below 256, so one half is zeros.
        big = text[::2].count(0) >= text[1::2].count(0)
        found = text.decode("utf-16-be" if big else "utf-16-le", "replace")
    elif kind.rstrip(b"\0") == b"JIS":
        found = text.decode("shift_jis", "replace")
    else:
        found = (text if kind in (b"ASCII\0\0\0", bytes(8)) else value).decode("utf-8", "replace")
    return found.strip("\0") or None


def _chunks(metadata: Metadata) -> Any:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text(PARAMETERS, str(metadata.parameters))
    if metadata.own is not None:
        chunks.add_text(OWN, _json(metadata.own))
    return chunks


def _exif(metadata: Metadata) -> bytes:
    """EXIF data: a directory that holds nothing but where the directory of Exif tags lies, and that one.

    Pillow would write both texts as bytes, where readers of user comments ask for the type "undefined".
    """
    texts = {USER_COMMENT: UNICODE + str(metadata.parameters).encode("utf-16-be")}
    if metadata.own is not None:
        texts[MAKER_NOTE] = _json(metadata.own).encode()
    start = TIFF_HEAD + _size_of(1)
    place = start + _size_of(len(texts))
    entries = b""
    for tag, text in sorted(texts.items()):
        entries += struct.pack(">HHII", tag, UNDEFINED, len(text), place)
        place += len(text)
    first = struct.pack(">HHHIII", 1, EXIF_IFD, LONG, 1, start, 0)
    inside = struct.pack(">H", len(texts)) + entries + bytes(4)
    values = b"".join(text for _, text in sorted(texts.items()))
    return b"Exif\0\0" + struct.pack(">2sHI", b"MM", 42, TIFF_HEAD) + first + inside + values


def _size_of(entries: int) -> int:
    """Bytes of a directory of TIFF with so many entries."""
    return 2 + 12 * entries + 4


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False)


def _quoted(value: object) -> str:
    """A value of a field; one that would be read as several is written as JSON."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def _plain(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


__all__ = ["FORMATS", "USER_COMMENT", "Metadata", "Parameters", "comment", "encode", "read"]
