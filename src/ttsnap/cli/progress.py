"""What is shown on stderr while a verb works: a search, a job on many workers, images by the second."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from ttsnap.cli import verbosity
from ttsnap.cluster.scheduling import Observer as WorkObserver
from ttsnap.core.observers import Observer

if TYPE_CHECKING:
    from rich.console import Console

    from ttsnap.cluster.jobs import Event, Plan
    from ttsnap.cluster.scheduling import Outcome
    from ttsnap.core.cost import Ledger
    from ttsnap.core.observers import Look, Result, Start
    from ttsnap.files.locks import Check


def console(silent: bool = False) -> Console:
    """Stderr, where it is shown what goes on."""
    from rich.console import Console

    return Console(stderr=True, quiet=silent or verbosity.level < 0)


def say(sentence: str) -> None:
    """Tell people something."""
    if verbosity.level >= 0:
        print(sentence, file=sys.stderr, flush=True)


class Display(Observer):
    """Live progress on stderr: per look how many are alive, the best reward so far, cost and time left."""

    def __init__(self, *, silent: bool) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self.console = console(silent)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f} % of the calls"),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
            disable=self.console.quiet,
        )
        self.task = self.progress.add_task("starting", total=None, left="")
        self.progress.start()

    def status(self, text: str) -> None:
        """Say what goes on."""
        self.progress.update(self.task, description=text)

    def started(self, start: Start) -> None:
        """The search starts."""
        from rich.markup import escape

        from ttsnap import policies

        self.model, self.steps = start.cost_model, start.problem.num_steps
        self.block_start = time.perf_counter()
        self.planned = start.cost_model.of_plan(start.plan)
        name = policies.to_dict(start.policy)["policy"]
        what = escape(f"“{start.prompts[0]}”")
        budget = f", budget {start.budget}" if start.budget else ""
        candidates = start.problem.num_candidates
        self.console.print(f"{what}: {candidates} candidates, {name}{budget}, reward {', '.join(start.rewards)}")
        self.progress.update(self.task, description="searching", total=self.planned.nfe, completed=0, left="")

    def called(self, calls: int) -> None:
        """The bar moves with every batch of denoiser calls."""
        self.progress.advance(self.task, calls)

    def looked(self, look: Look, ledger: Ledger) -> None:
        """One rung is done."""
        import numpy as np

        from ttsnap.core.cost import format_amount

        spent = ledger.cost(self.model)
        seconds = time.perf_counter() - self.block_start
        left = seconds * max(0, self.planned.nfe - spent.nfe) / max(1, spent.nfe)
        best = float(np.nanmean(np.nanmax(look.combined, axis=1)))
        alive = look.alive.sum(1).mean()
        kind = "drafts" if look.draft else "finished" if look.step == self.steps else "alive"
        cost = f"{format_amount(spent.tflop, 'TFLOP')} of {format_amount(self.planned.tflop, 'TFLOP')}"
        self.console.print(
            f"  step {look.step:>3}/{self.steps} {alive:>5.4g} {kind:<8} best {best:7.3f}  "
            f"spent {cost}, {seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )
        self.progress.update(self.task, completed=spent.nfe, left=f"{left:.0f} s left")

    def ended(self, result: Result) -> None:
        """What follows, if anything, is the comparison."""
        self.progress.update(self.task, description="finishing", total=None, left="")

    def close(self) -> None:
        """Stop the live part."""
        self.progress.stop()


class Images:
    """How many images are done, and how fast.

    Attributes:
        images: done by this command.
        found: those that were there already; they do not count in the rate.
    """

    def __init__(self) -> None:
        self.images = self.found = 0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the work was known."""
        return time.perf_counter() - self._started

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / max(self.seconds, 1e-9)

    def report(self) -> dict[str, Any]:
        """For the JSON object."""
        return {"images": self.images, "images_found": self.found, "seconds": self.seconds}

    def summary(self) -> str:
        """For people: `640 images in 2.1 s, 305 per second`."""
        found = f", {self.found} were there already" if self.found else ""
        return f"{self.images} images in {duration(self.seconds)}, {self.rate:.3g} per second{found}"


class Board(Images, WorkObserver):
    """One progress bar for all workers, on stderr: images or prompts, how many per second, time left, who does what.

    Attributes:
        check: raises if the run must not go on; see `ttsnap.files.locks`.
    """

    check: Check

    def __init__(self, what: str, unit: str, *, silent: bool, workers: bool) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        super().__init__()
        self.what, self.unit, self.workers = what, unit, workers
        shown = console(silent)
        self.quiet = shown.quiet
        self.check = lambda: None
        self.total = 0
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
        self._live = Live(self._bar, console=shown, transient=True, refresh_per_second=4)

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
        counts = {"images": outcome.images, "prompts" if self.unit == "images" else self.unit: prompts}
        done = counts[self.unit] + (outcome.found if self.unit == "images" else 0)
        rate = counts[self.unit] / seconds
        left = duration((self.total - done) / rate) if rate else "?"
        (other,) = counts.keys() - {self.unit}
        best = f", mean reward {sum(outcome.rewards) / len(outcome.rewards):.3f}" if outcome.rewards else ""
        more = f" ({counts[other] / seconds:.3g} {other})" if counts[other] else ""
        text = f", {rate:.3g} per second{more}, {left} left{best}"
        self._bar.update(self._task, completed=done, rate=text)

    def tick(self) -> None:
        """Show what the workers do."""
        from rich.text import Text

        self.check()
        if self.workers and not self.quiet:
            now = time.perf_counter()
            lines = [f"  worker {w}: {what}, {now - since:.0f} s" for w, (what, since) in sorted(self._states.items())]
            self._live.update(self._group(self._bar, *(Text(line) for line in lines[:16])))


class ImageProgress(Images):
    """Images done, images per second and time left, on stderr; usable as a context."""

    def __init__(self, what: str, *, silent: bool, unit: str = "images") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        super().__init__()
        shown = console(silent)
        self.what, self.total = what, 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn(unit + "{task.fields[rate]}"),
            console=shown,
            transient=True,
            disable=shown.quiet,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("loading the model", total=None, rate="")

    def __enter__(self) -> ImageProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def start(self, total: int) -> None:
        """So many images are to be done."""
        self.total, self._started = total, time.perf_counter()
        self._bar.update(self._task, total=total, description=self.what)

    def advance(self, images: int) -> None:
        """So many more are done."""
        self.images += images
        left = (self.total - self.images) / max(self.rate, 1e-9)
        self._bar.update(self._task, advance=images, rate=f", {self.rate:.3g} per second, {duration(left)} left")


def duration(seconds: float) -> str:
    """`2.1 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
