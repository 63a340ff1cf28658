"""What the verbs that can use many workers share: the workers, one progress bar for all, and the report of failures."""

from __future__ import annotations

import contextlib
import errno
import io
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from ttsnap.cli.progress import duration
from ttsnap.cluster.scheduling import Observer, Outcome, Pool, ThisProcess, execute
from ttsnap.locks import Check, locked
from ttsnap.results import write_json
from ttsnap.storage import AnyPath, Remote

if TYPE_CHECKING:
    from ttsnap.cluster.jobs import Event, Job, Plan

PARTLY = 3  # exit code: all is done but for the prompts that failed
SHOWN = 10  # failures and notes of a kind


@dataclass(frozen=True)
class Scale:
    """How many workers, and where; one without an address is this process."""

    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")

    @property
    def alone(self) -> bool:
        """Whether this process does everything."""
        return self.address is None and self.workers in (None, 1)

    def check_device(self, device: str | None) -> None:
        """With several workers each takes the accelerator that Ray gives it."""
        if not self.alone and device not in (None, "cpu", "cuda", "mps"):
            raise ValueError(
                f"with --workers each worker has a GPU of its own; --device is cpu or cuda, got {device!r}"
            )

    def pool(self) -> Pool:
        """The workers."""
        if self.alone:
            return ThisProcess()
        from ttsnap.cluster.ray_pool import RayPool

        return RayPool(self.workers, self.address)


def run(job: Job, scale: Scale, out: AnyPath, show: Board) -> Outcome:
    """Run a job; Ctrl-C, a full disk and a second process on the same output are one sentence each."""
    try:
        with interruptible(), locked(out, say) as show.check, quiet_stdout(scale), show:
            pool = scale.pool()
            with interruptible():  # Ray has put a handler of its own in place
                return execute(job, pool, show)
    except KeyboardInterrupt:
        print(f"stopped: the same command goes on from there ({out})", file=sys.stderr)
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno, "the disk is full; all that is stored is whole, and the same command goes on from it"
            ) from error
        raise


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Take SIGTERM, as schedulers send it before they kill, for Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def quiet_stdout(scale: Scale) -> Iterator[None]:
    """Stdout is for results: what a reward prints goes to stderr, and what Ray has to say of deaths nowhere."""
    with contextlib.redirect_stdout(sys.stderr if scale.alone else io.StringIO()):
        yield


def say(sentence: str) -> None:
    """Tell people something."""
    print(sentence, file=sys.stderr, flush=True)


def failures_file(out: AnyPath, inside: bool) -> AnyPath:
    """Where failures are reported: in a folder of results, or beside a recording."""
    return out / "failures.json" if inside else out.with_name(f"{out.name}.failures.json")


def report_failures(outcome: Outcome, place: AnyPath, text: Callable[[int], str]) -> list[dict[str, Any]]:
    """Write and show what failed, by prompt; an older report goes if nothing did.

    Raises:
        ValueError: nothing at all came of the run.
    """
    for note in list(outcome.notes)[:SHOWN]:
        print(f"warning: {note}", file=sys.stderr)
    if len(outcome.notes) > SHOWN:
        print(f"warning: {len(outcome.notes) - SHOWN} more like these", file=sys.stderr)
    failures = [{"prompt": p, "text": text(p), "error": outcome.failures[p]} for p in sorted(outcome.failures)]
    if not failures:
        if isinstance(place, Remote) or place.exists():
            place.unlink(missing_ok=True)
        return []
    write_json({"failures": failures}, place)
    if len(failures) == outcome.plan.prompts == len(set(outcome.failures) | outcome.stored):
        raise ValueError(str(failures[0]["error"]))
    for failure in failures[:SHOWN]:
        print(f"warning: prompt {failure['prompt']} ({failure['text']!r}) failed: {failure['error']}", file=sys.stderr)
    print(f"warning: {len(failures)} prompts failed, see {place}; the same command tries them again", file=sys.stderr)
    return failures


class Board(Observer):
    """One progress bar for all workers, on stderr: images or prompts, how many per second, time left, who does what.

    Attributes:
        check: raises if the run must not go on; see `ttsnap.locks`.
    """

    check: Check

    def __init__(self, what: str, unit: str, *, quiet: bool, workers: bool) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.what, self.unit, self.quiet, self.workers = what, unit, quiet, workers
        self.check = lambda: None
        self.images = self.found = self.total = 0
        self._started = time.perf_counter()
        self._states: dict[int, tuple[str, float]] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn(unit + "{task.fields[rate]}"),
            TimeElapsedColumn(),
        )
        self._task = self._bar.add_task("loading the model", total=None, rate="")
        self._group = Group
        self._live = Live(self._bar, console=Console(stderr=True, quiet=quiet), transient=True, refresh_per_second=4)

    def __enter__(self) -> Board:
        if not self.quiet:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.quiet:
            self._live.stop()

    def planned(self, plan: Plan) -> None:
        """So much is to be done."""
        self._started = time.perf_counter()
        self.total = plan.images if self.unit == "images" else plan.prompts
        self._bar.update(self._task, total=self.total, description=self.what)

    def state(self, worker: int, what: str) -> None:
        """A worker does something else now."""
        self._states[worker] = what, time.perf_counter()
        self.tick()

    def event(self, worker: int, event: Event, outcome: Outcome) -> None:
        """More is done."""
        self.images, self.found = outcome.images, outcome.found
        prompts, seconds = len(outcome.stored) + len(outcome.failures), max(self.seconds, 1e-9)
        counts = {"images": outcome.images, "prompts": prompts}
        done = counts[self.unit] + (outcome.found if self.unit == "images" else 0)
        rate = counts[self.unit] / seconds
        left = duration((self.total - done) / rate) if rate else "?"
        other = "prompts" if self.unit == "images" else "images"
        best = f", mean reward {sum(outcome.rewards) / len(outcome.rewards):.3f}" if outcome.rewards else ""
        text = f", {rate:.3g} per second ({counts[other] / seconds:.3g} {other}), {left} left{best}"
        self._bar.update(self._task, completed=done, rate=text)

    def tick(self) -> None:
        """Show what the workers do."""
        from rich.text import Text

        self.check()
        if self.workers and not self.quiet:
            now = time.perf_counter()
            lines = [f"  worker {w}: {what}, {now - since:.0f} s" for w, (what, since) in sorted(self._states.items())]
            self._live.update(self._group(self._bar, *(Text(line) for line in lines[:16])))

    @property
    def seconds(self) -> float:
        """Since the work was known."""
        return time.perf_counter() - self._started

    def report(self) -> dict[str, Any]:
        """For the JSON object."""
        return {"images": self.images, "images_found": self.found, "seconds": self.seconds}

    def summary(self) -> str:
        """For people: `640 images in 2.1 s, 305 per second`."""
        found = f", {self.found} were there already" if self.found else ""
        rate = self.images / max(self.seconds, 1e-9)
        return f"{self.images} images in {duration(self.seconds)}, {rate:.3g} per second{found}"


__all__: Sequence[str] = ["Board", "Scale", "failures_file", "report_failures", "run"]
