"""What `ttsnap generate` does once its options are understood: run, show, save, resume."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ttsnap import policies
from ttsnap.cli.scaling import Scale, interruptible, say
from ttsnap.cluster.generate import SETTINGS, read_record
from ttsnap.cost import Ledger, format_amount
from ttsnap.locks import locked
from ttsnap.observers import Observer, Start
from ttsnap.ranking import WeightedSum
from ttsnap.results import cost_line, write_json
from ttsnap.search import Look, Result
from ttsnap.storage import AnyPath, check_writable

if TYPE_CHECKING:
    from ttsnap.diversity.negtome import Negtome
    from ttsnap.live.session import Session
    from ttsnap.pictures import Pictures


@dataclass(frozen=True)
class Request:
    """The options of one command."""

    prompts: list[str]
    out: AnyPath | None
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
    pictures: Pictures | None = None
    scale: Scale = field(default_factory=Scale)
    loading: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None
    report: str | None = None

    def prepare(self, fixed: int | None) -> Session:
        """Load everything a search needs; `fixed` candidates if a run that is gone on with has settled on them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet_libraries()
            from ttsnap.live import session

            searcher = session.prepare(
                self.model,
                reward=self.reward,
                budget=None if fixed else self.budget,
                candidates=fixed or self.candidates,
                policy=self.policy,
                prompt=self.prompts[0],
                device=self.device,
                dtype=self.dtype,
                diversity=self.diversity,
                preview=self.preview,
                combine=WeightedSum(self.weights) if self.weights else None,
                report=self.report,
                pictures=self.pictures if self.pictures and self.pictures.files() else None,
                **self.loading,
                **self.options,
            )
        searcher.budget = self.budget
        return searcher

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
        if self.weights:
            settings["weights"] = self.weights
        if self.report:
            settings["report"] = self.report
        if self.pictures:
            settings |= self.pictures.settings()
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
    names = rewards.names_of(request.reward) if request.reward is not None else ["the model's own"]
    if request.weights is not None and len(request.weights) != len(names):
        raise ValueError(f"--weights takes one number per reward ({', '.join(names)}), got {len(request.weights)}")
    if request.report is not None:
        rewards.names_of(request.report)
    if isinstance(request.policy, str) and request.policy.endswith(".json"):
        policies.load(request.policy)
    request.scale.check_device(request.device)
    settings = request.settings()
    out, fixed = open_directory(request.out, settings)
    if len(request.prompts) > 1:
        _many(request, settings, out, fixed, as_json)
        return
    if not request.scale.alone:
        raise ValueError("--workers and --ray-address are for many prompts; one prompt runs in one process")
    resumed = read_record(out) is not None
    show = Display(quiet=as_json or resumed)
    try:
        if not resumed:
            with interruptible(), locked(out, say):
                _search(request, settings, out, fixed, show)
    except KeyboardInterrupt:
        show.close()
        print(f"stopped: the same command begins again ({out})", file=sys.stderr)
        raise typer.Exit(130) from None
    show.close()
    _report([read_record(out)], [out], out, as_json, resumed=resumed)


def _many(request: Request, settings: dict[str, Any], out: AnyPath, fixed: int | None, as_json: bool) -> None:
    """Many prompts, here or on many workers; one that fails takes nobody with it."""
    from ttsnap.cli.scaling import PARTLY, Board, failures_file, report_failures, run
    from ttsnap.cluster.generate import Generate

    prepare = partial(request.prepare, fixed)
    choices = (request.seed, request.top, request.compare, request.board)
    job = Generate(prepare, request.prompts, out, settings, fixed, *choices)
    folders = [job.folder(p) for p in range(len(request.prompts))]
    records = [read_record(folder) for folder in folders]
    failures, resumed = [], None not in records
    if not resumed:
        show = Board("searching", "prompts", quiet=as_json, workers=not request.scale.alone)
        outcome = run(job, request.scale, out, show)
        records = [read_record(folder) for folder in folders]
        failures = report_failures(outcome, failures_file(out, inside=True), lambda p: request.prompts[p])
        if not as_json:
            typer.echo(f"{len(outcome.stored)} prompts, {show.summary()}", err=True)
    done = [p for p, record in enumerate(records) if record is not None]
    _report([records[p] for p in done], [folders[p] for p in done], out, as_json, resumed=resumed, failures=failures)
    if failures:
        raise typer.Exit(PARTLY)


def _search(request: Request, settings: dict[str, Any], out: AnyPath, fixed: int | None, show: Display) -> None:
    show.status("loading the model")
    searcher = request.prepare(fixed)
    if fixed is None:  # a budget in seconds is turned into candidates once, so that a resumed run ends the same
        write_json({"settings": settings, "candidates": searcher.candidates}, out / SETTINGS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = searcher.block(
            request.prompts,
            seed=request.seed,
            top=request.top,
            compare=request.compare,
            previews=request.board,
            observer=show,
        )
    for note in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
        print(f"warning: {note}", file=sys.stderr)
    results[0].save(out, board=request.board)


def quiet_libraries() -> None:
    """Loading bars and notes of diffusers and transformers do not belong into this display."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity(CRITICAL)  # what they log as errors, tracebacks and all, is raised as well
        logging.disable_progress_bar()


def open_directory(out: AnyPath | None, settings: dict[str, Any]) -> tuple[AnyPath, int | None]:
    """The output directory, and the number of candidates if a run with these settings has begun there.

    Raises:
        ValueError: the path is a file, not writable, or holds a run with other settings.
    """
    if out is None:
        slug = re.sub(r"[^a-z0-9]+", "-", settings["prompts"][0].lower()).strip("-")[:48].strip("-") or "image"
        name, number = Path("out").absolute() / slug, 1
        out = name
        while (before := _settings_of(out)) is not None and before["settings"] != settings:
            number += 1
            out = name.with_name(f"{slug}-{number}")
    check_writable(out)
    before = _settings_of(out)
    if before is None:
        return out, None
    if before["settings"] != settings:
        different = [key for key in settings if before["settings"].get(key) != settings[key]]
        raise ValueError(f"{out} holds a run with other settings ({', '.join(different)} differ); give another --out")
    return out, int(before["candidates"])


def _settings_of(folder: AnyPath) -> dict[str, Any] | None:
    try:
        data = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and {"settings", "candidates"} <= set(data) else None


class Display(Observer):
    """Live progress on stderr: per look how many are alive, the best reward so far, cost and time left."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self.console = Console(stderr=True, quiet=quiet)
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
        """The search starts."""
        from rich.markup import escape

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

    def close(self) -> None:
        """Stop the live part."""
        self.progress.stop()


def _report(
    records: list[Any],
    folders: list[AnyPath],
    out: AnyPath,
    as_json: bool,
    resumed: bool,
    failures: list[dict[str, Any]] | None = None,
) -> None:
    for record, folder in zip(records, folders, strict=True):
        record["files"] = {
            kind: [str(folder / name) for name in names] if isinstance(names, list) else str(folder / names)
            for kind, names in record["files"].items()
        }
    if as_json:
        whole = records[0] if failures is None else {"results": records, "failures": failures}
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
    for line in _held_out_lines(records):
        console.print(line, highlight=False, soft_wrap=True)
    if len(records) == 1:
        from ttsnap.cost import Cost

        cost = records[0]["cost"]
        text = cost_line(Cost(**{**cost, "seconds": cost["seconds"] if cost["seconds"] is not None else float("nan")}))
        console.print(f"cost: {text} ({cost['looks']} looks)", highlight=False)
        if "board" in records[0]["files"]:
            console.print(f"how it was found: {records[0]['files']['board']}", highlight=False)


def _held_out_lines(records: list[Any]) -> list[str]:
    """What each held-out reward says, over all prompts."""
    lines = []
    for of_reward in zip(*(record["held_out"] for record in records if record.get("held_out")), strict=True):
        winner, median = (sum(h[key] for h in of_reward) / len(of_reward) for key in ("reward", "median"))
        images = sum(h["images"] for h in of_reward)
        compared = [h["parted"] for h in of_reward if h["parted"] is not None]
        worse = f"; worse than the median on {sum(compared)} of {len(compared)} prompts" if compared else ""
        worse += ": they may part (reward hacking)" if 2 * sum(compared) > len(compared) else ""
        lines.append(f"held out, {of_reward[0]['name']}: {winner:.3f}, median of {images} finished {median:.3f}{worse}")
    return lines
