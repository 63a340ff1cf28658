"""Reading ahead on threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def ahead(
    pool: ThreadPoolExecutor, work: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], depth: int
) -> Generator[Any, None, None]:
    """Results in order; up to `depth` pieces of work are under way ahead of them."""
    waiting: deque[Future[Any]] = deque()
    try:
        for these in arguments:
            waiting.append(pool.submit(work, *these))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
