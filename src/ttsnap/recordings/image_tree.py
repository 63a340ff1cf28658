"""Images of x0 estimates on disk, in the layout the paper's data are published in, with a manifest beside them.

    <root>/manifest.json
    <root>/p0000/id000/s00.png ... s19.png      prompt 0, candidate 0, after 1 to 20 denoiser calls

An image appears under its name only when it is whole. What was truncated elsewhere is found by `fault`, which reads
little more than the ends of a file, or at the latest by `read`.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from ttsnap.core.grid import IntArray
from ttsnap.files.storage import AnyPath, Remote, location, vanished, write_json
from ttsnap.live.settings import changes

MANIFEST = "manifest.json"
FORMAT, VERSION = "ttsnap-image-tree", 1
FORMATS = ("png", "webp")
_PROMPT, _CANDIDATE = re.compile(r"p(\d{4,8})"), re.compile(r"id(\d{3,8})")
_IMAGE = re.compile(rf"s(\d{{2,5}})\.({'|'.join(FORMATS)})")


class BadImageError(ValueError):
    """An image that is missing, damaged or of the wrong size."""

    def __init__(self, path: AnyPath, fault: str) -> None:
        super().__init__(f"image {path} {fault}")
        self.path, self.fault = path, fault

    def __reduce__(self) -> Any:
        return type(self), (self.path, self.fault)


@dataclass(frozen=True)
class ImageTree:
    """Where the images of a pool of candidates lie, and what they are of.

    Attributes:
        root: the directory.
        prompts: all prompts [P]; those of which nothing is recorded yet have no directory.
        seeds: seed of each candidate [P, candidates], -1 where unknown.
        num_steps: denoiser calls of a finished image.
        calls: after which calls there is an image, ascending.
        sigmas: noise level of the x0 estimate after each call [num_steps], NaN where unknown.
        size: width and height of the stored images, pixels.
        format: `png`, or `webp` (lossless).
        settings: what made the images: model, guidance, size, ...
        versions: of the packages that made them.
        cost_model: TFLOP of the model that made them, as of `CostModel.tflops`; empty where unknown.
    """

    root: AnyPath
    prompts: tuple[str, ...]
    seeds: IntArray
    num_steps: int
    calls: tuple[int, ...]
    sigmas: tuple[float, ...]
    size: tuple[int, int]
    format: str = "png"
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    cost_model: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_candidates(self) -> int:
        """Candidates per prompt."""
        return int(self.seeds.shape[1])

    def save(self) -> None:
        """Write the manifest, or go on with a tree that has the same.

        Raises:
            ValueError: something else is there; names what differs.
        """
        if self.format not in FORMATS:
            raise ValueError(f"unknown image format {self.format!r}; known are {', '.join(FORMATS)}")
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"output path {self.root} is a file; give a directory")
        mine = self._manifest()
        if (self.root / MANIFEST).exists():
            found = _read_manifest(self.root)
            free = ("settings", "versions", "cost_model")
            different = [key for key in mine if key not in free and mine[key] != found.get(key)]
            different += changes(found["settings"], mine["settings"])
            if different:
                raise ValueError(
                    f"{self.root} holds a tree with other settings ({', '.join(different)} differ); give another --out"
                )
            return
        if self.root.is_dir() and any(_PROMPT.fullmatch(path.name) for path in self.root.iterdir()):
            raise ValueError(f"{self.root} holds images but no {MANIFEST}; give another --out")
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(mine, self.root / MANIFEST)

    @classmethod
    def open(cls, root: str | AnyPath, prompts: Sequence[str] | None = None) -> ImageTree:
        """A tree by its manifest, or without one by its files.

        Args:
            root: the directory.
            prompts: texts of the prompts, for a tree without a manifest.

        Raises:
            ValueError: no tree, or a manifest that is not valid.
        """
        root = location(root)
        if not root.is_dir():
            raise ValueError(f"there is no image tree at {root}")
        if (root / MANIFEST).exists():
            tree = cls._of_manifest(root, _read_manifest(root))
            if prompts is not None and tuple(prompts[: len(tree.prompts)]) != tree.prompts:
                raise ValueError(f"the prompts given are not those of {root / MANIFEST}")
            return tree
        return cls._of_files(root, prompts)

    @classmethod
    def _of_manifest(cls, root: AnyPath, data: dict[str, Any]) -> ImageTree:
        try:
            tree = cls(
                root,
                tuple(data["prompts"]),
                np.asarray(data["seeds"], dtype=np.int64),
                int(data["num_steps"]),
                tuple(int(call) for call in data["calls"]),
                tuple(float(sigma) for sigma in data["sigmas"]),
                (int(data["image_size"][0]), int(data["image_size"][1])),
                str(data["image_format"]),
                dict(data["settings"]),
                dict(data["versions"]),
                dict(data.get("cost_model", {})),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{root / MANIFEST} is not valid: {type(error).__name__} {error}") from error
        if not tree.prompts or tree.seeds.ndim != 2 or len(tree.seeds) != len(tree.prompts) or not tree.seeds.size:
            raise ValueError(f"{root / MANIFEST} is not valid: its seeds must be a list of candidates for each prompt")
        if len(tree.sigmas) != tree.num_steps or not tree.calls or tree.calls[-1] != tree.num_steps:
            raise ValueError(f"{root / MANIFEST} is not valid: sigmas or calls do not fit {tree.num_steps} steps")
        if tree.format not in FORMATS:
            raise ValueError(f"{root / MANIFEST} is not valid: image format {tree.format!r}")
        return tree

    @classmethod
    def _of_files(cls, root: AnyPath, prompts: Sequence[str] | None) -> ImageTree:
        """The layout alone: as many candidates as the fullest prompt has, calls and size of the first candidate."""
        folders = {int(match[1]): path for path in root.iterdir() if (match := _PROMPT.fullmatch(path.name))}
        if not folders:
            raise ValueError(f"{root} is not an image tree: it has neither a {MANIFEST} nor p0000/id000/s00.png")
        if prompts is None:
            raise ValueError(f"{root} has no {MANIFEST}; give the prompts")
        if max(folders) >= len(prompts):
            raise ValueError(f"{folders[max(folders)]} has no prompt; {len(prompts)} prompts were given")
        candidates = max(
            (int(match[1]) + 1 for folder in folders.values() for match in _matches(folder, _CANDIDATE)), default=0
        )
        inner: list[AnyPath] = [path for number in sorted(folders) for path in folders[number].glob("id*")]
        first = min(inner, key=str, default=root)
        images = sorted(((int(match[1]) + 1, match[2]) for match in _matches(first, _IMAGE)), key=lambda pair: pair[0])
        if not candidates or not images:
            raise ValueError(f"{root} is not an image tree: it holds no image such as p0000/id000/s00.png")
        from PIL import Image

        last, kind = images[-1]
        path = first / f"s{last - 1:02d}.{kind}"
        try:
            with path.open("rb") as file, Image.open(file) as image:
                size = image.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BadImageError(path, f"is damaged: {error}") from error
        return cls(
            root,
            tuple(prompts),
            np.full((len(prompts), candidates), -1, dtype=np.int64),
            last,
            tuple(call for call, _ in images),
            (float("nan"),) * last,
            size,
            kind,
        )

    def _manifest(self) -> dict[str, Any]:
        data = {
            "format": FORMAT,
            "version": VERSION,
            "prompts": list(self.prompts),
            "seeds": self.seeds.tolist(),
            "num_steps": self.num_steps,
            "calls": list(self.calls),
            "sigmas": list(self.sigmas),
            "image_size": list(self.size),
            "image_format": self.format,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "cost_model": dict(self.cost_model),
        }
        return dict(json.loads(json.dumps(data)))

    def path(self, prompt: int, candidate: int, call: int) -> AnyPath:
        """Where the image after `call` denoiser calls lies (its number is one less)."""
        return self.root / f"p{prompt:04d}" / f"id{candidate:03d}" / f"s{call - 1:02d}.{self.format}"

    def begun(self, prompt: int) -> bool:
        """Whether anything of a prompt is recorded."""
        return (self.root / f"p{prompt:04d}").is_dir()

    def fault(self, prompt: int, candidate: int, call: int) -> str | None:
        """What is wrong with an image, such as `is missing`, from the ends of its file; None if nothing is."""
        return _fault(self.path(prompt, candidate, call), self.size)

    def write(self, path: AnyPath, image: np.ndarray) -> None:
        """Store an image [h, w, 3] uint8 under `path`, scaled to the stored size, all of it or nothing."""
        from PIL import Image

        if image.shape[1::-1] != self.size:
            image = np.asarray(Image.fromarray(image).resize(self.size, Image.Resampling.BICUBIC))
        data = _ENCODERS[self.format](image)
        if isinstance(path, Remote):
            path.write_bytes(data)
            return
        # The name is always the same, so that what a killed run left behind is used again.
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            try:
                temporary.write_bytes(data)
            except FileNotFoundError:
                if not self.root.is_dir():
                    raise vanished(str(self.root)) from None
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(data)
            os.replace(temporary, path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
                error.filename = str(path)
            raise

    def read(self, prompt: int, candidate: int, call: int) -> np.ndarray:
        """An image [h, w, 3] uint8.

        Raises:
            BadImageError: it is missing, damaged or of the wrong size.
        """
        from PIL import Image

        path = self.path(prompt, candidate, call)
        try:
            with path.open("rb") as file:
                if fault := _fault_of(file, path.suffix, self.size):
                    raise BadImageError(path, fault)
                file.seek(0)
                with Image.open(file) as image:
                    return np.asarray(image.convert("RGB"))
        except FileNotFoundError:
            raise BadImageError(path, "is missing") from None
        except BadImageError:
            raise
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BadImageError(path, f"is damaged: {error}") from error


def _png(image: np.ndarray) -> bytes:
    """A PNG of an image [h, w, 3] uint8: each row less the one above, runs and Huffman codes.

    Four times as fast as the adaptive filters of image libraries, and a few percent larger.
    """
    height, width, _ = image.shape
    flat = np.ascontiguousarray(image).reshape(height, 3 * width)
    rows = np.empty((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 0] = 2  # the filter "up"
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    packer = zlib.compressobj(1, strategy=zlib.Z_RLE)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", packer.compress(rows.data) + packer.flush()),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _webp(image: np.ndarray) -> bytes:
    """A lossless WebP of an image [h, w, 3] uint8."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, quality=0, method=0)
    return buffer.getvalue()


_ENCODERS = {"png": _png, "webp": _webp}


def _fault(path: AnyPath, size: tuple[int, int]) -> str | None:
    try:
        with path.open("rb") as file:
            return _fault_of(file, path.suffix, size)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _fault_of(file: BinaryIO, suffix: str, size: tuple[int, int]) -> str | None:
    from PIL import Image

    if cut := _cut(file, suffix):
        return cut
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its size is told below
            with Image.open(file) as image:
                found = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"is damaged: {error}"
    return None if found == size else f"is {found[0]} x {found[1]} instead of {size[0]} x {size[1]}"


def _cut(file: BinaryIO, suffix: str) -> str | None:
    """Whether a file begins and ends as its format demands."""
    start = file.read(12)
    end = file.seek(0, io.SEEK_END)
    if suffix == ".png":
        file.seek(max(0, end - 8))
        known, whole = start[:8] == b"\x89PNG\r\n\x1a\n", file.read(4) == b"IEND"
    else:
        known = start[:4] == b"RIFF" and start[8:] == b"WEBP"
        whole = end >= 8 + int.from_bytes(start[4:8], "little")
    file.seek(0)
    if not end:
        return "is empty"
    if len(start) == 12 and not known:
        return f"is not a {suffix[1:]} image"
    return None if known and whole else "is truncated"


def _matches(folder: AnyPath, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    return [match for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]


def _read_manifest(root: AnyPath) -> dict[str, Any]:
    path = root / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("settings"), dict):
        raise ValueError(f"{path} is not the manifest of an image tree")
    if data.get("version") != VERSION:
        raise ValueError(f"{path} has version {data.get('version')}; this ttsnap reads {VERSION}")
    return data
