"""`ttsnap simulate`: policies at equal cost on recorded rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_POLICIES, _COST, _OUTPUT = "Policies", "Cost", "Output"


def simulate(
    recording: Annotated[Path, typer.Argument(help="A recording (see import-values and record).")],
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
    weights: Annotated[
        str | None,
        typer.Option(help="Weights of several rewards, such as 1,.5 (default: rank sum).", rich_help_panel=_POLICIES),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="400:4000:200TFLOP, or 500TFLOP,2000TFLOP; also NFE (default: best-of-2 to best-of-20).",
            rich_help_panel=_COST,
        ),
    ] = None,
    accounting: Annotated[
        str,
        typer.Option(help="calls: everything counts; published: as the TTSnap authors charge.", rich_help_panel=_COST),
    ] = "calls",
    cost_model: Annotated[
        str | None,
        typer.Option(
            help="flux-512, flux-512-counted, flux-1024, sdxl-512, sdxl-1024 (default: as recorded).",
            rich_help_panel=_COST,
        ),
    ] = None,
    call_tflop: Annotated[float | None, typer.Option(help="Or: TFLOP of one call ...", rich_help_panel=_COST)] = None,
    look_tflop: Annotated[
        float | None, typer.Option(help="... and of one look, decode included.", rich_help_panel=_COST)
    ] = None,
    trials: Annotated[int, typer.Option(help="Draws of candidates per prompt, the same for all policies.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    plots: Annotated[
        Path | None, typer.Option(help="Write the pictures (PNG and SVG) into this folder.", rich_help_panel=_OUTPUT)
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the whole table here.", rich_help_panel=_OUTPUT)] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.", rich_help_panel=_OUTPUT)
    ] = False,
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
