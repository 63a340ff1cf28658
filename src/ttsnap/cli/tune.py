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
    Weights,
)
from ttsnap.live.settings import read_numbers

if TYPE_CHECKING:
    from ttsnap.replay.tuning import Tuning


def tune(
    recording: Path,
    /,
    *,
    budget: Annotated[tuple[str, ...], Budgets] = (),
    out: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    cost_model: CostModelName = None,
    call_tflop: CallTflop = None,
    look_tflop: LookTflop = None,
    accounting: Accounting = "calls",
    guide: Annotated[str, Parameter(group=POLICIES)] = "aware",
    weights: Weights = None,
    folds: int = 4,
    trials: int = 3200,
    seconds: float | None = None,
    seed: int = 0,
    json: AsJson = False,
) -> None:
    """Find the best schedule for a budget or a range of budgets, and say what it is worth on held-out prompts.

    Try: ttsnap tune flux.zarr --budgets 400:4000:200TFLOP --out tuned.json, then: ttsnap generate --policy tuned.json

    Args:
        recording: A recording (see import-values and record).
        budget: 2000TFLOP, or a range 400:4000:200TFLOP for one schedule that serves all; also NFE; several by repeating
            (default: best-of-2 to best-of-20).
        out: Write the policy file here.
        guide: What schedules see: aware (noise-aware rewards, clean where there are none) or clean.
        folds: Parts of the prompts; each is reported by a schedule fitted on the others.
        trials: Schedules to try, for all folds together.
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
    opened = Recording.open(recording)
    model = cost_model_of(opened, cost_model, call_tflop=call_tflop, look_tflop=look_tflop)
    shown = console(json)
    with Progress(console=shown, transient=True, disable=shown.quiet) as bar:
        task = bar.add_task("tuning", total=None)
        tuning = fit(
            opened,
            budgets or default_budgets(model, opened.shape[2]),
            accounting_of(accounting, model),
            guide=guide,
            weights=read_numbers(weights, "--weights", "1,.5") if weights else None,
            folds=folds,
            trials=trials,
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
