"""What `ttsnap simulate` does once its options are understood."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ttsnap import policies
from ttsnap.cli.options import read_numbers, read_policy
from ttsnap.cost import format_amount, parse_budgets
from ttsnap.results import atomically
from ttsnap.types import Policy

if TYPE_CHECKING:
    from ttsnap.recordings import Recording
    from ttsnap.simulation.results import Simulation
    from ttsnap.simulation.simulator import Contender

GUIDES = {"aware": ("aware",), "clean": ("clean",), "both": ("aware", "clean")}
METHODS = {"aware": "TTSnap", "clean": "TTSp"}


@dataclass(frozen=True)
class Request:
    """The options of one command."""

    recording: Path
    policies: list[str]
    rungs: str | None
    keep: str | None
    guide: str | None
    weights: str | None
    budgets: str | None
    accounting: str
    cost_model: str | None
    call_tflop: float | None
    look_tflop: float | None
    trials: int
    seed: int
    plots: Path | None
    csv: Path | None


def execute(request: Request, *, as_json: bool) -> None:
    """Simulate, then print, and write what was asked for."""
    from ttsnap.recordings import Recording
    from ttsnap.simulation import accounting_of, cost_model_of, default_budgets, simulate

    budgets = parse_budgets(request.budgets) if request.budgets else None
    weights = read_numbers(request.weights, "--weights", "1,.5") if request.weights else None
    recording = Recording.open(request.recording)
    model = cost_model_of(recording, request.cost_model, call_tflop=request.call_tflop, look_tflop=request.look_tflop)
    accounting = accounting_of(request.accounting, model)
    field = contenders(request, recording)
    with Progress(console=Console(stderr=True), transient=True, disable=as_json) as bar:
        task = bar.add_task(f"{len(field)} policies", total=None)
        simulation = simulate(
            recording,
            field,
            budgets or default_budgets(model, recording.shape[2]),
            accounting,
            trials=request.trials,
            seed=request.seed,
            weights=weights,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    written: list[Path] = []
    if request.plots:
        from ttsnap.figures import save
        from ttsnap.simulation import plots

        written = save(plots.plot(simulation, recording), request.plots)
    if request.csv:
        request.csv.parent.mkdir(parents=True, exist_ok=True)
        atomically(request.csv, lambda temporary: simulation.table.to_csv(temporary, index=False))
        written.append(request.csv)
    if as_json:
        print(json.dumps(simulation.to_dict() | {"files": [str(path) for path in written]}))
    else:
        show(simulation, written)


def contenders(request: Request, recording: Recording) -> list[Contender]:
    """Every policy with every guide that is asked for and recorded, under names that tell them apart."""
    from ttsnap.simulation import Contender

    if request.guide is not None and request.guide not in GUIDES:
        raise ValueError(f"unknown guide {request.guide!r}; known are {', '.join(GUIDES)}")
    if request.guide in ("aware", "both") and not recording.has_aware:
        raise ValueError(f"{recording.path} has no noise-aware rewards; use --guide clean")
    guides = GUIDES[request.guide or ("both" if recording.has_aware else "clean")]
    chosen: list[tuple[str, Policy]] = []
    for name in request.policies or ([] if request.rungs else ["halving"]):
        if name == "best-of-n":
            continue  # always beside the others, exact
        policy = default_or_named(name, recording.shape[2])
        label = "halving" if name == "halving" else name.removesuffix(".json").split("/")[-1]
        chosen.append((label, policy))
    if request.rungs or request.keep:
        chosen.append((f"halving {request.rungs}", _policy_of(request, recording.shape[2])))
    if not chosen:
        raise ValueError("best-of-n is in every table already; name another policy to compare it with")
    field = []
    for label, policy in chosen:
        for guide in guides:
            method = METHODS[guide]
            name = method if label == "halving" else f"{method} {label}".replace("halving ", "")
            field.append(Contender(name, policy, guide))
    return field


def _policy_of(request: Request, num_steps: int) -> Policy:
    policy = read_policy(None, request.rungs, request.keep)
    assert policy is not None
    assert not isinstance(policy, str)
    policy.plan(1, num_steps)
    return policy


def default_or_named(name: str, num_steps: int) -> Policy:
    """A policy by name or file; plain `halving` has its rungs moved to the number of steps."""
    if name == "halving":
        return policies.default_policy(num_steps)
    if name.endswith(".json"):
        policy = policies.load(name)
        policy.plan(1, num_steps)
        return policy
    if name not in policies.POLICIES:
        known = ", ".join(policies.POLICIES)
        raise ValueError(f"unknown policy {name!r}; known are {known}, or a policy file ending in .json")
    named: Policy = policies.POLICIES[name]()
    named.plan(1, num_steps)
    return named


def show(simulation: Simulation, written: Iterable[Path]) -> None:
    """Tables for people, and what they rest on."""
    console = Console()
    attrs = simulation.dataset.attrs
    tables(simulation, console)
    console.print(
        f"{simulation.dataset.sizes['prompt']} prompts, {attrs['pool']} candidates each, "
        f"{attrs['trials']} paired trials; "
        f"accounting {attrs['accounting']}, {attrs['cost_model']}: "
        f"{format_amount(attrs['call_tflop'], 'TFLOP')} a call, {format_amount(attrs['look_tflop'], 'TFLOP')} a look"
        + (f", early {attrs['early_looks']}" if attrs["early_looks"] else ""),
        style="dim",
        highlight=False,
    )
    for note in simulation.notes():
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    if paths := [str(path) for path in written]:
        console.print("written: " + ", ".join(paths), highlight=False, soft_wrap=True)


def tables(simulation: Simulation, console: Console) -> None:
    """For each reward the gain at every budget, and over all budgets."""
    rows, summary = simulation.rows
    for name in map(str, simulation.dataset.reward.values):
        table = _table(
            f"{name} of the chosen image at equal cost, and its gain over best-of-N",
            ("budget", "policy", "started", "reward", "gain (95 %)", "compute"),
        )
        mine = sorted((row for row in rows if row["reward_name"] == name), key=lambda row: row["budget"])
        for budget, group in itertools.groupby(mine, key=lambda row: row["budget"]):
            of_budget = list(group)
            first = of_budget[0]
            known = first["best_of_n_reward"] is not None
            table.add_row(
                format_amount(budget, first["budget_unit"]),
                "best-of-N",
                str(first["best_of_n_candidates"]),
                _number(first["best_of_n_reward"]),
                "",
                _times(1.0 if known else None),
            )
            for row in of_budget:
                low, high = row["gain_ci95"]
                gain = "" if row["gain"] is None else f"{row['gain']:+.4f} \N{PLUS-MINUS SIGN} {(high - low) / 2:.4f}"
                multiplier = _times(row["compute_multiplier"])
                table.add_row("", row["policy"], str(row["candidates"]), _number(row["reward"]), gain, multiplier)
        console.print(table)
        if len(simulation.dataset.budget) == 1:
            continue
        table = _table(
            f"{name} over all budgets", ("", "policy", "relative increase (95 %)", "compute multiplier (95 %)")
        )
        for row in summary:
            if row["reward_name"] == name:
                increase, multiple = row["relative_increase_percent"], row["compute_multiplier"]
                spans = _span(row["relative_increase_ci95"], "+.1f"), _span(row["compute_multiplier_ci95"], ".2f")
                table.add_row(
                    "",
                    row["policy"],
                    "" if increase is None else f"{increase:+.1f} % ({spans[0]})",
                    "" if multiple is None else f"{_times(multiple)} ({spans[1]})",
                )
        console.print(table)


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"x{value:.2f}"


def _span(pair: list[Any], kind: str) -> str:
    return " to ".join("?" if value is None else format(value, kind) for value in pair)
