"""`ttsnap show`: what pictures say of how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ttsnap.cli.options import AsJson

if TYPE_CHECKING:
    from ttsnap.files.metadata import Metadata


def show(*file: Path, json: AsJson = False) -> None:
    """What a picture says of how it was made: prompt, settings, reward, cost.

    Pictures of AUTOMATIC1111 and of programs that write as it does are read, too.

    Try: ttsnap show out/best.png

    Args:
        file: Pictures: PNG, JPEG or WebP.
    """
    from ttsnap.files import metadata

    if not file:
        raise ValueError("name a picture, such as: ttsnap show out/best.png")
    found = [(path, metadata.read(path)) for path in file]
    if json:
        import json as encoder

        whole = [{"file": str(path), **says.to_dict()} for path, says in found]
        print(encoder.dumps(whole[0] if len(whole) == 1 else whole, indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for path, says in found:
        if len(found) > 1:
            console.print(Text(str(path), style="bold"))
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in _rows(says).items():
            table.add_row(name, Text(value))
        console.print(table)


def _rows(says: Metadata) -> dict[str, str]:
    """What is shown, by name."""
    import json

    from ttsnap.core.cost import format_amount

    parameters, own = says.parameters, says.own
    rows = {"prompt": parameters.prompt or (own or {}).get("prompt", "")}
    if parameters.negative:
        rows["negative prompt"] = parameters.negative
    rows |= {name[0].lower() + name[1:] if name[1:2].islower() else name: v for name, v in parameters.fields.items()}
    if own is None:
        return rows
    cost = own.get("cost", {})
    rewards = ", ".join(f"{name} {value:.3f}" for name, value in own.get("rewards", {}).items())
    rows["reward"] = f"{rewards}; rank {own.get('rank')} of {own.get('finished')} finished"
    rows["cost"] = f"{cost.get('nfe')} NFE, {format_amount(cost.get('tflop', 0.0), 'TFLOP')}, {cost.get('looks')} looks"
    for ancestor in own.get("lineage", ()):
        child, parent, step = ancestor["seed"], ancestor["parent"], ancestor["step"]
        rows[f"seed {child}"] = f"forked from {parent} after call {step}, by {ancestor['angle']:g} degrees"
    for name, value in own.get("settings", {}).items():
        if name not in ("model", "steps", "negative_prompt"):
            rows[f"--{name.replace('_', '-')}"] = value if isinstance(value, str) else json.dumps(value)
    if own.get("local"):
        rows["to name again"] = ", ".join(own["local"])
    return rows
