"""`ttsnap rewards`: which rewards there are."""

from __future__ import annotations

from typing import Any

from ttsnap.cli.options import AsJson


def rewards(*, json: AsJson = False) -> None:
    """List the rewards: what they judge, where their weights come from, what a look costs.

    Try: ttsnap generate "a corgi" --model DIR --reward imagereward,hpsv2 --report-reward pickscore
    """
    from ttsnap.rewards.catalogue import ENTRIES, OTHERS

    if json:
        import json as format_json

        data = {"rewards": [entry.to_dict() for entry in ENTRIES], "others": [list(other) for other in OTHERS]}
        print(format_json.dumps(data, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    from ttsnap.core.cost import format_amount

    table = Table(show_edge=False, pad_edge=False)
    for name in ("reward", "judges", "weights", "a look", "a prompt", "fp32"):
        side: Any = "right" if name in ("a look", "a prompt", "fp32") else "left"
        table.add_column(name, justify=side, no_wrap=name == "reward", overflow="fold")
    for entry in ENTRIES:
        size = "" if entry.million_parameters is None else f"{entry.million_parameters * 4e6 / 2**30:.3g} GiB"
        look = "in seconds" if entry.look_tflop is None else format_amount(entry.look_tflop, "TFLOP")
        text = format_amount(entry.text_tflop, "TFLOP") if entry.text_tflop else ""
        table.add_row(entry.name, entry.judges, entry.weights, look, text, size)
    console = Console()
    console.print(table)
    for name, what in OTHERS:
        console.print(f"{name}: {what}", highlight=False)
