"""`ttsnap tune`: the best schedule for a budget or a range of budgets, from recorded rewards."""

from __future__ import annotations

import math
from dataclasses import replace
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
    DryRun,
    LookTflop,
    ModelOptions,
    Rule,
    Weights,
    tell,
)
from ttsnap.live.settings import LiveTuningSettings, ModelSettings, read_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ttsnap.core.cost import Budget
    from ttsnap.live.forecast import Work
    from ttsnap.live.session import Session
    from ttsnap.live.tuning import LiveTuning
    from ttsnap.replay.tuning import Tuning


def tune(
    recording: Path | None = None,
    /,
    *,
    live: Annotated[LiveTuningSettings, Parameter(name="*", group=POLICIES)] = LiveTuningSettings(),
    model: ModelOptions = ModelSettings(),
    budget: Annotated[tuple[str, ...], Budgets] = (),
    out: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    cost_model: CostModelName = None,
    call_tflop: CallTflop = None,
    look_tflop: LookTflop = None,
    accounting: Accounting = "calls",
    guide: Annotated[str, Parameter(group=POLICIES)] = "aware",
    weights: Weights = None,
    combine: Rule = None,
    folds: int = 4,
    trials: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Find the best schedule for a budget or a range of budgets, and say what it is worth on held-out prompts.

    Try: ttsnap tune flux.zarr --budgets 400:4000:200TFLOP --out tuned.json, then: ttsnap generate --policy tuned.json

    With a recording, schedules of halving are replayed, thousands of them. Without one, any policy is tuned live:
    ttsnap tune --model shapes-hard --policy svdd --prompts shapes-hard:train --prompt-range :60 --budget 18GFLOP

    Args:
        recording: A recording (see import-values and record).
        budget: 2000TFLOP, or a range 400:4000:200TFLOP for one schedule that serves all; also NFE; several by repeating
            (default: best-of-2 to best-of-20). Live each of several budgets is tuned for, and the file says what is
            best for each.
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

    budgets = sorted({b for text in budget for b in parse_budgets(text)}, key=lambda b: b.amount)
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file such as {out / 'tuned.json'}")
    if recording is None:
        _live(
            live,
            model,
            (weights, combine),
            budgets,
            out,
            trials or 40,
            seconds,
            seed,
            dry_run,
            json,
        )
        return
    if given := live.given():
        raise ValueError(f"{', '.join(given)} tune live; leave out the recording {recording}")
    opened = Recording.open(recording)
    costs = cost_model_of(opened, cost_model, call_tflop=call_tflop, look_tflop=look_tflop)
    if dry_run:
        from ttsnap.live.forecast import Work

        count = 3200 if trials is None else trials
        what = f"{count} schedules of halving, replayed on {len(opened.recorded())} prompts of {opened.path}"
        tell(Work(what, tflop=0.0, seconds=math.nan if seconds is None else seconds, disk=4096 if out else 0), json)
        return
    shown = console(json)
    with Progress(console=shown, transient=True, disable=shown.quiet) as bar:
        task = bar.add_task("tuning", total=None)
        tuning = fit(
            opened,
            budgets or default_budgets(costs, opened.shape[2]),
            accounting_of(accounting, costs),
            guide=guide,
            weights=read_weights(weights),
            combine=combine,
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
    asked: LiveTuningSettings,
    model: ModelSettings,
    several: tuple[str | None, str | None],
    budgets: Sequence[Budget],
    out: Path | None,
    trials: int,
    seconds: float | None,
    seed: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Tune a policy by searching with it, for each budget."""
    import json as encoder

    from rich.progress import Progress

    from ttsnap import policies
    from ttsnap.cli.options import read_calls, read_prompts, read_range
    from ttsnap.cli.progress import console
    from ttsnap.cli.workers import quietly
    from ttsnap.live.settings import SearchSettings
    from ttsnap.live.tuning import save
    from ttsnap.live.tuning import tune as fit
    from ttsnap.pipelines.conditions import Pictures

    if asked.policy is None or asked.prompts is None or not budgets:
        raise ValueError(
            "give a recording; or tune live: --policy svdd --prompts FILE and a --budget, such as --budget 2000TFLOP"
        )
    base = policies.read(asked.policy)[0]
    texts = read_prompts((), asked.prompts)
    texts = [texts[place] for place in read_range(asked.prompt_range, len(texts))]
    weights, combine = several
    named = asked.policy if base else None
    settings = SearchSettings(reward=asked.reward, weights=weights, combine=combine, policy=named)
    session = quietly(settings.prepare, model, texts[0], Pictures(), None)
    base = base or policies.default_policy(session.sampler.num_steps)
    if dry_run:
        tell(_planned(replace(session, policy=base), texts, budgets, trials, out is not None), as_json)
        return
    shown, found = console(as_json), []
    with Progress(console=shown, transient=True, disable=shown.quiet) as bar:
        for budget in budgets:
            task = bar.add_task("tuning", total=trials)
            found.append(
                fit(
                    session,
                    texts,
                    base,
                    budget,
                    steps=read_calls(asked.try_steps, "--try-steps") or (),
                    trials=trials,
                    seconds=seconds,
                    seed=seed,
                    on_progress=lambda done, best, task=task, budget=budget: bar.update(  # type: ignore[misc]
                        task, completed=done, description=f"tuning for {budget}, best mean reward {best:.4g}"
                    ),
                )
            )
    if out is not None:
        save(found, out)
    if as_json:
        told = [one.to_dict() for one in found]
        whole = told[-1] if len(told) == 1 else {"by_budget": told}
        print(encoder.dumps(whole | {"file": None if out is None else str(out)}, allow_nan=False))
        return
    for one in found:
        _show_live(one)
    if out is not None:
        print(f"written: {out}")


def _planned(session: Session, texts: Sequence[str], budgets: Sequence[Budget], trials: int, kept: bool) -> Work:
    """What tuning live would run at most: all trials on half of the prompts, three policies on the others."""
    from ttsnap.core.cost import affordable
    from ttsnap.live.forecast import Work, forecast

    parts = []
    for budget in budgets:
        count = affordable(session.policy, budget, session.cost_model, session.sampler.num_steps)
        parts.append(forecast(replace(session, candidates=count), texts, board=False).work)
    half, times = len(texts) // 2, (trials + 3) / 2
    what = f"{trials} trials on {half} prompts at most, the best of them on the others; {parts[0].what}"
    calls, looks = (round(times * sum(getattr(part, name) for part in parts)) for name in ("calls", "looks"))
    tflop, seconds = (times * sum(getattr(part, name) for part in parts) for name in ("tflop", "seconds"))
    return Work(what, calls, looks, tflop, seconds, parts[0].weights, 4096 * kept)


def _show_live(tuning: LiveTuning) -> None:
    """What a policy that was tuned live is worth, and the policy."""
    import json as encoder

    from rich.console import Console
    from rich.table import Table

    from ttsnap.policies import to_dict

    table = Table(show_edge=False, pad_edge=False)
    columns = (f"held out, {tuning.provenance['budget']}", "mean reward", "TFLOP per prompt", "tuned gains (95 %)")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for key, values in tuning.rewards.items():
        gain = "" if key == "tuned" else "{:+.3g} ({:+.3g} to {:+.3g})".format(*tuning.gain(key))
        table.add_row(key, f"{values.mean():.4g}", f"{tuning.tflop[key].mean():.4g}", gain)
    printer = Console()
    printer.print(table)
    verdict = "better than" if tuning.better else "not better than"
    printer.print(f"{verdict} the policy it began with, beyond the interval over prompts", highlight=False)
    if "steps" in tuning.provenance:
        printer.print(f"steps: {tuning.num_steps}", highlight=False)
    printer.print(f"policy: {encoder.dumps(to_dict(tuning.policy))}", highlight=False, soft_wrap=True)


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
