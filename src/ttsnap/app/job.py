"""One ordered search: its thread, its turns on the device, and what the page shows of it."""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ttsnap.app import view
from ttsnap.app.history import FINISHED, WINNER, History
from ttsnap.app.queue import Request
from ttsnap.core.errors import explain
from ttsnap.core.observers import Observer, Start, Stop
from ttsnap.policies import HandPicked
from ttsnap.policies.hand_picked import Picked, Proposal

if TYPE_CHECKING:
    from ttsnap.app.service import Service
    from ttsnap.core.cost import Ledger
    from ttsnap.core.grid import BoolArray, FloatArray, Query
    from ttsnap.core.observers import Look, Result
    from ttsnap.live.open_search import OpenSearch
    from ttsnap.live.result import SearchResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frame:
    """What the page shows at one moment."""

    board: str
    status: str


@dataclass(eq=False)
class Job(History):
    """One ordered search: it runs in a thread of its own when its turn comes, and can be asked for more afterwards.

    Attributes:
        request: what was asked for.
        frames: what the page shows, one for every change of the board; none is dropped.
        phase: waiting (for another of his), never (begun), queued, preparing, searching, picking, comparing or over.
        result: what it came to, once it is over.
        folder: where it is saved, once it is.
        trouble: what went wrong, in one sentence.
    """

    searches: Service = field(kw_only=True)
    request: Request = field(kw_only=True)
    home: Path = field(kw_only=True)
    frames: list[Frame] = field(default_factory=list)
    phase: str = "queued"
    result: SearchResult | None = None
    folder: Path | None = None
    trouble: str | None = None
    block: OpenSearch | None = None
    _busy: bool = False
    _hurried: bool = False
    _thread: threading.Thread | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _hurry: threading.Event = field(default_factory=threading.Event)
    _answered: threading.Event = field(default_factory=threading.Event)
    _answer: Picked | None = None

    # What the page does with it.

    def search(self) -> None:
        """Begin, when the turn comes."""
        self._work("preparing", self._search)

    def compare(self) -> None:
        """See what best-of-N gets for the same cost."""
        self._work("comparing", self._compare)

    def finish(self, ticked: str) -> None:
        """Finish dropped candidates after all, and let these come out first; seeds such as `3,5`."""
        mask = view.picked(ticked, [tile.seed for tile in self.tiles])
        self._work("searching", lambda: self._finish(mask))

    def hurry(self) -> None:
        """Drop all but the best so far, and finish that one."""
        if self.phase == "searching":
            self._hurry.set()

    def answer(self, ticked: str) -> None:
        """Who goes on, while the search waits for it."""
        if self.phase != "picking":
            raise ValueError("there is nothing to pick at the moment")
        seeds = [tile.seed for tile in self.tiles]
        keep = view.picked(ticked, seeds)
        self._answer = Picked(keep, view.more_like(ticked, seeds, keep))
        self._answered.set()

    def stop(self) -> None:
        """End at the next denoiser call; what is finished stays. One that has not begun never will."""
        if self.phase == "waiting":
            self.phase = "never"
        self._stop.set()
        self._answered.set()
        self.searches.queue.nudge()

    @property
    def active(self) -> bool:
        """Whether it wants the device, or has it, or waits for picks."""
        return self._busy or self.phase == "waiting"

    def wait(self) -> None:
        """Until it is over."""
        if self._thread is not None:
            self._thread.join()

    def status(self) -> str:
        """The line above the board at this moment."""
        if self.trouble:
            return view.error(self.trouble)
        if self.phase == "queued":
            before = self.searches.queue.before(self)
            if before and self.searches.warming:
                return view.status("Warming up: the server loads its model; your search begins then")
            if before:
                return view.status(
                    f"Waiting in the queue: {before} before you" if before > 1 else "Waiting in the queue: next"
                )
            return view.status("Starting")
        if self.phase == "preparing":
            return view.status("Warming up: loading what is not loaded yet, and counting what a search costs")
        if self.phase == "comparing":
            return view.status("Running best-of-N for the same cost")
        if self.phase == "picking":
            return view.progress(self, "Your turn: tick who goes on")
        if self.phase == "searching":
            return view.progress(self, "Stopping" if self._stop.is_set() else view.doing(self))
        stopped = self.result is not None and self.result.stopped
        return view.progress(self, self.said or ("Stopped" if stopped else "Done"))

    @property
    def said(self) -> str:
        """How it ended, if not by its policy, nor by a stop."""
        hurried = self._hurry.is_set() and self.result is not None and bool(self.result.images)
        return "Finished early, as you asked." if hurried else ""

    # What runs in its thread.

    def _work(self, phase: str, work: Callable[[], None]) -> None:
        if self._busy:
            raise ValueError("this search is still at work")
        self.trouble, self.phase, self._busy = None, "queued", True
        self._stop.clear()
        self._hurry.clear()
        self._hurried = False
        self.searches.queue.join(self)
        self._show()
        self._thread = threading.Thread(target=self._in_turn, args=(phase, work), daemon=True)
        self._thread.start()

    def _in_turn(self, phase: str, work: Callable[[], None]) -> None:
        try:
            self.searches.queue.wait(self, lambda: not self._stop.is_set())
            self.phase = phase
            self._show()
            work()
        except Stop:
            pass
        except Exception as error:
            self.trouble = sentence(error)
        finally:
            self.searches.queue.leave(self)
            self.pause()
            self.over, self.phase = True, "over"
            self._show()
            self._busy = False  # last: everything was shown by then

    def _search(self) -> None:
        searcher = self.searches.models.searcher(self.request)
        self.searches.check_candidates(searcher.candidates)
        if self.request.by_hand:
            searcher = replace(searcher, policy=HandPicked(searcher.policy, self._pick))
        self.block = searcher.open([self.request.prompt], seed=self.request.seed)
        self.phase = "searching"
        self.block.run(self)
        if self._hurry.is_set() and not self._stop.is_set():
            self._finish_best()
        self._save()

    def _finish_best(self) -> None:
        """Bring the best of those that came furthest to the end, where none is finished."""
        assert self.block is not None
        if any(tile.state in (FINISHED, WINNER) for tile in self.tiles):
            return
        looked = [c for c, tile in enumerate(self.tiles) if tile.reward is not None] or [0]
        best = max(looked, key=lambda c: (self.tiles[c].step, self.tiles[c].reward or 0.0, -c))
        self.block.finish(np.arange(len(self.tiles))[None] == best, self)

    def _compare(self) -> None:
        if self.block is None or self.block.result is None:
            raise ValueError("there is no search to compare with")
        self.block.compare(_Stoppable(self._stop))
        self._save()

    def _finish(self, mask: BoolArray) -> None:
        if self.block is None or self.block.result is None:
            raise ValueError("there is no search to go on with")
        if (mask & ~self.block.result.finished).any():
            self.block.finish(mask, self)
        if (mask & self.block.result.finished).any():
            self.block.take(np.flatnonzero(mask[0] & self.block.result.finished[0]).tolist())
            self.ended(self.block.result)
        self._save()

    def _save(self) -> None:
        assert self.block is not None
        self.result = self.block.results(top=3)[0]
        self.missed = view.misses(self.result)
        if self.folder is None:
            slug = re.sub(r"[^a-z0-9]+", "-", self.request.prompt.lower()).strip("-")[:40] or "image"
            self.folder = self.home / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug}-{secrets.token_hex(3)}"
        self.result.save(self.folder)

    def _pick(self, proposal: Proposal) -> Picked:
        """Put the look before the visitor; meanwhile others may have the device."""
        for tile, keep in zip(self.tiles, proposal.keep[0], strict=True):
            tile.proposed = bool(keep)
        self._answered.clear()
        self._check()
        self.pause()
        self.searches.queue.leave(self)
        self.phase = "picking"
        self._show(ticks=True)
        self._answered.wait()
        self._check()
        self.phase = "queued"
        self.searches.queue.join(self)
        self.searches.queue.wait(self, lambda: not self._stop.is_set())
        self.phase = "searching"
        self.tick()
        assert self._answer is not None
        return self._answer

    # The observer: as the history goes, and a frame for every change of the board.

    def _check(self) -> None:
        hurried = self._hurry.is_set() and bool(self.rungs) and not self._hurried  # after a look: who is the best?
        if self._stop.is_set() or hurried:
            self._hurried = True
            raise Stop

    def _show(self, *, ticks: bool = False) -> None:
        late = self.phase == "over" and self.request.by_hand and self.block is not None and self.trouble is None
        sampler = self.block.session.sampler if self.block else None
        more = ticks and sampler is not None and not (sampler.diversity or sampler.probe.copies)
        self.frames.append(Frame(view.board(self, ticks=ticks, more=more, late=late), self.status()))

    def started(self, start: Start) -> None:
        """As the history, shown."""
        super().started(start)
        self._show()

    def asked(self, query: Query) -> None:
        """As the history, shown."""
        super().asked(query)
        self._show()
        self._check()

    def called(self, calls: int) -> None:
        """As the history; this is where a stop takes effect."""
        super().called(calls)
        self._check()

    def judged(self, step: int, rewards: FloatArray) -> None:
        """As the history, shown."""
        super().judged(step, rewards)
        self._show()
        self._check()

    def looked(self, look: Look, ledger: Ledger) -> None:
        """As the history, shown."""
        super().looked(look, ledger)
        self._show()
        self._check()

    def ended(self, result: Result) -> None:
        """As the history, shown."""
        super().ended(result)
        self._show()


class _Stoppable(Observer):
    """Tells nothing, and stops when it should."""

    def __init__(self, stop: threading.Event) -> None:
        self._event = stop

    def called(self, calls: int) -> None:
        if self._event.is_set():
            raise Stop


def sentence(error: Exception) -> str:
    """One sentence for a visitor; what is not his doing goes to the log in full."""
    if isinstance(error, ValueError | OSError | MemoryError | ModuleNotFoundError):
        return explain(error)
    logger.error("a search failed", exc_info=error)
    return f"the search failed ({type(error).__name__}); the server's log says more"
