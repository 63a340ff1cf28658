"""Searches that clients wait for, and those of them that share batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.core.cost import Budget, affordable
from ttsnap.core.driver import drive
from ttsnap.core.observers import Observer, Stop

if TYPE_CHECKING:
    from PIL.Image import Image

    from ttsnap.core.cost import Ledger
    from ttsnap.core.grid import FloatArray, Fork, Policy, Query
    from ttsnap.core.observers import Look
    from ttsnap.live.engine import Grid, Searching
    from ttsnap.live.result import SearchResult
    from ttsnap.live.session import Session

FORGET = 64  # searches after which encoded prompts are forgotten


class Cancelled(Exception):
    """The client does not want it any more."""


class Unavailable(Exception):
    """The server cannot take it now.

    Attributes:
        retry_after: seconds after which it may be asked again.
        whose: `client`: it has asked for much already; `server`: all clients together have, or it ends.
    """

    def __init__(self, message: str, retry_after: int, whose: str = "server") -> None:
        super().__init__(message)
        self.retry_after, self.whose = retry_after, whose


@dataclass(frozen=True)
class Edit:
    """A picture to start from.

    Attributes:
        image: the bytes of its file.
        mask: those of a picture that is white where the image is to be painted over.
        strength: how far from the image, above 0 and at most 1.
    """

    image: bytes
    mask: bytes | None = None
    strength: float | None = None


@dataclass(frozen=True)
class CallOptions:
    """Arguments of the pipeline's call: searches in which these are the same share batches."""

    size: str | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    edit: Edit | None = None


@dataclass(eq=False)
class Search(Observer):
    """One picture that a client waits for: a search of its own.

    Attributes:
        prompt: what to paint.
        seed: of the first candidate.
        options: arguments of the pipeline's call.
        effort: candidates as a multiple of what the server starts with, or a budget.
        offset: how many searches of the same request come before it; their candidates have other seeds.
        shows: how many early looks the client is shown.
        client: who asked.
        done: is told of the result, or why there is none, in the worker's thread.
        shown: is told of the best candidate's picture at a look, in the same thread.
        asked_at: when it was asked for, by the monotonic clock.
        begun_at: when it was begun.
    """

    prompt: str
    seed: int
    done: Callable[[SearchResult | Exception], None]
    options: CallOptions = field(default_factory=CallOptions)
    effort: float | Budget = 1.0
    offset: int = 0
    shows: int = 0
    client: str = ""
    shown: Callable[[Image], None] | None = None
    asked_at: float = field(default_factory=time.monotonic)
    begun_at: float | None = None
    _cancelled: threading.Event = field(init=False, default_factory=threading.Event)
    _grid: Grid | None = field(init=False, default=None)
    _steps: tuple[int, ...] = field(init=False, default=())

    def cancel(self) -> None:
        """It is not wanted any more; it ends at its next denoiser call."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it is not wanted any more."""
        return self._cancelled.is_set()

    def begin(self, grid: Grid, policy: Policy) -> None:
        """It is begun: its candidates, and what will ask about them."""
        self.begun_at, self._grid = time.monotonic(), grid
        problem = grid.problem
        early = [rung.step for rung in policy.plan(problem.num_candidates, problem.num_steps) if rung.size]
        early = [step for step in early if step < problem.num_steps]
        chosen = np.linspace(0, len(early) - 1, min(self.shows, len(early)))
        self._steps = tuple(early[round(place)] for place in chosen)

    def called(self, calls: int) -> None:
        """A denoiser call was made: this is where a search ends that is not wanted any more."""
        if self.cancelled:
            raise Stop

    def looked(self, look: Look, ledger: Ledger) -> None:
        """Show the candidate that is best so far."""
        from PIL import Image

        if look.step not in self._steps or self.shown is None or self._grid is None:
            return
        best = int(np.nanargmax(np.where(look.alive[0], look.combined[0], -np.inf)))
        picture = self._grid.pictures.get((0, best, look.step))
        if picture is not None:
            sampler = self._grid.engine.sampler
            self.shown(Image.fromarray(picture).resize((sampler.width, sampler.height)))

    def end(self, outcome: SearchResult | Exception) -> None:
        """It is over; its candidates are let go."""
        self._grid = None
        self.done(outcome)


class Lane:
    """Searches with the same arguments of the call, which share batches: one loop of one engine.

    Args:
        session: a model, rewards and a policy, made for these arguments.
        room: whether another search may begin.
        most: candidates of a search.

    Attributes:
        waiting: searches that have not begun, in order of arrival.
        under_way: those that have, by number.
        used: when it last had something to do, by the monotonic clock.
    """

    def __init__(self, session: Session, room: Callable[[], bool], most: int) -> None:
        self.session, self.engine, self.room, self.most = session, session.engine(), room, most
        self.waiting: deque[Search] = deque()
        self.under_way: dict[int, tuple[Search, Session]] = {}
        self.used = time.monotonic()
        self._turns = self.engine.turns(self._searches())
        self._count = self._since = 0
        self._calibrated: Any = None

    @property
    def busy(self) -> bool:
        """Whether it has something to do."""
        return bool(self.waiting or self.under_way)

    @property
    def open_calls(self) -> int:
        """Suspended calls of the pipeline."""
        return sum(len(search._grid.calls) for search, _ in self.under_way.values() if search._grid)

    def turn(self) -> Iterator[tuple[Search, SearchResult | Exception]]:
        """Run one batch; the searches that ended with it, and what they came to."""
        self.used = time.monotonic()
        for search in [search for search in self.waiting if search.cancelled]:
            self.waiting.remove(search)
            yield search, Cancelled()
        ended = next(self._turns)
        if ended is not None:
            search, session = self.under_way.pop(ended.number)
            yield search, self._outcome(search, session, ended)
            self._since += 1
            if self._since >= FORGET or not self.busy:
                self.session.sampler.forget_prompts()
                self._since = 0

    def abandon(self) -> list[Search]:
        """Give up: all its searches, none of which will end by itself."""
        self._turns.close()
        lost = [*(search for search, _ in self.under_way.values()), *self.waiting]
        self.under_way.clear()
        self.waiting.clear()
        return lost

    def _searches(self) -> Iterator[Searching | None]:
        """Searches to begin as soon as there is room; None: not at the moment."""
        while True:
            search = self.waiting.popleft() if self.waiting and self.room() else None
            if search is None:
                yield None
                continue
            self._count += 1
            yield self._begun(search, self._count)

    def _begun(self, search: Search, number: int) -> Searching:
        from ttsnap.live.engine import Searching

        try:
            count = self._candidates(search)
            session = replace(self.session, candidates=count)
            policy = session.policy
            first = search.seed + search.offset * count
            seeds = first + np.arange(count)[None]
            grid = self.engine.grid([search.prompt], seeds, previews=search.shows > 0, observer=search)
            search.begin(grid, policy)
            rng = np.random.default_rng([first, 0])  # as `ttsnap generate` with that seed
            queries = drive(policy, grid, session.combine, rng, observer=search)
        except Exception as error:
            self.under_way[number] = search, self.session
            return Searching(number, self.engine.grid([search.prompt], np.zeros((1, 1), int)), _failing(error))
        self.under_way[number] = search, session
        return Searching(number, grid, queries)

    def _candidates(self, search: Search) -> int:
        """How many a search starts."""
        session = self.session
        if isinstance(search.effort, Budget):
            model = session.cost_model
            if search.effort.unit == "s":
                from ttsnap.live.calibration import calibrate

                if self._calibrated is None:
                    self._calibrated = calibrate(session.sampler, session.judges, model, search.prompt)
                model = self._calibrated
            count = affordable(session.policy, search.effort, model, session.sampler.num_steps)
        else:
            count = max(1, round(session.candidates * search.effort))
        if count > self.most:
            raise ValueError(f"a search here starts at most {self.most} candidates, this would be {count}")
        return count

    def _outcome(self, search: Search, session: Session, ended: Searching) -> SearchResult | Exception:
        from ttsnap.live.open_search import OpenSearch

        if search.cancelled:
            return Cancelled()
        if ended.error is not None:
            return ended.error
        try:
            block = OpenSearch(session, ended.grid, ended.result, ended.seconds, ended.notes)
            return block.results(top=1)[0]
        except Exception as error:
            return error


def _failing(error: Exception) -> Generator[Query | Fork, FloatArray, Any]:
    """The queries of a search that fails before it asks anything."""
    yield from ()
    raise error


__all__ = ["CallOptions", "Cancelled", "Edit", "Lane", "Search", "Unavailable"]
