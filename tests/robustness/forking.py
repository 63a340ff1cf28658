"""Processes that run a verb, begun by forking one that has loaded everything: in hundredths of a second, not in tens.

Each is the leader of a session of its own, has a folder for temporary files of its own, and a mark in its environment,
so that whatever it leaves behind is found.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LONGEST = 300.0  # seconds that a run may take


@dataclass
class Run:
    """A process that runs something, and what it left.

    Attributes:
        work: what it does.
        folder: receives what it prints, and its temporary files.
        before: is called in it first.
    """

    work: Callable[[], Any]
    folder: Path
    before: Callable[[], None] | None = None
    pid: int = 0
    code: int | None = None
    begun: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.tmp = Path(tempfile.mkdtemp(prefix="tf-", dir="/tmp"))  # sockets have names of at most 107 characters
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._child()

    def _child(self) -> None:
        """Run, and end without what the parent has still to do."""
        code = 1
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            for stream, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ |= {"TMPDIR": str(self.tmp), "TTSNAP_RUN": str(self.folder), "COLUMNS": "200"}
            tempfile.tempdir = None
            atexit._clear()
            if self.before:
                self.before()
            self.work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                atexit._run_exitfuncs()
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code, self.seconds = os.waitstatus_to_exitcode(status), time.monotonic() - self.begun
        return self.code is not None

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal, if it still runs."""
        if not self.poll():
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, longest: float = LONGEST) -> Iterator[None]:
        """Until it has ended; one that does not end is killed, and told of."""
        while not self.poll():
            if time.monotonic() - self.begun > longest:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"did not end within {longest:.0f} s: {self.said(2)[-300:]}")
            yield

    def at(self, moment: float) -> Iterator[None]:
        """Until so many seconds after it has begun, or it has ended."""
        while not self.poll() and time.monotonic() - self.begun < moment:
            yield

    def said(self, stream: int) -> str:
        """What it printed."""
        path = self.folder / ("stdout", "stderr")[stream - 1]
        return path.read_text(errors="replace") if path.exists() else ""  # it was killed before it began

    @property
    def errors(self) -> list[str]:
        """Its sentences about what was wrong."""
        return [line for line in self.said(2).splitlines() if line.startswith("error:")]

    def gone(self, patience: float = 6.0) -> Iterator[None]:
        """Until no process that it began is left; AssertionError where some stay."""
        deadline = time.monotonic() + patience
        while left := self._left():
            if time.monotonic() > deadline:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"left processes behind: {left}")
            yield

    def _left(self) -> list[int]:
        mark, found = f"TTSNAP_RUN={self.folder}\0".encode(), []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                stat = Path("/proc", name, "stat").read_text().rsplit(")", 1)[1].split()
                if stat[0] in "ZX" or int(name) == self.pid:
                    continue
                if int(stat[3]) == self.pid or mark in Path("/proc", name, "environ").read_bytes() + b"\0":
                    found.append(int(name))
            except (OSError, IndexError):
                continue
        return found

    def temporary(self) -> list[str]:
        """Files that it left in its folder for temporary ones, which is removed."""
        found = [str(path.relative_to(self.tmp)) for path in self.tmp.rglob("*") if path.is_file()]
        shutil.rmtree(self.tmp, ignore_errors=True)
        return [path for path in found if not path.startswith("ray/")]  # Ray keeps its logs


def verb(arguments: Sequence[object]) -> Callable[[], None]:
    """What runs a verb of the command line."""

    def work() -> None:
        from ttsnap import cli

        sys.argv = ["ttsnap", *map(str, arguments)]
        cli.main()

    return work


def alone() -> None:
    """AssertionError where this process has threads, which a fork would lose with the locks that they hold."""
    native = len(os.listdir("/proc/self/task"))
    if native > 1:
        print(f"note: {native - 1} threads are not in the forks", file=sys.stderr)


def together(work: Iterator[Iterator[None]], most: int = 2) -> None:
    """Run generators that wait by yielding, so many at a time."""
    running: list[Iterator[None]] = []
    while True:
        while len(running) < most and (new := next(work, None)) is not None:
            running.append(new)
        if not running:
            return
        for one in list(running):
            if next(one, running) is running:
                running.remove(one)
        time.sleep(0.005)
