"""What `ttsnap train` does once its options are understood."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ttsnap.cli.options import read_calls
from ttsnap.cli.progress import ImageProgress

if TYPE_CHECKING:
    from ttsnap.training import Report


def read_levels(text: str | None) -> list[int] | None:
    """Calls such as `12,9,6`, or `15:1` for all from 15 down to 1."""
    if text is None or ":" not in text:
        return _named(text)
    first, _, last = text.partition(":")
    if not first.isdigit() or not last.isdigit():
        raise ValueError(f"--levels takes calls such as 15:1 or 12,9,6, got {text!r}")
    low, high = sorted((int(first), int(last)))
    return list(range(high, low - 1, -1))


def _named(text: str | None) -> list[int] | None:
    try:
        return read_calls(text)
    except ValueError:
        raise ValueError(f"--levels takes calls such as 15:1 or 12,9,6, got {text!r}") from None


def execute(
    given: Mapping[str, Any], more: list[str], config: Path | None, out: Path, *, cpu: bool, as_json: bool
) -> None:
    """Train what is not trained yet, and report."""
    from ttsnap.training.config import Config, read_config

    values = read_config(config) if config else {}
    for setting in more:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, such as preference=1, got {setting!r}")
        values[name.strip()] = value.strip()
    for name, value in given.items():
        if value is not None:
            values[name] = str(value) if isinstance(value, Path) else value
    resolved = Config.of(values)
    from ttsnap.training import train

    silent = as_json or os.environ.get("RANK", "0") != "0"
    with ImageProgress("training", quiet=silent) as progress:
        try:
            report = train(resolved, out, cpu=cpu, on_start=progress.start, on_images=progress.advance)
        except KeyboardInterrupt:
            print(f"stopped: the same command goes on from its last checkpoint ({out})", file=sys.stderr)
            raise typer.Exit(130) from None
    if not report.main:
        return
    if as_json:
        plain = {name: value for name, value in asdict(report).items() if name not in ("main", "levels")}
        plain |= {"out": str(out), "levels": [level._asdict() for level in report.levels], **progress.report()}
        typer.echo(json.dumps(plain, indent=1))
        return
    _show(report, progress)


def _show(report: Report, progress: ImageProgress) -> None:
    from rich.console import Console
    from rich.table import Table

    levels = report.levels
    typer.echo(
        f"{report.out}: {len(levels)} noise levels, calls {levels[0].call} to {levels[-1].call}; {report.method}, "
        f"{report.parameters:,} parameters, {report.prompts} prompts"
    )
    typer.echo(progress.summary() if progress.images else "it was complete already; nothing was trained again.")
    if "after" not in report.evaluation:
        return
    table = Table("call", "Kendall tau", "MSE", "best kept at 25 %", "reward lost at 25 %", box=None)
    names = ("kendall_tau", "mse", "top_accuracy_25", "top_gap_25")
    before, after = report.evaluation["before"], report.evaluation["after"]
    for call in sorted(after, key=int):
        cells = [f"{_number(before[call][name])} -> {_number(after[call][name])}" for name in names]
        table.add_row(call, *cells)
    Console().print(table)
    typer.echo(f"on held-out prompts, clean -> noise-aware; all in {report.out / 'evaluation.json'}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
