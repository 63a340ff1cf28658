"""Files that are added to a pipeline: what they may be, and one sentence about what they cannot be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttsnap.pipelines.hub_errors import explain
from ttsnap.pipelines.single_file import PICKLES, check_safetensors, first_line


def listed(given: str | Sequence[str]) -> list[str]:
    """One text, or several."""
    return [given] if isinstance(given, str) else list(given)


def split(text: str) -> tuple[str, str | None]:
    """What stands before and after the last colon, unless all of it is a path."""
    source, colon, end = text.rpartition(":")
    if not colon or Path(text).exists() or "/" in end:
        return text, None
    return source, end


def weights_in(path: Path, *names: str) -> Path | None:
    """The safetensors file that a path is, or that its directory holds; None for a hub id."""
    if path.is_file():
        return path
    if not path.is_dir():
        return None
    here = sorted(path.glob("*.safetensors"))
    named = [file for file in here if file.name in names]
    if not named and len(here) != 1:
        what = "several .safetensors files; name one of them" if here else "no .safetensors file"
        raise ValueError(f"{path} holds {what}")
    return (named or here)[0]


def folder_of(source: str, part: str) -> Path:
    """The directory of a part: that of a whole pipeline holds it in one of its own."""
    path = Path(source)
    return path / part if (path / "model_index.json").is_file() else path


def check_source(source: str, what: str) -> None:
    """ValueError where a source is neither a file of weights, a directory, nor a hub id."""
    path = Path(source)
    if path.suffix in PICKLES:
        raise ValueError(
            f"{source} is a pickle, which can run code when it is opened; get the {what} as .safetensors, or convert "
            "it where you trust it"
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError(f"{source} is a file; that of a {what} ends with .safetensors")
    if path.is_file():
        check_safetensors(path)
    looks_local = source.startswith((".", "/", "~")) or not 1 <= source.count("/") <= 4
    if not path.exists() and (looks_local or (path.suffix == ".safetensors" and source.count("/") == 1)):
        raise ValueError(f"there is no {what} {source!r}; give a .safetensors file, its directory, or a hub id")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file; {} where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def check_takes(kind: type, method: str, what: str) -> None:
    """ValueError where the pipelines of a class have no method to add something with."""
    if not hasattr(kind, method):
        raise ValueError(f"{kind.__name__} takes no {what} in diffusers; leave it out")


def unfit(source: str, pipe: Any, error: BaseException) -> ValueError:
    """Why something could not be added, in one sentence."""
    if not Path(source).exists():
        return ValueError(explain(source, error, "repository"))
    return ValueError(f"{source} does not fit {type(pipe).__name__}: {first_line(error)}")
