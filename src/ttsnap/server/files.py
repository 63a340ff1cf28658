"""Pictures that are handed out by URL: kept in memory, for an hour, under names that nobody can guess."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from typing import NamedTuple

HOUR = 3600.0
MOST_BYTES = 1 << 30  # of all of them; the oldest go first


class File(NamedTuple):
    """One picture."""

    data: bytes
    media_type: str
    until: float


class Files:
    """The pictures that are handed out.

    Args:
        seconds: for how long.
        most: bytes of all of them.
    """

    def __init__(self, seconds: float = HOUR, most: int = MOST_BYTES) -> None:
        self.seconds, self.most = seconds, most
        self._files: OrderedDict[str, File] = OrderedDict()
        self._bytes = 0

    def add(self, data: bytes, kind: str) -> str:
        """Keep a picture; its name."""
        name = f"{secrets.token_urlsafe(24)}.{kind}"
        self._files[name] = File(data, f"image/{kind}", time.monotonic() + self.seconds)
        self._bytes += len(data)
        while self._files and (self._bytes > self.most or next(iter(self._files.values())).until < time.monotonic()):
            _, gone = self._files.popitem(last=False)
            self._bytes -= len(gone.data)
        return name

    def get(self, name: str) -> File | None:
        """The picture of that name, if it is still there."""
        file = self._files.get(name)
        return file if file is not None and file.until >= time.monotonic() else None
