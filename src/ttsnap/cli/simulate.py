"""`ttsnap simulate`: policies at equal cost on recorded rewards."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ttsnap.cli.options import (
    OUTPUT,
    POLICIES,
    Accounting,
    AsJson,
    Budgets,
    CallTflop,
    CostModelName,
    DryRun,
    LookTflop,
    Rule,
    Weights,
    tell,
)
from ttsnap.live.settings import halving, read_numbers

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ttsnap.recordings import Recording
    from ttsnap.replay.results import Simulation
    from ttsnap.replay.simulator import Contender

GUIDES = {"aware": ("aware",), "clean": ("clean",), "both": ("aware", "clean")}
METHODS = {"aware": "TTSnap", "clean": "TTSp"}
IN_SAMPLE = " (in-sample)"  # after the name of a policy file that was tuned on the recording that it is replayed on


def simulate(
    recording: Path,
    /,
    *,
    policy: Annotated[tuple[str, ...], Parameter(group=POLICIES)] = (),
    rungs: Annotated[str | None, Parameter(group=POLICIES)] = None,
    keep: Annotated[str | None, Parameter(group=POLICIES)] = None,
    guide: Annotated[str | None, Parameter(group=POLICIES)] = None,
    weights: Weights = None,
    combine: Rule = None,
    budgets: Annotated[str | None, Budgets] = None,
    accounting: Accounting = "calls",
    cost_model: CostModelName = None,
    call_tflop: CallTflop = None,
    look_tflop: LookTflop = None,
    trials: int = 50,
    seed: int = 0,
    plots: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    csv: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Replay policies on recorded rewards and compare them with best-of-N at equal cost.

    Try: ttsnap simulate flux.zarr --plots plots/

    Args:
        recording: A recording (see import-values and record); or what a search with forks left: its tree.json, or the
            folder of generate. Only what was looked at is known of it, so it replays the policy that was recorded.
        policy: halving, early-selection, or a policy FILE.json; several by repeating (default: halving). A file that
            was tuned on this very recording is marked as in-sample.
        rungs: Another halving: steps at which to look, such as 3,7,12.
        keep: Share that survives each look, such as .4,.4,.5.
        guide: What policies see: aware (noise-aware rewards, clean where there are none), clean, or both (default:
            what is recorded).
        budgets: 400:4000:200TFLOP, or 500TFLOP,2000TFLOP; also NFE (default: best-of-2 to best-of-20).
        trials: Draws of candidates per prompt, the same for all policies.
        seed: Seed of the draws.
        plots: Write the pictures (PNG and SVG) into this folder.
        csv: Write the whole table here.
    """
    import json as encoder

    from rich.progress import Progress

    from ttsnap.cli.progress import console
    from ttsnap.core.cost import parse_budgets
    from ttsnap.files.storage import atomically
    from ttsnap.recordings import Recording
    from ttsnap.replay import accounting_of, cost_model_of, default_budgets
    from ttsnap.replay import simulate as replay

    if trees := _trees(recording):
        _replay_trees(trees, policy, weights, json)
        return
    budget = parse_budgets(budgets) if budgets else None
    numbers = read_numbers(weights, "--weights", "1,.5") if weights else None
    opened = Recording.open(recording)
    model = cost_model_of(opened, cost_model, call_tflop=call_tflop, look_tflop=look_tflop)
    charged = accounting_of(accounting, model)
    tuned = {file: told for file in policy if (told := tuned_on(opened, file)) is not None}
    field = contenders(opened, policy, rungs, keep, guide, tuned)
    if dry_run:
        from ttsnap.live.forecast import Work

        settings = (budget or default_budgets(model, opened.shape[2]), charged)
        begun = time.monotonic()
        replay(opened, field, *settings, trials=1, seed=seed, weights=numbers, combine=combine)
        each, searches = time.monotonic() - begun, len(field) * len(settings[0]) * len(opened.recorded()) * trials
        what = f"{len(field)} policies at {len(settings[0])} budgets, {searches} searches replayed from {opened.path}"
        disk = 1 << 20 if plots else 0
        tell(Work(what, tflop=0.0, seconds=each * trials, disk=disk + (200 * searches // trials if csv else 0)), json)
        return
    shown = console(json)
    with Progress(console=shown, transient=True, disable=shown.quiet) as bar:
        task = bar.add_task(f"{len(field)} policies", total=None)
        simulation = replay(
            opened,
            field,
            budget or default_budgets(model, opened.shape[2]),
            charged,
            trials=trials,
            seed=seed,
            weights=numbers,
            combine=combine,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    written: list[Path] = []
    if plots:
        from ttsnap.files.figures import save
        from ttsnap.replay import plots as drawing

        written = save(drawing.plot(simulation, opened), plots)
    if csv:
        csv.parent.mkdir(parents=True, exist_ok=True)
        atomically(csv, lambda temporary: simulation.table.to_csv(temporary, index=False))
        written.append(csv)
    if json:
        more = {"in_sample": tuned, "files": [str(path) for path in written]}
        print(encoder.dumps(simulation.to_dict() | more))
    else:
        show(simulation, written, tuned)


def _trees(path: Path) -> list[Path]:
    """The trees that are named: a file, or those of a folder that `generate` wrote."""
    if path.suffix == ".json":
        return [path]
    return sorted(path.glob("tree.json")) + sorted(path.glob("p[0-9]*/tree.json"))


def _replay_trees(files: Sequence[Path], names: Sequence[str], weights: str | None, as_json: bool) -> None:
    """Replay searches that forked, each from what it looked at itself."""
    import json as encoder

    import numpy as np
    from rich.console import Console

    from ttsnap import policies
    from ttsnap.core.driver import run
    from ttsnap.core.ranking import WeightedSum
    from ttsnap.core.tree import Tree, Trees

    if len(names) > 1:
        raise ValueError("a recorded tree is replayed with one policy at a time")
    combine = WeightedSum(read_numbers(weights, "--weights", "1,.5")) if weights else None
    rows: list[dict[str, Any]] = []
    for file in files:
        tree = Tree.load(file)
        policy = (policies.read(names[0])[0] or policies.default_policy(tree.num_steps)) if names else None
        policy = policy or policies.from_dict(tree.policy)
        result = run(policy, Trees([tree]), combine, np.random.default_rng(tree.random))
        named = dict(zip(tree.rewards, result.rewards[0].tolist(), strict=True))
        chosen = {"prompt": tree.prompt, "seed": tree.seeds[int(result.chosen[0])], "rewards": named}
        rows.append(
            chosen | {"nfe": int(result.ledger.nfe[0]), "looks": int(result.ledger.looks[0]), "file": str(file)}
        )
    if as_json:
        print(encoder.dumps({"trees": rows}))
        return
    table = _table("replayed from recorded trees", ("prompt", "seed", "reward", "calls", "looks"))
    for row in rows:
        values = ", ".join(_number(value) for value in row["rewards"].values())
        table.add_row(row["prompt"], str(row["seed"]), values, str(row["nfe"]), str(row["looks"]))
    Console().print(table)


def tuned_on(recording: Recording, name: str) -> str | None:
    """What `tune` said of a policy file's worth on prompts it was not fitted on, if it was tuned on this recording."""
    from ttsnap import policies

    if not name.endswith(".json"):
        return None
    notes = policies.load_with_notes(name)[1]
    made = notes.get("provenance", {})
    _, candidates, steps, _ = recording.shape
    here = recording.provenance, list(recording.rewards), candidates, steps
    there = tuple(made.get(key) for key in ("recording_provenance", "rewards", "candidates_recorded", "num_steps"))
    return str(notes.get("held_out", {}).get("sentence", "")) if there == here else None


def contenders(
    recording: Recording,
    names: Sequence[str],
    rungs: str | None,
    keep: str | None,
    guide: str | None,
    tuned: Iterable[str] = (),
) -> list[Contender]:
    """Every policy with every guide that is asked for and recorded, under names that tell them apart."""
    from ttsnap import policies
    from ttsnap.replay import Contender

    if guide is not None and guide not in GUIDES:
        raise ValueError(f"unknown guide {guide!r}; known are {', '.join(GUIDES)}")
    if guide in ("aware", "both") and not recording.has_aware:
        raise ValueError(f"{recording.path} has no noise-aware rewards; use --guide clean")
    steps = recording.shape[2]
    chosen: list[tuple[str, Any]] = []
    for name in names or ([] if rungs else ["halving"]):
        if name == "best-of-n":
            continue  # always beside the others, exact
        label = name.removesuffix(".json").split("/")[-1] + (IN_SAMPLE if name in tuned else "")
        chosen.append((label, policies.read(name)[0] or policies.default_policy(steps)))
    if rungs or keep:
        chosen.append((f"halving {rungs}", halving(rungs, keep)))
    if not chosen:
        raise ValueError("best-of-n is in every table already; name another policy to compare it with")
    field = []
    for label, policy in chosen:
        policy.plan(1, steps)  # complains here about rungs beyond the steps
        for seen in GUIDES[guide or ("both" if recording.has_aware else "clean")]:
            method = METHODS[seen]
            name = method if label == "halving" else f"{method} {label}".replace("halving ", "")
            field.append(Contender(name, policy, seen))
    return field


def show(simulation: Simulation, written: Iterable[Path], tuned: Mapping[str, str] = MappingProxyType({})) -> None:
    """Tables for people, and what they rest on."""
    from rich.console import Console

    from ttsnap.core.cost import format_amount

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
    for file, told in tuned.items():
        what = f"note: {file} was tuned on this recording: what it gains here is in-sample, more than it will elsewhere"
        console.print(f"{what}; {told}" if told else what, highlight=False, soft_wrap=True)
    for note in simulation.notes():
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    if paths := [str(path) for path in written]:
        console.print("written: " + ", ".join(paths), highlight=False, soft_wrap=True)


def tables(simulation: Simulation, console: Console) -> None:
    """For each reward the gain at every budget, and over all budgets."""
    from ttsnap.core.cost import format_amount

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
    from rich import box
    from rich.table import Table

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
