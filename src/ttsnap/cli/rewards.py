"""`ttsnap rewards`: which rewards there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ttsnap.cli.options import AsJson

if TYPE_CHECKING:
    from ttsnap.rewards.catalogue import Entry


def rewards(*, json: AsJson = False) -> None:
    """List the rewards: what they judge, licence, size, what a look costs, where their weights are looked for.

    Try: ttsnap generate "a corgi" --model DIR --reward imagereward,hpsv2 --report-reward pickscore
    """
    from ttsnap.rewards.catalogue import ENTRIES, OTHERS

    if json:
        import json as format_json

        entries = [entry.to_dict() | {"here": _here(entry)} for entry in ENTRIES]
        print(format_json.dumps({"rewards": entries, "others": [list(other) for other in OTHERS]}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    from ttsnap.core.cost import format_amount

    console, table = Console(), Table(show_edge=False, pad_edge=False)
    wide = console.width >= 160  # else all of a reward stands in one column
    columns = ("reward", "judges", "memory", "a look", "a prompt", "licence", "looked for")
    for name in columns if wide else ("reward", "judges; memory; cost; licence; looked for"):
        numbers = name in ("memory", "a look", "a prompt")
        table.add_column(name, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    for entry in ENTRIES:
        size = "" if not entry.gib else f"{entry.gib:.3g} GiB" if entry.gib >= 0.01 else f"{entry.gib * 1024:.2g} MiB"
        look = "in seconds" if entry.look_tflop is None else format_amount(entry.look_tflop, "TFLOP")
        text = format_amount(entry.text_tflop, "TFLOP") if entry.text_tflop else ""
        here = _here(entry)
        place = entry.weights if here is None else f"{entry.weights}, here: {here}"
        if wide:
            table.add_row(entry.name, entry.judges, size, look, text, entry.licence, place)
            continue
        cost = f"a look {look}" + f", a prompt {text}" * bool(text)
        table.add_row(
            entry.name, "\n".join([entry.judges, "; ".join(filter(None, [size, cost, entry.licence])), place])
        )
    console.print(table)
    console.print(f"hub weights are looked for in {_cache()}, then downloaded", highlight=False, soft_wrap=True)
    for name, what in OTHERS:
        console.print(f"{name}: {what}", highlight=False)


def _here(entry: Entry) -> str | None:
    """The file with the weights in the hub's cache; None if there is none, or the reward needs none."""
    from ttsnap.rewards.sources import SOURCES

    source = SOURCES.get(entry.name)
    try:
        found = source.cached() if source else None
    except ImportError:
        return None
    return str(found) if found else None


def _cache() -> str:
    """The hub's cache."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return "the hub's cache (extra diffusion)"
    return str(HF_HUB_CACHE)
