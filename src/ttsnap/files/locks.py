"""Keeps a second process from writing to an output.

Locally the lock is the system's own, on a file beside the output: it is free as soon as its owner is gone. An object
store has no locks. There, owners are numbered: `.NAME.lock/00000001`, `...2` and so on. Who creates the next number,
which the store lets only one do (a conditional put), owns the output, until it writes there that it has ended. While
it works it writes there that it does, every HEARTBEAT seconds. An owner that is silent for SILENCES heartbeats is taken
to be dead, by the watch of the one who waits, so that no clock matters.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttsnap.files.storage import AnyPath, Remote

HEARTBEAT = 10.0  # seconds; TTSNAP_HEARTBEAT overrides it
LONGEST = 60.0  # seconds
SILENCES = 6  # heartbeats

Tell = Callable[[str], None]
Check = Callable[[], None]


@contextlib.contextmanager
def locked(out: AnyPath, tell: Tell | None = None) -> Iterator[Check]:
    """Keep a second process from writing to the same output.

    Args:
        out: the output, a file or a folder.
        tell: is given a sentence where the lock must be waited for, and a warning where it cannot be relied on.

    Yields:
        A function that raises ValueError if the lock was lost; a lock of the system cannot be.

    Raises:
        ValueError: another process has it; says which.
    """
    with _in_store(out, tell or _silent) if isinstance(out, Remote) else _local(out) as check:
        yield check


def _silent(sentence: str) -> None:
    """Is told things in vain."""


@contextlib.contextmanager
def _local(out: Path) -> Iterator[Check]:
    import fcntl

    path = out.absolute().parent / f".{out.name or 'out'}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                owner = json.loads(os.pread(file, 1000, 0))
            except ValueError:
                owner = None
            os.close(file)
            raise _in_use(out, owner) from None
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file).st_ino == path.stat().st_ino:
                break
        os.close(file)  # its owner has just ended and removed it
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(_me()).encode(), 0)
        yield lambda: None
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


@contextlib.contextmanager
def _in_store(out: Remote, tell: Tell) -> Iterator[Check]:
    lock = StoreLock(out, tell)
    lock.acquire()
    beating = threading.Thread(target=lock.beat, name="heartbeat", daemon=True)
    beating.start()
    try:
        yield lock.check
    finally:
        lock.over.set()
        beating.join()
        lock.release()


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _who(owner: Any) -> str:
    try:
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (KeyError, TypeError):
        return "another process"


def _in_use(out: AnyPath, owner: Any) -> ValueError:
    return ValueError(f"{out} is being written by {_who(owner)}; wait for it, or give another --out")


def _heartbeat() -> float:
    given = os.environ.get("TTSNAP_HEARTBEAT", str(HEARTBEAT))
    try:
        return _checked(float(given))
    except ValueError:
        raise ValueError(f"TTSNAP_HEARTBEAT is above 0 and at most {LONGEST:.0f} seconds, got {given!r}") from None


def _checked(heartbeat: Any) -> float:
    if not isinstance(heartbeat, int | float) or not 0 < heartbeat <= LONGEST:
        raise ValueError
    return float(heartbeat)


@dataclass
class StoreLock:
    """The lock of an output in an object store.

    Attributes:
        out: the output.
        tell: see `locked`.
        heartbeat: seconds between signs of life.
        over: set when the owner ends.
    """

    out: Remote
    tell: Tell
    heartbeat: float = field(default_factory=_heartbeat)
    over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._me = {"run": uuid.uuid4().hex, **_me(), "heartbeat": self.heartbeat}
        self._number = 0
        self._lost: Any = None

    @property
    def folder(self) -> Remote:
        """Where the owners write; beside the output, or inside if that is a whole bucket."""
        bucket = "/" not in self.out.url.partition("://")[2]
        return self.out / ".lock" if bucket else self.out.with_name(f".{self.out.name}.lock")

    def acquire(self) -> None:
        """Become the owner, if need be after the last one was silent for too long.

        Raises:
            ValueError: the owner is alive.
        """
        first, silent, before = None, 0.0, time.monotonic()
        pause = min(0.5, self.heartbeat / 4)
        while True:
            number, owner = self._last()
            now = time.monotonic()
            silent += min(now - before, 2 * pause)  # while the store was away, no owner could be heard
            before = now
            patience = SILENCES * owner.get("heartbeat", HEARTBEAT)
            if not number or owner.get("ended") or (owner == first and silent > patience):
                if self._take(number + 1):
                    return
                first = None
            elif first is None or owner.get("run") != first.get("run"):
                first, silent = owner, 0.0
                self.tell(f"{self.out} was begun by {_who(owner)}: waiting up to {patience:.0f} s for a sign of life")
            elif owner != first:
                raise _in_use(self.out, owner)
            time.sleep(pause)

    def _last(self) -> tuple[int, dict[str, Any]]:
        """The highest number, and what its owner wrote; 0 if there is none."""
        while True:
            try:
                number = max((int(place.name) for place in self.folder.iterdir() if place.name.isdigit()), default=0)
            except FileNotFoundError:
                return 0, {}
            try:
                owner = dict(json.loads(self._place(number).read_bytes())) if number else {}
                return number, owner | {"heartbeat": _checked(owner.get("heartbeat", HEARTBEAT))}
            except FileNotFoundError:  # removed by the next owner
                continue
            except (ValueError, TypeError):
                return number, {}

    def _place(self, number: int) -> Remote:
        return self.folder / f"{number:08d}"

    def _take(self, number: int) -> bool:
        place = self._place(number)
        if not place.create(self._note()):
            return False
        if place.create(self._note(again=True)):  # what is there already was put once more
            self.tell(
                f"warning: {self.out} lies in a store without conditional puts: two processes that start on it at the "
                "same moment are not kept apart"
            )
        self._number = number
        for older in list(self.folder.iterdir()):
            if older.name.isdigit() and int(older.name) < number:
                older.unlink(missing_ok=True)
        return True

    def _note(self, **more: Any) -> bytes:
        return json.dumps({**self._me, "alive": _now(), **more}).encode()

    def beat(self) -> None:
        """Write that the owner is alive, until it ends or another process has the lock."""
        beats = 0
        while not self.over.wait(self.heartbeat):
            with contextlib.suppress(OSError):  # a store that fails ends the run elsewhere, or is back soon
                number, owner = self._last()
                if number > self._number:
                    self._lost = owner
                    return
                beats += 1
                self._place(self._number).write_bytes(self._note(beats=beats))

    def check(self) -> None:
        """Raise ValueError if another process has the lock now."""
        if self._lost is not None:
            raise ValueError(
                f"{self.out} was taken over by {_who(self._lost)}, as this process gave no sign of life for "
                f"{SILENCES * self.heartbeat:.0f} s; what it stored is whole"
            )

    def release(self) -> None:
        """Write that the owner has ended."""
        if self._lost is None:
            with contextlib.suppress(OSError):
                self._place(self._number).write_bytes(self._note(ended=True))
