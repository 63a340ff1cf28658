"""Where searches are ordered: one at a time on the device, the others in line, each visitor's own."""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap.app import view
from ttsnap.app.story import Story
from ttsnap.observers import Observer, Start, Stop
from ttsnap.policies import HandPicked
from ttsnap.policies.hand_picked import Proposal

if TYPE_CHECKING:
    from ttsnap.block import Block
    from ttsnap.cost import Ledger
    from ttsnap.results import SearchResult
    from ttsnap.search import Look, Result
    from ttsnap.types import BoolArray, FloatArray, Query

logger = logging.getLogger(__name__)
POLICIES = {
    "tuned for the model": None,
    "successive halving": "halving",
    "best-of-N": "best-of-n",
    "early selection": "early-selection",
}


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for at most."""

    prompt: int = 600  # characters
    candidates: int = 128
    side: int = 2048  # pixels
    steps: int = 100
    waiting: int = 20  # searches in line


@dataclass(frozen=True)
class Order:
    """What a visitor asks for; `by_hand`: he picks at each look."""

    prompt: str
    model: str
    rewards: tuple[str, ...]
    policy: str = "tuned for the model"
    budget: str | None = None
    candidates: int | None = None
    seed: int = 0
    size: int | None = None
    steps: int | None = None
    by_hand: bool = False


class Line:
    """Those who want the device, in order of arrival; the first has it."""

    def __init__(self) -> None:
        self._order: list[Any] = []
        self._changed = threading.Condition()

    def join(self, who: Any) -> None:
        """Go to the end of the line."""
        with self._changed:
            self._order.append(who)

    def wait(self, who: Any, wanted: Callable[[], bool]) -> None:
        """Until it is one's turn; `Stop` when it is not wanted any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] is who or not wanted())
            if not wanted():
                self._order.remove(who)
                self._changed.notify_all()
                raise Stop

    def leave(self, who: Any) -> None:
        """Let the next one have it."""
        with self._changed:
            if who in self._order:
                self._order.remove(who)
            self._changed.notify_all()

    def nudge(self) -> None:
        """Somebody may not want to wait any more."""
        with self._changed:
            self._changed.notify_all()

    def before(self, who: Any) -> int:
        """How many are before somebody in line."""
        with self._changed:
            return self._order.index(who) if who in self._order else 0

    def __len__(self) -> int:
        return len(self._order)


@dataclass
class Models:
    """Pipelines and rewards, each loaded once, when it is first used; only in one's turn."""

    device: str | None = None
    dtype: str | None = None
    _pipes: dict[str, Any] = field(default_factory=dict)
    _judges: dict[str, Any] = field(default_factory=dict)

    def searcher(self, order: Order) -> Any:
        """A prepared searcher for what was ordered."""
        from ttsnap import generation, rewards
        from ttsnap.cli.generating import quiet_libraries

        quiet_libraries()
        if order.model not in self._pipes:
            self._pipes[order.model] = generation.load_model(order.model, self.device, self.dtype)
        pipe = self._pipes[order.model]
        for name in order.rewards:
            if name not in self._judges:
                self._judges |= rewards.load([name], generation.find_device(self.device))
        return generation.prepare(
            pipe,
            reward={name: self._judges[name] for name in order.rewards},
            budget=order.budget,
            candidates=order.candidates,
            policy=POLICIES[order.policy],
            prompt=order.prompt,
            num_steps=order.steps,
            height=order.size,
            width=order.size,
        )


@dataclass(frozen=True)
class Frame:
    """What the page shows at one moment."""

    board: str
    status: str


@dataclass(eq=False)
class Job(Story):
    """One ordered search: it runs in a thread of its own when its turn comes, and can be asked for more afterwards.

    Attributes:
        order: what was asked for.
        frames: what the page shows, one for every change of the board; none is dropped.
        phase: line, preparing, searching, picking, comparing or over.
        result: what it came to, once it is over.
        folder: where it is saved, once it is.
        trouble: what went wrong, in one sentence.
    """

    desk: Desk = field(kw_only=True)
    order: Order = field(kw_only=True)
    home: Path = field(kw_only=True)
    frames: list[Frame] = field(default_factory=list)
    phase: str = "line"
    result: SearchResult | None = None
    folder: Path | None = None
    trouble: str | None = None
    block: Block | None = None
    _busy: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)
    _answered: threading.Event = field(default_factory=threading.Event)
    _answer: BoolArray | None = None

    # What the page does with it.

    def search(self) -> None:
        """Begin, when the turn comes."""
        self._work("preparing", self._search)

    def compare(self) -> None:
        """See what best-of-N gets for the same cost."""
        self._work("comparing", self._compare)

    def finish(self, ticked: str) -> None:
        """Finish dropped candidates after all; seeds such as `3,5`."""
        mask = view.picked(ticked, [tile.seed for tile in self.tiles])
        self._work("searching", lambda: self._finish(mask))

    def answer(self, ticked: str) -> None:
        """Who goes on, while the search waits for it."""
        if self.phase != "picking":
            raise ValueError("there is nothing to pick at the moment")
        self._answer = view.picked(ticked, [tile.seed for tile in self.tiles])
        self._answered.set()

    def stop(self) -> None:
        """End at the next denoiser call; what is finished stays."""
        self._stop.set()
        self._answered.set()
        self.desk.line.nudge()

    @property
    def active(self) -> bool:
        """Whether it wants the device, or has it, or waits for picks."""
        return self._busy

    def status(self) -> str:
        """The line above the board at this moment."""
        if self.trouble:
            return view.error(self.trouble)
        if self.phase == "line":
            before = self.desk.line.before(self)
            if before:
                return view.status(f"Waiting in line: {before} before you" if before > 1 else "Waiting in line: next")
            return view.status("Starting")
        if self.phase == "preparing":
            return view.status("Loading and counting what a search costs")
        if self.phase == "comparing":
            return view.status("Running best-of-N for the same cost")
        if self.phase == "picking":
            return view.progress(self, "Your turn: tick who goes on")
        if self.phase == "searching":
            return view.progress(self, "Stopping" if self._stop.is_set() else view.doing(self))
        return view.progress(self, "Stopped" if self.result and self.result.stopped else "Done")

    # What runs in its thread.

    def _work(self, phase: str, work: Callable[[], None]) -> None:
        if self._busy:
            raise ValueError("this search is still at work")
        self.trouble, self.phase, self._busy = None, "line", True
        self._stop.clear()
        self.desk.line.join(self)
        self._show()
        threading.Thread(target=self._in_turn, args=(phase, work), daemon=True).start()

    def _in_turn(self, phase: str, work: Callable[[], None]) -> None:
        try:
            self.desk.line.wait(self, lambda: not self._stop.is_set())
            self.phase = phase
            self._show()
            work()
        except Stop:
            pass
        except Exception as error:
            self.trouble = sentence(error)
        finally:
            self.desk.line.leave(self)
            self.pause()
            self.over, self.phase = True, "over"
            self._show()
            self._busy = False  # last: whoever watches has seen everything then

    def _search(self) -> None:
        searcher = self.desk.models.searcher(self.order)
        self.desk.check_candidates(searcher.candidates)
        if self.order.by_hand:
            searcher = replace(searcher, policy=HandPicked(searcher.policy, self._pick))
        self.block = searcher.open([self.order.prompt], seed=self.order.seed)
        self.phase = "searching"
        self.block.run(self)
        self._save()

    def _compare(self) -> None:
        if self.block is None or self.block.result is None:
            raise ValueError("there is no search to compare with")
        self.block.compare(_Stoppable(self._stop))
        self._save()

    def _finish(self, mask: BoolArray) -> None:
        if self.block is None or self.block.result is None:
            raise ValueError("there is no search to go on with")
        self.block.finish(mask, self)
        self._save()

    def _save(self) -> None:
        assert self.block is not None
        self.result = self.block.results(top=3)[0]
        if self.folder is None:
            slug = re.sub(r"[^a-z0-9]+", "-", self.order.prompt.lower()).strip("-")[:40] or "image"
            self.folder = self.home / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug}-{secrets.token_hex(3)}"
        self.result.save(self.folder)

    def _pick(self, proposal: Proposal) -> BoolArray:
        """Put the look before the visitor; meanwhile others may have the device."""
        for tile, keep in zip(self.tiles, proposal.keep[0], strict=True):
            tile.proposed = bool(keep)
        self._answered.clear()
        self._check()
        self.pause()
        self.desk.line.leave(self)
        self.phase = "picking"
        self._show(ticks=True)
        self._answered.wait()
        self._check()
        self.phase = "line"
        self.desk.line.join(self)
        self.desk.line.wait(self, lambda: not self._stop.is_set())
        self.phase = "searching"
        self.tick()
        assert self._answer is not None
        return self._answer

    # The observer: as the story goes, and a frame for every change of the board.

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stop

    def _show(self, *, ticks: bool = False) -> None:
        late = self.phase == "over" and self.order.by_hand and self.block is not None and self.trouble is None
        self.frames.append(Frame(view.board(self, ticks=ticks or late), self.status()))

    def started(self, start: Start) -> None:
        """As the story, shown."""
        super().started(start)
        self._show()

    def asked(self, query: Query) -> None:
        """As the story, shown."""
        super().asked(query)
        self._show()
        self._check()

    def called(self, calls: int) -> None:
        """As the story; this is where a stop takes effect."""
        super().called(calls)
        self._check()

    def judged(self, step: int, rewards: FloatArray) -> None:
        """As the story, shown."""
        super().judged(step, rewards)
        self._show()
        self._check()

    def looked(self, look: Look, ledger: Ledger) -> None:
        """As the story, shown."""
        super().looked(look, ledger)
        self._show()
        self._check()

    def ended(self, result: Result) -> None:
        """As the story, shown."""
        super().ended(result)
        self._show()


class _Stoppable(Observer):
    """Tells nothing, and stops when it should."""

    def __init__(self, stop: threading.Event) -> None:
        self._event = stop

    def called(self, calls: int) -> None:
        if self._event.is_set():
            raise Stop


class Desk:
    """What is offered, and who has ordered what.

    Args:
        out: everything is written below this folder.
        models: names of models on offer; nothing else is ever loaded.
        rewards: names of rewards on offer (default: those of the models).
        device: where the models run.
        dtype: their dtype.
        limits: of what a visitor may ask for.
    """

    def __init__(
        self,
        out: Path,
        models: Sequence[str] = ("shapes",),
        rewards: Sequence[str] = (),
        device: str | None = None,
        dtype: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        from ttsnap.generation import DEFAULT_REWARDS, check_model
        from ttsnap.rewards import names_of

        for name in models:
            check_model(name)
        own = [DEFAULT_REWARDS[name] for name in models if name in DEFAULT_REWARDS]
        self.rewards = list(dict.fromkeys([*rewards, *own]))
        if not self.rewards:
            raise ValueError("name a reward with --reward; these models have none of their own")
        names_of(self.rewards)
        self.out, self.offered = Path(out).resolve(), list(models)
        self.out.mkdir(parents=True, exist_ok=True)
        self.models, self.limits, self.line = Models(device, dtype), limits or Limits(), Line()
        self._jobs: dict[str, dict[str, list[Job]]] = {}

    def home(self, visitor: str | None) -> Path:
        """The folder of a visitor; a name that is not one of ours is refused."""
        if not visitor or not re.fullmatch(r"[A-Za-z0-9_-]{22}", visitor):
            raise ValueError("this page does not know you; load it again")
        return self.out / "visitors" / visitor

    def welcome(self, visitor: str | None) -> str:
        """A visitor's name: the one he has, or a new one that nobody can guess."""
        try:
            self.home(visitor)
        except ValueError:
            return secrets.token_urlsafe(16)
        assert visitor
        return visitor

    def begin(self, session: str, tab: str, visitor: str | None, orders: Sequence[Order]) -> list[Job]:
        """Search for these, in line; a session has one search at a time, and each of its tabs remembers its last.

        Raises:
            ValueError: what is wrong with an order.
        """
        home = self.home(visitor)
        orders = [self.check(order) for order in orders]
        mine = self._jobs.setdefault(session, {})
        if any(job.active for jobs in mine.values() for job in jobs):
            raise ValueError("one search at a time: stop the one at work first")
        if len(self.line) + len(orders) > self.limits.waiting:
            raise ValueError(f"{len(self.line)} searches wait in line already; try again later")
        mine[tab] = [Job(desk=self, order=order, home=home) for order in orders]
        for job in mine[tab]:
            job.search()
        return mine[tab]

    def job(self, session: str, tab: str) -> Job:
        """A session's own search."""
        jobs = self._jobs.get(session, {}).get(tab)
        if not jobs:
            raise ValueError("there is no search yet")
        return jobs[0]

    def warm(self) -> None:
        """Load the first model on offer while nobody waits for it."""

        def load() -> None:
            who = object()
            self.line.join(who)
            self.line.wait(who, lambda: True)
            try:
                self.models.searcher(Order("a", self.offered[0], (self.rewards[0],), candidates=1))
            except Exception as error:  # whoever asks for it is told
                logger.warning("%s could not be loaded: %s", self.offered[0], error)
            finally:
                self.line.leave(who)

        threading.Thread(target=load, daemon=True).start()

    def stop(self, session: str) -> None:
        """Stop a session's searches."""
        for jobs in self._jobs.get(session, {}).values():
            for job in jobs:
                job.stop()

    def close(self, session: str) -> None:
        """The tab is closed: its searches stop and are forgotten; what was saved stays."""
        self.stop(session)
        self._jobs.pop(session, None)

    def check(self, order: Order) -> Order:
        """The order, tidied.

        Raises:
            ValueError: not on offer, or beyond the limits.
        """
        limits = self.limits
        prompt = " ".join(order.prompt.split())
        if not prompt:
            raise ValueError("the prompt is empty; it needs at least one word")
        if len(prompt) > limits.prompt:
            raise ValueError(f"the prompt has {len(prompt)} characters; at most {limits.prompt} are taken")
        if order.model not in self.offered:
            raise ValueError(f"there is no model {order.model!r} here; there is {', '.join(self.offered)}")
        if not order.rewards or set(order.rewards) - set(self.rewards):
            raise ValueError(f"choose one reward or more of {', '.join(self.rewards)}")
        if order.policy not in POLICIES:
            raise ValueError(f"there is no policy {order.policy!r} here; there is {', '.join(POLICIES)}")
        for name, value, most in (("size", order.size, limits.side), ("steps", order.steps, limits.steps)):
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be 1 to {most}, got {value}")
        if not 0 <= order.seed < 2**31:
            raise ValueError(f"the seed must be 0 to {2**31 - 1}, got {order.seed}")
        if order.candidates is not None:
            self.check_candidates(order.candidates)
        return replace(order, prompt=prompt)

    def check_candidates(self, count: int) -> None:
        """ValueError where these are too many, or none."""
        if not 1 <= count <= self.limits.candidates:
            raise ValueError(f"a search here starts 1 to {self.limits.candidates} candidates, this would be {count}")


def sentence(error: Exception) -> str:
    """One sentence for a visitor; what is not his doing goes to the log in full."""
    from ttsnap.cli import explain

    if isinstance(error, ValueError | OSError | MemoryError | ModuleNotFoundError):
        return explain(error)
    logger.error("a search failed", exc_info=error)
    return f"the search failed ({type(error).__name__}); the server's log says more"
