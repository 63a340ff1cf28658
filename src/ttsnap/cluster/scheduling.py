"""The loop that hands out blocks of prompts, and makes sure that nothing is lost and no dead worker is waited for.

A worker gets a block when it has finished the last one, so that nothing piles up. A block whose worker dies goes to the
end of the queue. A block that fails, or kills its workers again and again, is taken apart: its prompts are tried one by
one, so that only the one at fault is lost. Results are stored by the workers; this loop only counts.
"""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ttsnap.cluster.jobs import Block, Event, Job, Plan, StopRunError, Work, first_line

DEATHS = 5  # of workers over the same block, after which it is taken apart, and a prompt given up
LOADS = 3  # attempts to load a worker


class Message(NamedTuple):
    """What a worker has to say: an `event` of its block, that the block has `ended`, `failed` (`what` is the
    exception), or that the worker is `ready` or has `died` (`what` is a sentence)."""

    worker: int
    kind: str
    what: Any = None


class Pool(Protocol):
    """Workers that hold a job loaded."""

    @property
    def size(self) -> int:
        """Number of workers."""
        ...

    def start(self, job: Job) -> Plan:
        """Load the workers, and let the first that is ready plan."""
        ...

    def submit(self, worker: int, block: Block, plan: Plan) -> None:
        """Give an idle worker a block."""
        ...

    def idle(self) -> list[int]:
        """Workers that are ready and have nothing to do."""
        ...

    def wait(self, seconds: float) -> Message | None:
        """The next message; None if there is none for so long."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        plan: what was to be done.
        failures: prompt -> why it has no result.
        stored: prompts whose results were stored by this run.
        images: images made or judged by it.
        found: images that were there already.
        deaths: workers that died.
        notes: warnings, each once.
        bad: images that cannot be used: path and fault.
        rewards: of the images chosen by this run.
    """

    plan: Plan
    failures: dict[int, str] = field(default_factory=dict)
    stored: set[int] = field(default_factory=set)
    images: int = 0
    found: int = 0
    deaths: int = 0
    notes: dict[str, None] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


class Observer:
    """Sees what goes on; the methods do nothing here."""

    def planned(self, plan: Plan) -> None:
        """The work is known."""

    def state(self, worker: int, what: str) -> None:
        """A worker does something else now."""

    def event(self, worker: int, event: Event, outcome: Outcome) -> None:
        """A part of a block is done."""

    def tick(self) -> None:
        """Some time has passed."""


def execute(job: Job, pool: Pool, observer: Observer | None = None) -> Outcome:
    """Run a job to its end on the workers of a pool.

    Raises:
        ValueError: the job is wrong, such as an unknown model; said by the first worker.
        OSError: results cannot be stored, such as on a full disk. Whatever is stored is whole.
    """
    observer = observer or Observer()
    try:
        plan = pool.start(job)
        observer.planned(plan)
        return _Run(plan, pool, observer).run()
    finally:
        pool.close()


class _Run:
    def __init__(self, plan: Plan, pool: Pool, observer: Observer) -> None:
        self.pool, self.observer, self.outcome = pool, observer, Outcome(plan)
        self.todo = deque(plan.blocks)
        self.under_way: dict[int, Block] = {}
        self.deaths: Counter[Block] = Counter()

    def run(self) -> Outcome:
        while self.todo or self.under_way:
            for worker in self.pool.idle():
                if self.todo:
                    block = self.under_way[worker] = self.todo.popleft()
                    self.pool.submit(worker, block, self.outcome.plan)
                    self.observer.state(worker, _name(block))
            message = self.pool.wait(0.5)
            self.observer.tick()
            if message:
                self._hear(message)
        return self.outcome

    def _hear(self, message: Message) -> None:
        worker, kind, what = message
        if kind == "event":
            self._count(worker, what)
            return
        block = self.under_way.pop(worker, None)
        self.observer.state(worker, {"died": "died; another starts", "ready": "ready"}.get(kind, "waits"))
        if kind == "died":
            self.outcome.deaths += 1
        if block is None or kind == "ended":
            return
        if kind == "failed":
            if isinstance(what, OSError | StopRunError):
                raise what  # an OSError: results cannot be stored, which would be no better elsewhere
            self._apart(block, first_line(what))
        elif kind == "died":
            self.deaths[block] += 1
            if self.deaths[block] >= DEATHS:
                self._apart(block, f"its worker died {self.deaths[block]} times ({what})")
            else:
                self.todo.append(block)

    def _apart(self, block: Block, why: str) -> None:
        """One prompt at a time; a prompt that is alone already has failed."""
        left = [p for p in block if p not in self.outcome.stored and p not in self.outcome.failures]
        if len(block) == 1:
            self._count(-1, Event(failures=dict.fromkeys(left, why)))
        else:
            self.todo.extend((p,) for p in left)

    def _count(self, worker: int, event: Event) -> None:
        outcome = self.outcome
        outcome.images += event.images
        outcome.found += event.found
        outcome.stored.update(event.prompts)
        outcome.failures.update(event.failures)
        outcome.notes |= dict.fromkeys(event.notes)
        outcome.bad += event.bad
        outcome.rewards += event.rewards
        self.observer.event(worker, event, outcome)


def _name(block: Block) -> str:
    return f"prompt {block[0]}" if len(block) == 1 else f"prompts {block[0]} to {block[-1]}"


class ThisProcess:
    """A pool of one worker: this process."""

    size = 1

    def __init__(self) -> None:
        self._work: Work | None = None
        self._events: Iterator[Event] | None = None

    def start(self, job: Job) -> Plan:
        """Load and plan."""
        self._work = job.load()
        return self._work.plan()

    def submit(self, worker: int, block: Block, plan: Plan) -> None:
        """Begin a block."""
        assert self._work is not None
        self._events = self._work.run(block, plan.shared)

    def idle(self) -> list[int]:
        """This process, if it has no block."""
        return [0] if self._events is None else []

    def wait(self, seconds: float) -> Message | None:
        """Work until there is something to say."""
        assert self._events is not None
        try:
            with heard() as notes:
                event = next(self._events)
            return Message(0, "event", event._replace(notes=(*event.notes, *notes)))
        except StopIteration:
            self._events = None
            return Message(0, "ended")
        except Exception as error:
            self._events = None
            return Message(0, "failed", error)

    def close(self) -> None:
        """Nothing to end."""


class heard:
    """Collects what is warned about inside."""

    def __enter__(self) -> list[str]:
        self._catch = warnings.catch_warnings(record=True)
        self._caught = self._catch.__enter__()
        warnings.simplefilter("always")
        self._notes: list[str] = []
        return self._notes

    def __exit__(self, *error: Any) -> None:
        self._catch.__exit__(*error)
        for warning in self._caught or ():
            if issubclass(warning.category, UserWarning):
                self._notes.append(str(warning.message))
