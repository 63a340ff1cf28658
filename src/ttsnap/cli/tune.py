"""`ttsnap tune`: the best schedule for a budget or a range of budgets, from recorded rewards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ttsnap.cli.options import (
    OUTPUT,
    POLICIES,
    Accounting,
    AsJson,
    Budgets,
    CallTflop,
    CostModelName,
    LookTflop,
    ModelOptions,
    Weights,
)
from ttsnap.live.settings import ModelSettings, read_numbers

if TYPE_CHECKING:
    from ttsnap.replay.tuning import Tuning


def tune(
    recording: Path | None = None,
    /,
    *,
    policy: Annotated[str | None, Parameter(group=POLICIES)] = None,
    prompts: Annotated[str | None, Parameter(group=POLICIES)] = None,
    prompt_range: Annotated[str | None, Parameter(group=POLICIES)] = None,
    model: ModelOptions = ModelSettings(),
    reward: Annotated[str | None, Parameter(group=POLICIES)] = None,
    try_steps: Annotated[str | None, Parameter(group=POLICIES)] = None,
    budget: Annotated[tuple[str, ...], Budgets] = (),
    out: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    cost_model: CostModelName = None,
    call_tflop: CallTflop = None,
    look_tflop: LookTflop = None,
    accounting: Accounting = "calls",
    guide: Annotated[str, Parameter(group=POLICIES)] = "aware",
    weights: Weights = None,
    folds: int = 4,
    trials: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    json: AsJson = False,
) -> None:
    """Find the best schedule for a budget or a range of budgets, and say what it is worth on held-out prompts.

    Try: ttsnap tune flux.zarr --budgets 400:4000:200TFLOP --out tuned.json, then: ttsnap generate --policy tuned.json

    With a recording, schedules of halving are replayed, thousands of them. Without one, any policy is tuned live:
    ttsnap tune --model shapes-hard --policy svdd --prompts shapes-hard:train --prompt-range :60 --budget 18GFLOP

    Args:
        recording: A recording (see import-values and record).
        policy: Live: the policy to begin with, by name or as a FILE.json; it says how many rungs there are.
        prompts: Live: a file with prompts, or a list that comes with a model; half of them are held out.
        prompt_range: Live: part of them, such as 0:60.
        reward: Live: reward(s) to search by (default: the model's own).
        try_steps: Live: numbers of steps to choose from, such as 6,12,20; the policy file then says how many.
        budget: 2000TFLOP, or a range 400:4000:200TFLOP for one schedule that serves all; also NFE; several by repeating
            (default: best-of-2 to best-of-20).
        out: Write the policy file here.
        guide: What schedules see: aware (noise-aware rewards, clean where there are none) or clean.
        folds: Parts of the prompts; each is reported by a schedule fitted on the others.
        trials: Schedules to try, for all folds together (default: 3200; live 40).
        seconds: Stop the search early after so long; results then depend on the machine.
        seed: Seed of folds, draws and proposals.
    """
    import json as encoder

    from rich.progress import Progress

    from ttsnap.cli.progress import console
    from ttsnap.core.cost import parse_budgets
    from ttsnap.recordings import Recording
    from ttsnap.replay import accounting_of, cost_model_of, default_budgets
    from ttsnap.replay.tuning import tune as fit

    if recording is None:
        _live(
            policy, prompts, prompt_range, model, reward, try_steps, weights, budget, out, trials, seconds, seed, json
        )
        return
    given = {"--policy": policy, "--prompts": prompts, "--reward": reward, "--try-steps": try_steps}
    if live := [name for name, value in given.items() if value]:
        raise ValueError(f"{', '.join(live)} tune live; leave out the recording {recording}")
    budgets = sorted({b for text in budget for b in parse_budgets(text)}, key=lambda b: b.amount)
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file such as {out / 'tuned.json'}")
    opened = Recording.open(recording)
    costs = cost_model_of(opened, cost_model, call_tflop=call_tflop, look_tflop=look_tflop)
    shown = console(json)
    with Progress(console=shown, transient=True, disable=shown.quiet) as bar:
        task = bar.add_task("tuning", total=None)
        tuning = fit(
            opened,
            budgets or default_budgets(costs, opened.shape[2]),
            accounting_of(accounting, costs),
            guide=guide,
            weights=read_numbers(weights, "--weights", "1,.5") if weights else None,
            folds=folds,
            trials=3200 if trials is None else trials,
            seconds=seconds,
            seed=seed,
            on_progress=lambda done, total, best: bar.update(
                task, completed=done, total=total, description=f"tuning, best gain when fitted {best:.3g}"
            ),
        )
    if out is not None:
        tuning.save(out)
    if json:
        print(encoder.dumps(tuning.to_dict() | {"file": None if out is None else str(out)}, allow_nan=False))
    else:
        _show(tuning, out)


def _live(
    name: str | None,
    source: str | None,
    part: str | None,
    model: ModelSettings,
    reward: str | None,
    try_steps: str | None,
    weights: str | None,
    budget: tuple[str, ...],
    out: Path | None,
    trials: int | None,
    seconds: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Tune a policy by searching with it."""
    import json as encoder

    from rich.progress import Progress

    from ttsnap import policies
    from ttsnap.cli.options import read_calls, read_prompts, read_range
    from ttsnap.cli.progress import console
    from ttsnap.cli.workers import quietly
    from ttsnap.core.cost import Budget
    from ttsnap.files.pictures import Pictures
    from ttsnap.live.settings import SearchSettings
    from ttsnap.live.tuning import tune as fit

    if name is None or source is None or len(budget) != 1:
        raise ValueError(
            "give a recording; or tune live: --policy svdd --prompts FILE and one --budget, such as --budget 2000TFLOP"
        )
    base, limit = policies.named(name), Budget.parse(budget[0])
    texts = read_prompts((), source)
    texts = [texts[place] for place in read_range(part, len(texts))]
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file such as {out / 'tuned.json'}")
    settings = SearchSettings(reward=reward, weights=weights, policy=name if base else None)
    session = quietly(settings.prepare, model, texts[0], Pictures(), None)
    base = base or policies.default_policy(session.sampler.num_steps)
    shown = console(as_json)
    with Progress(console=shown, transient=True, disable=shown.quiet) as bar:
        task = bar.add_task("tuning", total=trials or 40)
        tuning = fit(
            session,
            texts,
            base,
            limit,
            steps=read_calls(try_steps, "--try-steps") or (),
            trials=40 if trials is None else trials,
            seconds=seconds,
            seed=seed,
            on_progress=lambda done, best: bar.update(
                task, completed=done, description=f"tuning, best mean reward {best:.4g}"
            ),
        )
    if out is not None:
        tuning.save(out)
    if as_json:
        print(encoder.dumps(tuning.to_dict() | {"file": None if out is None else str(out)}, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for column in ("held out", "mean reward", "TFLOP per prompt", "tuned gains (95 %)"):
        table.add_column(column, justify="left" if column == "held out" else "right")
    for key, found in tuning.rewards.items():
        gain = "" if key == "tuned" else "{:+.3g} ({:+.3g} to {:+.3g})".format(*tuning.gain(key))
        table.add_row(key, f"{found.mean():.4g}", f"{tuning.tflop[key].mean():.4g}", gain)
    printer = Console()
    printer.print(table)
    verdict = "better than" if tuning.better else "not better than"
    printer.print(f"{verdict} the policy it began with, beyond the interval over prompts", highlight=False)
    if try_steps:
        printer.print(f"steps: {tuning.num_steps}", highlight=False)
    printer.print(f"policy: {encoder.dumps(policies.to_dict(tuning.policy))}", highlight=False, soft_wrap=True)
    if out is not None:
        printer.print(f"written: {out}", highlight=False, soft_wrap=True)


def _show(tuning: Tuning, out: Path | None) -> None:
    """The table of held-out figures, and the policy."""
    from rich.console import Console

    from ttsnap.cli.simulate import tables
    from ttsnap.policies import to_dict

    console = Console()
    prompts = tuning.held_out.dataset.sizes["prompt"]
    console.print(f"On {prompts} held-out prompts, each by a schedule fitted without it:", highlight=False)
    tables(tuning.held_out, console)
    console.print(tuning.sentence, highlight=False)
    fields = to_dict(tuning.policy)
    name = fields.pop("policy")
    parts = [f"{key} {', '.join(f'{v:g}' for v in value)}" for key, value in fields.items()]
    console.print(f"policy: {' '.join([name, *parts])}", highlight=False)
    for note in tuning.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    if out is not None:
        console.print(f"written: {out}", highlight=False, soft_wrap=True)
