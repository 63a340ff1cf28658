"""What the verbs that can use many workers share: running a job, and the report of failures."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ttsnap.cli import verbosity
from ttsnap.cli.options import Workers
from ttsnap.cli.progress import Board, say
from ttsnap.cluster.scheduling import Outcome, execute
from ttsnap.files.locks import locked
from ttsnap.files.storage import AnyPath, Remote, write_json

if TYPE_CHECKING:
    from ttsnap.cluster.jobs import Job

PARTLY = 3  # exit code: all is done but for the prompts that failed
SHOWN = 10  # failures and notes of a kind


def quietly(load: Callable[..., Any], *given: Any) -> Any:
    """Load a model without what diffusers and transformers have to say about it; also in a worker."""
    from ttsnap.pipelines.loading import quiet_libraries

    with warnings.catch_warnings():
        if verbosity.level < 1:
            warnings.simplefilter("ignore")
            quiet_libraries()
        return load(*given)


def run(job: Job, workers: Workers, out: AnyPath, show: Board) -> Outcome:
    """Run a job; Ctrl-C, a full disk and a second process on the same output are one sentence each."""
    try:
        with locked(out, say) as show.check, quiet_stdout(workers), show:
            pool = workers.pool()
            with interruptible():  # Ray has put a handler of its own in place of that of `main`
                return execute(job, pool, show)
    except KeyboardInterrupt:
        print(f"stopped: the same command goes on from there ({out})", file=sys.stderr)
        raise SystemExit(130) from None


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
def quiet_stdout(workers: Workers) -> Iterator[None]:
    """Stdout is for results: what a reward prints goes to stderr, and what Ray has to say of deaths nowhere."""
    with contextlib.redirect_stdout(sys.stderr if workers.alone else io.StringIO()):
        yield


def failures_file(out: AnyPath, inside: bool) -> AnyPath:
    """Where failures are reported: in a folder of results, or beside a recording."""
    return out / "failures.json" if inside else out.with_name(f"{out.name}.failures.json")


def report_failures(outcome: Outcome, place: AnyPath, text: Callable[[int], str]) -> list[dict[str, Any]]:
    """Write and show what failed, by prompt; an older report goes if nothing did.

    Raises:
        ValueError: nothing at all came of the run.
    """
    for note in list(outcome.notes)[:SHOWN]:
        say(f"warning: {note}")
    if len(outcome.notes) > SHOWN:
        say(f"warning: {len(outcome.notes) - SHOWN} more like these")
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
