"""`ttsnap simulate`: policies at equal cost on recorded rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ttsnap.cli.options import Accounting, AsJson, CallTflop, CostModelName, LookTflop, RecordingPath, Weights

_POLICIES, _COST, _OUTPUT = "Policies", "Cost", "Output"


def simulate(
    recording: RecordingPath,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="halving, early-selection, or a policy FILE.json; several by repeating (default: halving).",
            rich_help_panel=_POLICIES,
        ),
    ] = None,
    rungs: Annotated[
        str | None,
        typer.Option(help="Another halving: steps at which to look, such as 3,7,12.", rich_help_panel=_POLICIES),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Share that survives each look, such as .4,.4,.5.", rich_help_panel=_POLICIES)
    ] = None,
    guide: Annotated[
        str | None,
        typer.Option(
            help="What policies see: aware (noise-aware rewards, clean where there are none), clean, or both "
            "(default: what is recorded).",
            rich_help_panel=_POLICIES,
        ),
    ] = None,
    weights: Weights = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            "--budgets",
            "--budget",
            help="400:4000:200TFLOP, or 500TFLOP,2000TFLOP; also NFE (default: best-of-2 to best-of-20).",
            rich_help_panel=_COST,
        ),
    ] = None,
    accounting: Accounting = "calls",
    cost_model: CostModelName = None,
    call_tflop: CallTflop = None,
    look_tflop: LookTflop = None,
    trials: Annotated[int, typer.Option(help="Draws of candidates per prompt, the same for all policies.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    plots: Annotated[
        Path | None, typer.Option(help="Write the pictures (PNG and SVG) into this folder.", rich_help_panel=_OUTPUT)
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the whole table here.", rich_help_panel=_OUTPUT)] = None,
    json: AsJson = False,
) -> None:
    """Replay policies on recorded rewards and compare them with best-of-N at equal cost.

    Try: ttsnap simulate flux.zarr --plots plots/
    """
    from ttsnap.cli.simulating import Request, execute

    execute(
        Request(
            recording=recording,
            policies=policy or [],
            rungs=rungs,
            keep=keep,
            guide=guide,
            weights=weights,
            budgets=budgets,
            accounting=accounting,
            cost_model=cost_model,
            call_tflop=call_tflop,
            look_tflop=look_tflop,
            trials=trials,
            seed=seed,
            plots=plots,
            csv=csv,
        ),
        as_json=json,
    )
