"""Lines of JSON that are only ever added to a file, so that a process may be killed at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; a line that was not written to its end is left out."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for line in data.split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


class Journal:
    """Adds lines to a file, after the last one that is whole; usable as a context."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("r+b")
        data = path.read_bytes()
        self._file.seek(data.rfind(b"\n") + 1)
        self._file.truncate()

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add some lines; when this returns they survive the end of the process."""
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        self._file.write(text.encode())
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: Any) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
