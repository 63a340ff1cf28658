"""For people at a prompt: a progress bar, and results that can be waited for with `async for`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from ttsnap.core.observers import SILENT, Observer

if TYPE_CHECKING:
    from ttsnap.core.cost import Ledger
    from ttsnap.core.grid import Fork, Query
    from ttsnap.core.observers import Look, Result, Start

T = TypeVar("T")


def in_notebook() -> bool:
    """Whether this is a notebook's kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def bar(progress: bool | None, **options: Any) -> Any:
    """A progress bar of tqdm, in a notebook its widget; None where none is wanted.

    Args:
        progress: whether one is wanted; None: in notebooks.
        **options: of tqdm.
    """
    if not (in_notebook() if progress is None else progress):
        return None
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without ipywidgets it is a line of text
        from tqdm.auto import tqdm

    return tqdm(**options)


class Shown(Observer):
    """Shows a search as a bar of denoiser calls, with who is alive and the best reward; tells another observer, too."""

    def __init__(self, inner: Observer | None, progress: bool | None) -> None:
        self.inner, self._progress = inner or SILENT, progress
        self._bar: Any = None

    def started(self, start: Start) -> None:
        """A bar of all calls that are planned."""
        calls = start.cost_model.of_plan(start.plan).nfe * len(start.prompts)
        self._bar = bar(self._progress, total=calls, unit="call", desc=start.prompts[0][:40], leave=False)
        self.inner.started(start)

    def asked(self, query: Query) -> None:
        """As it is told."""
        self.inner.asked(query)

    def forked(self, fork: Fork) -> None:
        """As it is told."""
        self.inner.forked(fork)

    def called(self, calls: int) -> None:
        """The bar moves."""
        if self._bar is not None:
            self._bar.update(calls)
        self.inner.called(calls)

    def judged(self, step: int, rewards: Any) -> None:
        """As it is told."""
        self.inner.judged(step, rewards)

    def looked(self, look: Look, ledger: Ledger) -> None:
        """Who is alive, and the best reward."""
        if self._bar is not None:
            best = float(np.nanmean(np.nanmax(look.combined, axis=1)))
            self._bar.set_postfix(alive=f"{look.alive.sum(axis=1).mean():.3g}", best=f"{best:.3f}")
        self.inner.looked(look, ledger)

    def ended(self, result: Result) -> None:
        """The bar goes."""
        self.close()
        self.inner.ended(result)

    def close(self) -> None:
        """The bar goes, however the search ended."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Stream(Generic[T]):
    """What comes one after the other, for `for` and for `async for`; the latter leaves the event loop free.

    Args:
        items: makes them; with `async for` in a thread of its own.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._thread: ThreadPoolExecutor | None = None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return next(self._items)

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        end = object()
        item = await self._in_thread(lambda: next(self._items, end))
        if item is end:
            await self.aclose()
            raise StopAsyncIteration
        found: T = item
        return found

    def close(self) -> None:
        """Make no more of them."""
        getattr(self._items, "close", lambda: None)()

    async def aclose(self) -> None:
        """The same, with `async for`."""
        if self._thread is not None:
            await self._in_thread(self.close)
            self._thread.shutdown(wait=False)
            self._thread = None

    async def _in_thread(self, work: Any) -> Any:
        """Always in the same thread: suspended calls of a pipeline cannot go on in another."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "ttsnap-stream")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
