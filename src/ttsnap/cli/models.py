"""`ttsnap models`: the supported models, what they cost, and where to start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ttsnap.cli.options import AsJson

if TYPE_CHECKING:
    from ttsnap.pipelines.catalogue import Family


def models(*name: str, json: AsJson = False) -> None:
    """The supported models: memory, cost at full size, a schedule to start with, and a command for each.

    Try: ttsnap models FLUX

    Args:
        name: Tell more about those whose name contains this.
    """
    from ttsnap.pipelines import catalogue

    families = catalogue.find(list(name))
    if json:
        import json as encoder

        print(encoder.dumps([family.to_dict() for family in families], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=None, pad_edge=False)
    shown = [catalogue.HEAD.index(head) for head in ("model", "GB in bf16", "TFLOP 512 px", "1024 px")]
    for column in shown:
        table.add_column(catalogue.HEAD[column])
    table.add_column("look at calls")
    for family, row in zip(families, catalogue.rows(families), strict=True):
        looks = f"{', '.join(map(str, family.looks))} of {family.steps}" if family.looks else "tuned"
        table.add_row(*(row[column] for column in shown), looks)
    console.print(table)
    console.print(
        "TFLOP: one call, with all its passes / one decode. GB: denoiser, text encoders and VAE.", style="dim"
    )
    if not name:
        console.print("More about one, with a command to copy: ttsnap models NAME", style="dim")
        return
    for family in families:
        console.print(f"\n[bold]{family.name}[/bold] ({family.pipeline})")
        facts = [
            f"note: {family.note}" if family.note else "",
            f"steps, guidance and size: {family.source}" if family.source else "",
            ", ".join(f"{way} {gb:.3g} GB" for way, gb in family.memory_gb().items()),
            _origin(family),
        ]
        for fact in facts:
            if fact:
                console.print(fact, markup=False, highlight=False)
        console.print(family.command, markup=False, highlight=False, soft_wrap=True)


def _origin(family: Family) -> str:
    if family.published:
        return f"start with {family.schedule}: the published schedule"
    if not family.rungs:
        return "start with the schedule that was tuned for it; it is the default"
    return f"start with {family.schedule}: a point to start from, not measured on this model"
