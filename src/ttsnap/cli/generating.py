"""What `ttsnap generate` does once its options are understood: run, show, save, resume."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ttsnap import policies
from ttsnap.cost import Ledger, format_amount
from ttsnap.observers import Observer, Start
from ttsnap.results import cost_line, write_json
from ttsnap.search import Look, Result

if TYPE_CHECKING:
    from ttsnap.diversity.negtome import Negtome
    from ttsnap.generation import Searcher
    from ttsnap.results import SearchResult

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Request:
    """The options of one command."""

    prompts: list[str]
    out: Path | None
    model: str
    reward: str | None
    policy: Any
    candidates: int | None
    budget: str | None
    seed: int
    top: int
    compare: bool
    board: bool
    options: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None
    diversity: Negtome | None = None
    preview: str | None = None

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result; a directory is resumed only with the same settings."""
        policy = self.policy if isinstance(self.policy, str | None) else policies.to_dict(self.policy)
        if isinstance(policy, str) and policy.endswith(".json"):
            policy = policies.to_dict(policies.load(policy))
        options = {key: value for key, value in self.options.items() if key != "max_batch"}
        settings = {
            "prompts": self.prompts,
            "model": self.model,
            "reward": self.reward,
            "policy": policy,
            "candidates": self.candidates,
            "budget": self.budget,
            "seed": self.seed,
            "top": self.top,
            "compare": self.compare,
            "board": self.board,
            "dtype": self.dtype,
            **options,
        }
        if self.diversity:
            settings["diversity"] = self.diversity.to_dict()
        if self.preview:
            settings["preview"] = self.preview
        return dict(json.loads(json.dumps(settings)))


def execute(request: Request, *, as_json: bool) -> None:
    """Run the search for every prompt that is not done yet, save as it goes, and report."""
    from ttsnap import rewards
    from ttsnap.cost import Budget

    # Everything that can be wrong without a model is said before one is loaded.
    if request.budget is not None:
        if request.candidates is not None:
            raise ValueError("give --budget or --candidates, not both")
        Budget.parse(request.budget)
    if request.candidates is not None and request.candidates < 1:
        raise ValueError(f"--candidates must be at least 1, got {request.candidates}")
    if request.top < 1:
        raise ValueError(f"--top must be at least 1, got {request.top}")
    if request.reward is not None:
        rewards.names_of(request.reward)
    if isinstance(request.policy, str) and request.policy.endswith(".json"):
        policies.load(request.policy)
    settings = request.settings()
    out, fixed = open_directory(request.out, settings)
    folders = [out] if len(request.prompts) == 1 else [out / f"p{i:04d}" for i in range(len(request.prompts))]
    todo = [i for i, folder in enumerate(folders) if read_record(folder) is None]
    show = Display(quiet=as_json or not todo, total=len(request.prompts), done=len(request.prompts) - len(todo))
    try:
        if todo:
            _search(request, settings, out, fixed, folders, todo, show)
    except KeyboardInterrupt:
        done = sum(read_record(folder) is not None for folder in folders)
        show.close()
        print(
            f"stopped: {done} of {len(folders)} prompts are done; the same command goes on from there ({out})",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    show.close()
    records = [read_record(folder) for folder in folders]
    _report(records, folders, out, as_json, resumed=not todo)


def _search(
    request: Request,
    settings: dict[str, Any],
    out: Path,
    fixed: int | None,
    folders: list[Path],
    todo: list[int],
    show: Display,
) -> None:
    show.status("loading the model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_libraries()
        from ttsnap import generation

        searcher = generation.prepare(
            request.model,
            reward=request.reward,
            budget=None if fixed else request.budget,
            candidates=fixed or request.candidates,
            policy=request.policy,
            prompt=request.prompts[todo[0]],
            device=request.device,
            dtype=request.dtype,
            diversity=request.diversity,
            preview=request.preview,
            **request.options,
        )
    searcher.budget = request.budget
    if fixed is None:  # a budget in seconds is turned into candidates once, so that a resumed run ends the same
        write_json({"settings": settings, "candidates": searcher.candidates}, out / SETTINGS)
    block = _block_size(searcher)
    for start in range(0, len(todo), block):
        rows = todo[start : start + block]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = searcher.block(
                [request.prompts[i] for i in rows],
                seed=request.seed,
                top=request.top,
                compare=request.compare,
                previews=request.board,
                observer=show,
            )
        for note in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
            print(f"warning: {note}", file=sys.stderr)
        for i, result in zip(rows, results, strict=True):
            result.save(folders[i], board=request.board)
        show.finished(results)


def _block_size(searcher: Searcher) -> int:
    """Prompts that run together: enough that even the last survivors fill a batch, at most 16."""
    survivors: int = searcher.policy.plan(searcher.candidates, searcher.sampler.num_steps)[-1].size
    batch: int = searcher.sampler.max_batch
    return max(1, min(16, batch // max(1, survivors)))


def quiet_libraries() -> None:
    """Loading bars and notes of diffusers and transformers do not belong into this display."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def open_directory(out: Path | None, settings: dict[str, Any]) -> tuple[Path, int | None]:
    """The output directory, and the number of candidates if a run with these settings has begun there.

    Raises:
        ValueError: the path is a file, not writable, or holds a run with other settings.
    """
    if out is None:
        slug = re.sub(r"[^a-z0-9]+", "-", settings["prompts"][0].lower()).strip("-")[:48].strip("-") or "image"
        name, number = Path("out") / slug, 1
        out = name
        while (before := _settings_of(out)) is not None and before["settings"] != settings:
            number += 1
            out = name.with_name(f"{slug}-{number}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"output path {out} is a file; give a directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}; give another --out") from error
    before = _settings_of(out)
    if before is None:
        return out, None
    if before["settings"] != settings:
        different = [key for key in settings if before["settings"].get(key) != settings[key]]
        raise ValueError(f"{out} holds a run with other settings ({', '.join(different)} differ); give another --out")
    return out, int(before["candidates"])


def _settings_of(folder: Path) -> dict[str, Any] | None:
    try:
        data = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and {"settings", "candidates"} <= set(data) else None


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a prompt that is complete, else None."""
    try:
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "files" in record else None


class Display(Observer):
    """Live progress on stderr: per look how many are alive, the best reward so far, cost and time left."""

    def __init__(self, *, quiet: bool, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self.console = Console(stderr=True, quiet=quiet)
        self.total, self.before, self.done = total, done, 0
        self.start = time.perf_counter()
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f} % of the calls"),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
            disable=quiet,
        )
        self.task = self.progress.add_task("starting", total=None, left="")
        self.progress.start()

    def status(self, text: str) -> None:
        """Say what goes on."""
        self.progress.update(self.task, description=text)

    def started(self, start: Start) -> None:
        """A block of prompts starts."""
        from rich.markup import escape

        self.model, self.steps = start.cost_model, start.problem.num_steps
        self.block_start = time.perf_counter()
        self.planned = start.cost_model.of_plan(start.plan, len(start.prompts))
        name = policies.to_dict(start.policy)["policy"]
        what = escape(f"“{start.prompts[0]}”") if len(start.prompts) == 1 else f"{len(start.prompts)} prompts together"
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

        spent = ledger.cost(self.model)
        seconds = time.perf_counter() - self.block_start
        left = seconds * max(0, self.planned.nfe - spent.nfe) / max(1, spent.nfe)
        best = float(np.nanmean(np.nanmax(look.combined, axis=1)))
        alive = look.alive.sum(1).mean()
        kind = "finished" if look.step == self.steps else "alive"
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

    def finished(self, results: Sequence[SearchResult]) -> None:
        """A block is saved."""
        self.done += len(results)
        if self.total > 1:
            seconds = time.perf_counter() - self.start
            left = seconds / self.done * (self.total - self.before - self.done)
            self.console.print(
                f"  {self.before + self.done} of {self.total} prompts done, {left:.0f} s left", highlight=False
            )

    def close(self) -> None:
        """Stop the live part."""
        self.progress.stop()


def _report(records: list[Any], folders: list[Path], out: Path, as_json: bool, resumed: bool) -> None:
    for record, folder in zip(records, folders, strict=True):
        record["files"] = {
            kind: [str(folder / name) for name in names] if isinstance(names, list) else str(folder / names)
            for kind, names in record["files"].items()
        }
    if as_json:
        whole = records[0] if len(records) == 1 else {"results": records}
        typer.echo(json.dumps(whole | {"out": str(out)}, indent=1, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if resumed:
        console.print(f"{out} is complete already; nothing was run again.", highlight=False)
    table = Table(title=None, show_edge=False, pad_edge=False)
    for name in ("prompt", "reward", "seed", "best-of-N for the same cost", "image"):
        table.add_column(name, justify="right" if name in ("reward", "seed") else "left")
    for record in records[:20]:
        other = record["best_of_n_at_this_cost"]
        got = f"reward {other['reward']:.3f}" if other["reward"] is not None else "not run (--compare)"
        table.add_row(
            record["prompt"],
            f"{record['reward']:.3f}",
            str(record["seed"]),
            f"N = {other['candidates']}: {got}",
            record["files"]["images"][0],
        )
    console.print(table)
    if len(records) > 20:
        console.print(f"… and {len(records) - 20} more in {out}")
    if len(records) == 1:
        from ttsnap.cost import Cost

        cost = records[0]["cost"]
        text = cost_line(Cost(**{**cost, "seconds": cost["seconds"] if cost["seconds"] is not None else float("nan")}))
        console.print(f"cost: {text} ({cost['looks']} looks)", highlight=False)
        if "board" in records[0]["files"]:
            console.print(f"how it was found: {records[0]['files']['board']}", highlight=False)
