# ruff: noqa: E501  (one command, one line)
"""The fault campaign: kills, full disks, hanging rewards and hostile files for every verb, and what came of them.

    python -m tests.robustness.faults [--seed 0] [--only generate/kill] [--minutes 90] [--log out/faults.jsonl]

Every fault falls at a random moment of a run; then the same command runs undisturbed, and must come to the same bytes
as a run that nobody disturbed, without a traceback, a process or a temporary file left behind. Results go to the log, a
line each; the same command goes on with what is missing there, and in the end writes the table in docs/robustness.md.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.robustness import hostile
from tests.robustness.forking import Run, alone, together, verb

ROOT = Path(__file__).parents[2]
COUNTS = {  # faults of each kind for every verb that it concerns
    "kill": 20,
    "term": 10,
    "stop": 10,
    "disk": 4,
    "vanish": 4,
    "two": 3,
    "clock": 3,
    "memory": 3,
    "hang": 4,
    "worker": 3,
}
SAID = {
    "kill": "`kill -9`",
    "term": "SIGTERM",
    "stop": "SIGSTOP, later SIGCONT",
    "disk": "the disk is full",
    "vanish": "the output folder vanishes",
    "two": "a second process on the same output",
    "clock": "the clock jumps by a day or an hour",
    "memory": "memory runs out",
    "hang": "a reward hangs",
    "worker": "a worker is killed (`--workers 2`)",
}
ENDS = (0, 2, 3, 130)  # exit codes that a disturbed run may have
TIMED = (
    "versions",
    "seconds",
    "per_second",
    "rate",
    "images_per_second",
)  # in records: what a clock says, and the commit

PROMPTS = ("a red circle", "a blue square left of a green triangle", "a cyan circle above a red square")


@dataclass(frozen=True)
class Verb:
    """A verb of the command line as the campaign runs it.

    Attributes:
        name: as the table has it.
        arguments: given the folder of the inputs and that of the outputs.
        writes: whether it has an output; else it is compared by what it prints.
        kinds: of faults, beside those that any process can meet.
        locks: whether a second process on its output is kept out; else both end, and the output is whole.
        once: an output that is complete is refused.
    """

    name: str
    arguments: Callable[[Path, Path], list[object]]
    writes: bool = True
    kinds: tuple[str, ...] = ()
    locks: bool = True
    once: bool = False


WRITING = ("disk", "vanish", "two", "clock", "memory")
JUDGING = (*WRITING, "hang")
SEARCH = ("--candidates", 4, "--steps", 6, "--rungs", "2", "--keep", ".5")


def verbs() -> list[Verb]:
    """All verbs that do some work; the servers are apart."""
    return [
        Verb("generate", lambda f, o: ["generate", PROMPTS[0], *SEARCH, *reward(f), "--out", o / "g"], kinds=JUDGING),
        Verb(
            "generate, many prompts",
            lambda f, o: ["generate", "--prompts", f / "p.txt", *SEARCH, *reward(f), "--no-board", "--out", o / "g"],
            kinds=(*JUDGING, "worker"),
        ),
        Verb(
            "record",
            lambda f, o: ["record", *PROMPTS, "--per-prompt", 3, "--steps", 6, "--calls", "2,4,6", "--out", o / "tree"],
            kinds=(*WRITING, "worker"),
        ),
        Verb(
            "record --reward",
            lambda f, o: ["record", *PROMPTS, "--per-prompt", 3, "--steps", 6, *reward(f), "--out", o / "r.zarr"],
            kinds=JUDGING,
        ),
        Verb("label", lambda f, o: ["label", f / "tree", o / "l.zarr", *reward(f)], kinds=JUDGING),
        Verb(
            "train",
            lambda f, o: [
                "train", f / "tree", f / "final.zarr", "--levels", "4,2", "--batch", 6, "--held-out", 1, "--cpu",
                "--out", o / "run",
            ],
            kinds=WRITING,
        ),
        Verb(
            "train --judge features",
            lambda f, o: [
                "train", "--judge", "features", f / "features.zarr", "--set", "updates=16", "--batch", 16, "--cpu",
                "--out", o / "head",
            ],
            kinds=WRITING,
            once=True,
        ),
        Verb(
            "simulate",
            lambda f, o: [
                "simulate", f / "rec.zarr", "--rungs", "2", "--keep", ".5", "--trials", 30, "--csv", o / "t.csv",
                "--plots", o / "plots", "--json",
            ],
            kinds=WRITING,
            locks=False,
        ),
        Verb(
            "tune",
            lambda f, o: ["tune", f / "rec.zarr", "--budget", "12NFE", "--trials", 40, "--folds", 2, "--out", o / "p.json"],
            kinds=WRITING,
            locks=False,
        ),
        Verb("bench", lambda f, o: ["bench", PROMPTS[0], "--candidates", 4, "--steps", 6, "--calls", 2, "--json"], False),
        Verb(
            "score",
            lambda f, o: ["score", f / "tree", "--prompt", PROMPTS[0], *reward(f), "--readers", 2, "--best", 3,
                          "--copy-to", o / "best", "--out", o / "s"],
            kinds=JUDGING,
        ),
        Verb("import-values", lambda f, o: ["import-values", f / "values", o / "v.zarr", "--overwrite"], kinds=WRITING),
        Verb("show", lambda f, o: ["show", f / "g" / "best.png", "--json"], False),
        Verb("models", lambda f, o: ["models", "--json"], False),
        Verb("rewards", lambda f, o: ["rewards", "--json"], False),
    ]  # fmt: skip


def reward(folder: Path) -> list[object]:
    """A reward that can be made to hang."""
    return ["--reward", "shapes_or_hang:judge", "--reward-timeout", 15]


# What is needed before.

HANGS = '''
"""The embedded reward, which hangs at its HANG-th call where that is set."""
import os, time
from ttsnap.shapes.reward import load_reward
loaded, calls = None, 0

def judge(images, prompts, sigma):
    global loaded, calls
    loaded, calls = loaded or load_reward("cpu"), calls + 1
    if calls == int(os.environ.get("HANG", 0)):
        time.sleep(3600)
    return loaded(images, prompts, sigma=sigma)
'''


def command(*arguments: object) -> str:
    """Run a verb here, so that all it needs is loaded; what it printed."""
    from tests import commands

    done = commands.ttsnap(*arguments)
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout


def prepare(folder: Path) -> None:
    """Make the inputs of all verbs, and load what they need."""
    import tqdm

    tqdm.tqdm.monitor_interval = 0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sys.path.insert(0, str(folder))
    (folder / "p.txt").write_text("\n".join(PROMPTS))
    (folder / "shapes_or_hang.py").write_text(HANGS)
    call = ["--per-prompt", 4, "--steps", 6]
    command("generate", PROMPTS[0], *SEARCH, "--out", folder / "g")
    command(
        "record",
        "--prompts",
        "shapes:train",
        "--prompt-range",
        "0:8",
        *call,
        "--calls",
        "2,4,6",
        "--out",
        folder / "tree",
    )
    command("label", folder / "tree", folder / "rec.zarr", "--reward", "shapes")
    command("label", folder / "tree", folder / "final.zarr", "--reward", "shapes", "--final-only")
    command(
        "record",
        "--prompts",
        "shapes:train",
        "--prompt-range",
        "0:10",
        *call,
        "--reward",
        "shapes",
        "--features",
        "--out",
        folder / "features.zarr",
    )
    values = folder / "values" / "flux_hps_val_base"
    values.mkdir(parents=True)
    for step in range(5):
        rows = "".join(f"{p}:\n" + "".join(f"- {p + i / 7 + step}\n" for i in range(4)) for p in range(3))
        (values / f"p3_i4_s{step:02d}.yaml").write_text(rows)


# What a run left.


def content(folder: Path) -> dict[str, str]:
    """What lies in a folder, dot files too: a digest of each file, without what a clock says."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() or path.is_symlink():
            found[str(path.relative_to(folder))] = hashlib.sha256(timeless(path, folder.parent)).hexdigest()
    return found


def timeless(path: Path, place: Path) -> bytes:
    """The content of a file, without times and the place where it lies."""
    data = path.read_bytes().replace(str(place).encode(), b".")
    if path.suffix in (".json", ".jsonl"):
        with contextlib.suppress(ValueError):
            lines = data.splitlines() if path.suffix == ".jsonl" else [data]
            values = [without_times(json.loads(line)) for line in lines]
            return "\n".join(sorted(json.dumps(value) for value in values)).encode()
    if path.suffix == ".safetensors":  # what it says of itself has no order
        size = int.from_bytes(data[:8], "little")
        return json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode() + data[8 + size :]
    if path.suffix == ".png":
        from PIL import Image

        with contextlib.suppress(OSError), Image.open(io.BytesIO(data)) as image:
            told = {name: without_times(as_json(text)) for name, text in image.info.items() if isinstance(text, str)}
            drawn = str(image.size).encode() if path.name == "board.png" else image.tobytes()  # it says the seconds
            return drawn + json.dumps(told, sort_keys=True, default=str).encode()
    return data


def as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name not in TIMED}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def same(found: Any, wanted: Any, what: str) -> None:
    """AssertionError that says what differs."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        kinds = {
            "missing": sorted(wanted.keys() - found.keys()),
            "left over": sorted(found.keys() - wanted.keys()),
            "different": sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name]),
        }
        told = "; ".join(f"{kind}: {', '.join(names[:4])}" for kind, names in kinds.items() if names)
        assert not told, f"{what}: {told}"
    assert found == wanted, f"{what}: {str(found)[:200]} instead of {str(wanted)[:200]}"


def polite(run: Run, codes: Iterable[int] = ENDS) -> None:
    """AssertionError where a run ended with a traceback, an exit code of another kind, or several errors."""
    said = run.said(2)
    assert "Traceback (most recent" not in said, f"a traceback: {said[-600:]}"
    assert run.code in codes, f"exit code {run.code}: {said[-300:]}"
    if run.code == 2:
        assert len(run.errors) == 1, f"{len(run.errors)} errors: {said[-300:]}"


# Faults.


@dataclass
class Campaign:
    """Inputs, undisturbed results, and the log."""

    folder: Path
    log: Path
    seed: int
    deadline: float

    def __post_init__(self) -> None:
        self.inputs = self.folder / "inputs"
        self.expected: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.done: set[str] = set()
        if self.log.exists():
            lines = map(json.loads, self.log.read_text().splitlines())
            self.done = {line["case"] for line in lines if line["problem"] is None}  # others are tried again

    def note(self, case: str, group: str, kind: str, what: str, problem: str | None, outcome: str) -> None:
        """Write down what came of a case."""
        line = {"case": case, "verb": group, "kind": kind, "what": what, "problem": problem, "outcome": outcome}
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.done.add(case)
        print(f"{'ok  ' if problem is None else 'FAIL'} {case}: {problem or outcome}", flush=True)

    def checked(self, case: str, group: str, kind: str, what: str, work: Iterator[None]) -> Iterator[None]:
        """Run a case, and note what came of it."""
        try:
            outcome = yield from work  # type: ignore[misc]
        except (AssertionError, OSError) as error:
            self.note(case, group, kind, what, " ".join(str(error).split())[:900] or type(error).__name__, "")
        else:
            self.note(case, group, kind, what, None, outcome or "")

    def start(self, verb_: Verb, out: Path, place: Path, name: str, before: Callable[[], None] | None = None) -> Run:
        """Begin a run of a verb."""
        arguments = verb_.arguments(self.inputs, out)
        return Run(verb(arguments + (["--workers", 2] if "worker" in name else [])), place / name, before)

    def result(self, verb_: Verb, out: Path, run: Run) -> Any:
        """What a run came to."""
        return content(out) if verb_.writes else without_times(as_json(run.said(1)))

    def undisturbed(self, verb_: Verb) -> Iterator[None]:
        """Run a verb twice: the results that are expected, and how long it takes."""
        found = []
        for number in range(2):
            place = self.folder / f"{slug(verb_.name)}-whole-{number}"
            out = place / "out"
            out.mkdir(parents=True, exist_ok=True)
            run = self.start(verb_, out, place, "run")
            yield from run.wait()
            assert run.code == 0, (verb_.name, run.said(2))
            found.append(self.relative(self.result(verb_, out, run), place))
            self.seconds[verb_.name] = run.seconds
            shutil.rmtree(place)
        same(found[1], found[0], f"{verb_.name} does not repeat itself")
        self.expected[verb_.name] = found[0]
        print(f"{verb_.name}: {self.seconds[verb_.name]:.2f} s undisturbed", flush=True)

    @staticmethod
    def relative(result: Any, place: Path) -> Any:
        """A result without the place where it lies."""
        return json.loads(json.dumps(result).replace(str(place), "."))

    def fault(self, verb_: Verb, kind: str, number: int) -> Iterator[None]:
        """One fault at a random moment, and the run after it."""
        chance = random.Random(f"{self.seed}/{verb_.name}/{kind}/{number}")
        place = self.folder / f"{slug(verb_.name)}-{kind}-{number}"
        shutil.rmtree(place, ignore_errors=True)
        out = place / "out"
        out.mkdir(parents=True)
        moment = chance.uniform(0, self.seconds[verb_.name] * 1.05)
        mounted = kind == "disk"
        if mounted:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", out], check=True)
        try:
            outcome = yield from getattr(self, f"_{kind}")(verb_, out, place, chance, moment)
            again = self.start(verb_, out, place, "again")
            yield from again.wait()
            polite(again, (0, 2) if verb_.once else (0,))
            yield from again.gone()
            left = again.temporary()
            assert not left, f"temporary files: {left}"
            found, wanted = self.relative(self.result(verb_, out, again), place), self.expected[verb_.name]
            if kind in ("memory", "hang") and verb_.writes:  # in batches of other sizes they round otherwise
                found, wanted = sorted(found), sorted(wanted)
            same(found, wanted, "after the same command again")
        finally:
            if mounted:
                subprocess.run(["umount", "-l", out], check=True)
        shutil.rmtree(place)
        return outcome

    def _kill(self, verb_: Verb, out: Path, place: Path, chance: random.Random, moment: float) -> Iterator[None]:
        run = self.start(verb_, out, place, "disturbed")
        yield from run.at(moment)
        run.signal(signal.SIGKILL)
        yield from run.wait()
        assert "Traceback (most recent" not in run.said(2), run.said(2)[-600:]
        yield from run.gone()
        run.temporary()
        return f"killed after {moment:.2f} s" if run.code else "had ended"

    def _term(self, verb_: Verb, out: Path, place: Path, chance: random.Random, moment: float) -> Iterator[None]:
        run = self.start(verb_, out, place, "disturbed")
        yield from run.at(moment)
        run.signal(signal.SIGTERM)
        yield from run.wait()
        polite(run, (*ENDS, -signal.SIGTERM))
        yield from run.gone()
        left = run.temporary()
        assert not left or run.code == -signal.SIGTERM, f"temporary files: {left}"
        return f"exit code {run.code}"

    def _stop(self, verb_: Verb, out: Path, place: Path, chance: random.Random, moment: float) -> Iterator[None]:
        run = self.start(verb_, out, place, "disturbed")
        yield from run.at(moment)
        run.signal(signal.SIGSTOP, group=True)
        yield from run.at(moment + chance.uniform(0.1, 1.5))
        run.signal(signal.SIGCONT, group=True)
        yield from run.wait()
        polite(run, (0,))
        same(self.relative(self.result(verb_, out, run), place), self.expected[verb_.name], "after it went on")
        yield from run.gone()
        return "went on"

    def _disk(self, verb_: Verb, out: Path, place: Path, chance: random.Random, moment: float) -> Iterator[None]:
        run = self.start(verb_, out, place, "disturbed")
        yield from run.at(moment)
        room = chance.randrange(0, 3) * 4096
        filler = out / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            free = os.statvfs(out).f_bavail * 4096 - room
            os.posix_fallocate(file.fileno(), 0, max(1, free))
        yield from run.wait()
        filler.unlink(missing_ok=True)
        polite(run)
        if run.code == 2:
            said = run.errors[0]
            assert any(word in said for word in ("No space left", "disk is full", "cannot write")), said
        yield from run.gone()
        return run.errors[0] if run.errors else f"exit code {run.code}"

    def _vanish(self, verb_: Verb, out: Path, place: Path, chance: random.Random, moment: float) -> Iterator[None]:
        run = self.start(verb_, out, place, "disturbed")
        yield from run.at(moment)
        gone = place / "gone"
        out.rename(gone)
        shutil.rmtree(gone)
        yield from run.wait()
        polite(run)
        yield from run.gone()
        out.mkdir(exist_ok=True)
        return run.errors[0] if run.errors else f"exit code {run.code}"

    def _two(self, verb_: Verb, out: Path, place: Path, chance: random.Random, moment: float) -> Iterator[None]:
        run = self.start(verb_, out, place, "disturbed")
        yield from run.at(moment)
        other = self.start(verb_, out, place, "other")
        yield from run.wait()
        yield from other.wait()
        for one in (run, other):
            polite(one, (0, 2))
            yield from one.gone()
        codes = sorted((run.code, other.code))
        assert codes[0] == 0, f"neither ended well: {run.errors + other.errors}"
        said = (run.errors + other.errors)[:1]
        assert (
            not said
            or verb_.once
            or (verb_.locks and ("is being written by" in said[0] or "exists already" in said[0]))
        ), said
        return said[0] if said else "both ended"

    def _clock(self, verb_: Verb, out: Path, place: Path, chance: random.Random, moment: float) -> Iterator[None]:
        jump, real = chance.choice([-86400, -3600, 3600, 86400]), time.time

        def before() -> None:
            start = time.monotonic()
            time.time = lambda: real() + (jump if time.monotonic() - start > moment else 0)

        run = self.start(verb_, out, place, "disturbed", before)
        yield from run.wait()
        polite(run, (0,))
        yield from run.gone()
        return f"{jump:+} s after {moment:.2f} s"

    def _memory(self, verb_: Verb, out: Path, place: Path, chance: random.Random, moment: float) -> Iterator[None]:
        run = self.start(verb_, out, place, "disturbed")
        yield from run.at(moment)
        if not run.poll():
            with contextlib.suppress(OSError):
                used = int(Path(f"/proc/{run.pid}/statm").read_text().split()[0]) * resource.getpagesize()
                resource.prlimit(
                    run.pid, resource.RLIMIT_AS, (used + chance.randrange(1 << 20), resource.RLIM_INFINITY)
                )
        yield from run.wait()
        polite(run)
        yield from run.gone()
        return run.errors[0] if run.errors else f"exit code {run.code}"

    def _hang(self, verb_: Verb, out: Path, place: Path, chance: random.Random, moment: float) -> Iterator[None]:
        call = chance.randrange(1, 7)
        run = self.start(verb_, out, place, "disturbed", lambda: os.environ.update(HANG=str(call)))
        yield from run.wait()
        polite(run)
        if run.code:
            assert "gave no answer" in run.said(2), run.said(2)[-300:]
        yield from run.gone()
        return run.errors[0] if run.errors else f"exit code {run.code}"

    def _worker(self, verb_: Verb, out: Path, place: Path, chance: random.Random, moment: float) -> Iterator[None]:
        run = self.start(verb_, out, place, "disturbed-worker")
        killed, wait = 0, chance.uniform(0, 2)
        while not run.poll() and not killed:
            workers = [pid for pid in run._left() if b"_Actor" in cmdline(pid)]
            if workers:
                yield from run.at(time.monotonic() - run.begun + wait)
                with contextlib.suppress(OSError):
                    os.kill(chance.choice(workers), signal.SIGKILL)
                    killed = 1
            yield
        yield from run.wait(400)
        polite(run, (0,))
        yield from run.gone(20)
        return f"{killed} worker killed"

    # Servers.

    def served(self, name: str, kind: str, number: int) -> Iterator[None]:
        """A fault at a random moment of a server's start and of its first answer; then another answers as it should."""
        chance = random.Random(f"{self.seed}/{name}/{kind}/{number}")
        place = self.folder / f"{name}-{kind}-{number}"
        place.mkdir()
        port = free_port()
        moment = chance.uniform(0, self.seconds[name])
        run = self.serve(name, place, port, "disturbed")
        asking = self.answer(name, place, port, run)
        while time.monotonic() - run.begun < moment and not run.poll():
            next(asking, None)
            yield
        if kind == "stop":
            run.signal(signal.SIGSTOP, group=True)
            yield from run.at(time.monotonic() - run.begun + chance.uniform(0.1, 1.5))
            run.signal(signal.SIGCONT, group=True)
            same((yield from asking), self.expected[name], "after it went on")
            run.signal(signal.SIGTERM)
        else:
            run.signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        yield from run.wait()
        asking.close()
        polite(run, (0, 2, 130, -signal.SIGTERM, -signal.SIGKILL))
        yield from run.gone()
        left = run.temporary()
        assert not left or run.code < 0, f"temporary files: {left}"
        again = self.serve(name, place, port, "again")
        found = yield from self.answer(name, place, port, again)
        again.signal(signal.SIGTERM)
        yield from again.wait()
        polite(again, (0, 130, -signal.SIGTERM))
        yield from again.gone()
        same(found, self.expected[name], "of the same server again")
        left = again.temporary()
        assert not left, f"temporary files: {left}"
        shutil.rmtree(place)
        return f"exit code {run.code}"

    def serve(self, name: str, place: Path, port: int, folder: str) -> Run:
        """Start a server."""
        options = {"serve": ["--candidates", 4, "--steps", 6], "app": ["--out", place / "out"]}[name]
        return Run(verb([name, "--port", port, *options]), place / folder)

    def answer(self, name: str, place: Path, port: int, run: Run) -> Iterator[None]:
        """What a server answers, once it does."""
        ask = {
            "serve": hostile.post(hostile.IMAGES, json.dumps({"prompt": PROMPTS[0], "seed": 1})),
            "app": hostile.get("/"),
        }
        while not run.poll():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.05):
                break
            yield
        asking = Run(lambda: print(*answered(port, ask[name])), place / "client")
        try:
            yield from asking.wait()
        finally:
            asking.signal(signal.SIGKILL)
            asking.temporary()
        return asking.said(1)

    def undisturbed_server(self, name: str) -> Iterator[None]:
        """How long a server takes to answer, and what."""
        place = self.folder / f"{name}-whole"
        place.mkdir()
        run = self.serve(name, place, port := free_port(), "run")
        found = yield from self.answer(name, place, port, run)
        assert found.startswith("200"), (found, run.said(2))
        self.expected[name], self.seconds[name] = found, time.monotonic() - run.begun
        run.signal(signal.SIGTERM)
        yield from run.wait()
        run.temporary()
        print(f"{name}: {self.seconds[name]:.2f} s until it has answered", flush=True)

    # Hostile files, options and requests.

    def hostile_file(self, given: hostile.Given, number: int) -> Iterator[None]:
        """One hostile file or option: a sentence, in bounded time and memory, and nothing is run or left."""
        place = self.folder / f"hostile-{number}"
        (place / "in").mkdir(parents=True)
        arguments = given.arguments(self.inputs, place / "in")

        def before() -> None:
            os.chdir(place / "in")
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), resource.RLIM_INFINITY))

        run = Run(verb(arguments), place / "run", before)
        yield from run.wait(60)
        polite(run, (2, 3))
        yield from run.gone()
        assert not list(place.rglob(hostile.MARK)), "what is in it was run"
        left = run.temporary()
        assert not left, f"temporary files: {left}"
        said = (run.errors or run.said(2).strip().splitlines() or ["nothing"])[-1]
        shutil.rmtree(place, ignore_errors=True)
        return said.replace(f"{place}/in/", "").replace(str(self.inputs), ".")

    def hostile_requests(self, name: str) -> Iterator[None]:
        """Hostile requests to a server, which answers as ever afterwards."""
        asked = {**hostile.BOTH, **(hostile.SERVE if name == "serve" else hostile.PAGE)}
        cases = {f"hostile/{name}, requests/{what}": what for what in asked}
        if not (missing := [case for case in cases if case not in self.done]):
            return
        place = self.folder / f"{name}-asked"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        run = self.serve(name, place, port := free_port(), "run")
        expected = yield from self.answer(name, place, port, run)
        for case in missing:
            before = len(run.said(2))
            status, body = hostile.asked(port, asked[cases[case]])
            yield
            said = run.said(2)[before:]
            problem = None
            if not (400 <= status < 500 or status in (0, 501, 505)):
                problem = f"status {status}: {body[:200]!r}"
            elif "Traceback (most recent" in said or b"Traceback" in body:
                problem = f"a traceback: {said[-500:]}"
            elif b"root:" in body:
                problem = "a file of this machine"
            elif run.poll():
                problem = f"the server ended with {run.code}"
            self.note(case, f"{name}, requests", "hostile", cases[case], problem, f"status {status or 'none'}")
        same((yield from self.answer(name, place, port, run)), expected, "after hostile requests")
        run.signal(signal.SIGTERM)
        yield from run.wait()
        polite(run, (0, 130, -signal.SIGTERM))
        yield from run.gone()
        run.temporary()
        shutil.rmtree(place)

    # All of them.

    def cases(self, only: str) -> Iterator[Iterator[None]]:
        """Every fault that is not in the log yet."""
        wanted = [
            (verb_, kind, number)
            for verb_ in verbs()
            for kind, count in COUNTS.items()
            for number in range(count)
            if kind in ("kill", "term", "stop", *verb_.kinds)
            and only in (case := f"{verb_.name}/{kind}/{number}")
            and case not in self.done
        ]
        together(self.undisturbed(verb_) for verb_ in {verb_.name: verb_ for verb_, _, _ in wanted}.values())
        for verb_, kind, number in wanted:
            if time.monotonic() > self.deadline:
                return
            case = f"{verb_.name}/{kind}/{number}"
            yield self.checked(case, verb_.name, kind, SAID[kind], self.fault(verb_, kind, number))
        for name in ("serve", "app"):
            missing = [
                (kind, number)
                for kind in ("kill", "term", "stop")
                for number in range(COUNTS[kind])
                if only in (case := f"{name}/{kind}/{number}") and case not in self.done
            ]
            if missing:
                together(iter([self.undisturbed_server(name)]))
            for kind, number in missing:
                if time.monotonic() > self.deadline:
                    return
                yield self.checked(f"{name}/{kind}/{number}", name, kind, SAID[kind], self.served(name, kind, number))
        for number, given in enumerate(hostile.everything()):
            case = f"hostile/{given.group}/{given.what}"
            if only in case and case not in self.done and time.monotonic() < self.deadline:
                yield self.checked(case, given.group, "hostile", given.what, self.hostile_file(given, number))
        for name in ("serve", "app"):
            if only in f"hostile/{name}, requests/" and time.monotonic() < self.deadline:
                yield self.hostile_requests(name)


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def answered(port: int, data: bytes) -> tuple[int, str]:
    """Status of an answer, and a digest of the picture in it, if there is one."""
    status, body = hostile.asked(port, data, 110)
    start = body.find(b"iVBOR")
    if start < 0:
        return status, ""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(body[start : body.index(b'"', start)]))) as image:
        return status, hashlib.sha256(image.tobytes()).hexdigest()


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


BEGIN, END = "<!-- faults -->\n", "<!-- end of faults -->\n"


def table(log: Path) -> str:
    """What came of each kind of fault for each verb, and of hostile input, as Markdown."""
    last = {line["case"]: line for line in map(json.loads, log.read_text().splitlines())}
    faults = [line for line in last.values() if line["kind"] != "hostile"]
    hostiles = [line for line in last.values() if line["kind"] == "hostile"]
    kinds = [kind for kind in COUNTS if any(line["kind"] == kind for line in faults)]

    def cell(lines: list[dict[str, Any]]) -> str:
        good = sum(line["problem"] is None for line in lines)
        return "" if not lines else str(good) if good == len(lines) else f"**{good} of {len(lines)}**"

    rows = ["| verb | " + " | ".join(SAID[kind] for kind in kinds) + " |", "|---|" + "---:|" * len(kinds)]
    for name in dict.fromkeys(line["verb"] for line in faults):
        mine = [line for line in faults if line["verb"] == name]
        cells = [cell([line for line in mine if line["kind"] == kind]) for kind in kinds]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    rows += ["", "| hostile files, options and requests for | cases | such as | an answer |", "|---|---:|---|---|"]
    for name in dict.fromkeys(line["verb"] for line in hostiles):
        mine = [line for line in hostiles if line["verb"] == name]
        said = re.sub(r"/tmp/\S*?/(in|out)/", "", min((line["outcome"] or line["problem"] for line in mine), key=len))
        such = "; ".join(line["what"] for line in mine[:3])
        rows.append(f"| {name} | {cell(mine)} | {such} | {said[:110]} |".replace("\\", ""))
    good = [sum(line["problem"] is None for line in lines) for lines in (faults, hostiles)]
    head = (
        f"{len(faults)} faults, {good[0]} of them survived as told; {len(hostiles)} hostile inputs, {good[1]} of them answered "
        "as told. A number alone: all of so many."
    )
    return "\n".join([head, "", *rows]) + "\n"


def write_table(log: Path) -> None:
    """Put the table into docs/robustness.md."""
    page = ROOT / "docs" / "robustness.md"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(before + BEGIN + table(log) + END + rest.split(END)[1], encoding="utf-8")


def main() -> None:
    """Run what is missing in the log, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name holds this, such as generate/kill or hostile")
    parser.add_argument("--minutes", type=float, default=90.0, help="begin no case after so long")
    parser.add_argument("--log", type=Path, default=ROOT / "out" / "faults.jsonl")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if not options.table:
        options.log.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="ttsnap-faults-"))
        campaign = Campaign(folder, options.log.absolute(), options.seed, time.monotonic() + 60 * options.minutes)
        try:
            os.chdir(folder)
            prepare(campaign.inputs)
            alone()
            together(campaign.cases(options.only))
        finally:
            os.chdir(ROOT)
            shutil.rmtree(folder, ignore_errors=True)
    write_table(options.log)


if __name__ == "__main__":
    main()
