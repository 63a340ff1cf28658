"""How much is done at once: of each kind of work a limit of its own, which is halved when memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Limits:
    """Most items of each kind of work in one batch.

    Args:
        most: of every kind that has no limit of its own yet.
        too_big: what to say when not even one item fits.
    """

    def __init__(self, most: int, too_big: str = "one image does not fit into memory") -> None:
        self._own: dict[str, int] = {}
        self._most = most
        self.too_big = too_big

    @property
    def most(self) -> int:
        """Most candidates in one denoiser call."""
        return self.of("calls")

    def of(self, kind: str) -> int:
        """Most items of a kind in one batch."""
        return min(self._own.get(kind, self._most), self._most)

    def start(self, kind: str, limit: int) -> None:
        """Begin with so many."""
        self._own[kind] = limit

    def set(self, most: int) -> None:
        """Most of every kind from now on; a kind that had less keeps its own."""
        self._most = most
        self._own.pop("calls", None)

    def size(self, kind: str, count: int) -> int:
        """Items of the next of equal batches, of `count` that are left."""
        batches = -(-count // self.of(kind))
        return -(-count // batches)

    def halve(self, kind: str, size: int) -> None:
        """A batch of so many was too big."""
        self._own[kind] = max(1, size // 2)
        warnings.warn(f"out of memory: going on with at most {self._own[kind]} in a batch", stacklevel=3)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def run(self, kind: str, count: int, work: Callable[[slice], T], too_big: str | None = None) -> list[T]:
        """Results of `work`, one per batch, in order.

        Raises:
            MemoryError: not even one item fits into memory.
        """
        results: list[Any] = []
        start = 0
        while start < count:
            size = self.size(kind, count - start)
            try:
                results.append(work(slice(start, start + size)))
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise MemoryError(too_big or self.too_big) from error
            else:
                start += size
                continue
            # Outside the handler, where the error no longer holds on to the tensors of the failed batch.
            self.halve(kind, size)
        return results
