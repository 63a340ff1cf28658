"""Which pictures are meant by folders, patterns, files and tables, and the prompts that a table gives them."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttsnap.files.decoding import SUFFIXES, is_picture
from ttsnap.files.text import read_text

TABLES = (".csv", ".tsv", ".jsonl")
MOST_TABLE = 256 << 20  # bytes of a table
FILE_COLUMNS = ("file", "path", "image", "file_name", "filename", "picture", "image_path")
PROMPT_COLUMNS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class Found:
    """Pictures that were found.

    Attributes:
        files: in order, each once.
        prompts: those that a table gives, by file.
        left_out: files of folders that are no pictures, neither by name nor by content.
    """

    files: list[Path]
    prompts: dict[Path, str] = field(default_factory=dict)
    left_out: list[Path] = field(default_factory=list)


def find_pictures(sources: Sequence[str | Path], *, skip: Iterable[Path] = (), marker: str | None = None) -> Found:
    """The pictures that `sources` name.

    Args:
        sources: folders (with all their folders, in the order of names), patterns such as `a/**/*.png`, pictures, and
            tables (.csv, .tsv, .jsonl) with a column `file`, relative to the table, and perhaps `prompt`.
        skip: folders that are not looked into.
        marker: the name of a file; folders that hold it are not looked into.

    Raises:
        ValueError: a source is not there or names nothing.
    """
    files: dict[Path, None] = {}
    prompts: dict[Path, str] = {}
    left_out: list[Path] = []
    skipped = {path.resolve() for path in skip}
    for source in sources:
        path = Path(source).expanduser()
        before = len(files)
        if path.is_dir():
            for file in _walk(path, skipped, marker):
                if file.suffix.lower() in SUFFIXES or (file.is_file() and is_picture(file)):
                    files[file] = None
                else:
                    left_out.append(file)
            if len(files) == before and not any(file.is_relative_to(path) for file in files):
                raise ValueError(f"{source} holds no picture")
        elif path.suffix.lower() in TABLES and path.is_file():
            for file, prompt in _rows(path):
                files[file] = None
                if prompt:
                    prompts[file] = prompt
        elif path.is_file() or path.is_symlink():
            files[path] = None
        else:
            matches = sorted(glob.glob(str(path), recursive=True))
            chosen = [Path(match) for match in matches if not Path(match).is_dir()]
            if not chosen:
                raise ValueError(f"there is no picture {source}; give a folder, a pattern such as 'a/*.png' or a table")
            files |= dict.fromkeys(chosen)
    return Found(list(files), prompts, left_out)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a .csv, .tsv or .jsonl file, by the names of its columns in small letters.

    Raises:
        ValueError: it cannot be read.
    """
    text = read_text(path, MOST_TABLE)
    try:
        if path.suffix.lower() == ".jsonl":
            rows: list[Any] = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} is not a valid {path.suffix[1:]} table: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a table: each line must be a JSON object with a file, and perhaps a prompt")
    return [
        {str(name).strip().lower(): str(value) for name, value in row.items() if name is not None and value is not None}
        for row in rows
    ]


def column(rows: Sequence[Mapping[str, str]], names: Sequence[str]) -> str | None:
    """The first of these names that is a column."""
    return next((name for name in names if any(name in row for row in rows)), None)


def prompts_by_file(path: Path) -> dict[str, str] | None:
    """What a table says of each file, by the file as it stands there; None if it is no table of files and prompts."""
    rows = read_table(path)
    file, prompt = column(rows, FILE_COLUMNS), column(rows, PROMPT_COLUMNS)
    if file is None or prompt is None:
        return None
    return {row[file]: row[prompt] for row in rows if row.get(file) and row.get(prompt)}


def _rows(path: Path) -> Iterator[tuple[Path, str | None]]:
    """Files that a table names, and their prompts."""
    rows = read_table(path)
    file, prompt = column(rows, FILE_COLUMNS), column(rows, PROMPT_COLUMNS)
    if file is None:
        raise ValueError(f"{path} needs a header with a column `file`, and perhaps `prompt`")
    for row in rows:
        if row.get(file, "").strip():
            yield path.parent / row[file].strip(), row.get(prompt) if prompt else None


def _walk(folder: Path, skipped: set[Path], marker: str | None) -> Iterator[Path]:
    """Files in a folder and its folders; linked folders too, each once."""
    seen: set[Path] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        here = Path(root).resolve()
        if here in seen or here in skipped or (marker in files and marker is not None):
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root) / name for name in sorted(files))
