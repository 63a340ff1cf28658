"""The command line. Each verb is one module here; it parses, calls the library and shows.

Verb modules import nothing heavy at the top, so that `ttsnap --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import ttsnap
from ttsnap.cli.app import open_page
from ttsnap.cli.generate import generate
from ttsnap.cli.import_values import import_values
from ttsnap.cli.label import label
from ttsnap.cli.models import models
from ttsnap.cli.record import record
from ttsnap.cli.rewards import rewards
from ttsnap.cli.simulate import simulate
from ttsnap.cli.train import train
from ttsnap.cli.tune import tune

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A better picture for the same compute: start many candidates, look early, drop the poor, finish the best.",
)
app.command()(generate)
app.command()(record)
app.command()(label)
app.command()(train)
app.command("import-values")(import_values)
app.command()(simulate)
app.command()(tune)
app.command()(models)
app.command()(rewards)
app.command("app")(open_page)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"ttsnap {ttsnap.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of ttsnap itself."""


def main() -> None:
    """Entry point: errors of use are one sentence on stderr and exit code 2, never a traceback.

    Set TTSNAP_DEBUG=1 to see the traceback.
    """
    try:
        app()
    except (ValueError, OSError, ModuleNotFoundError, RecursionError) as error:
        if os.environ.get("TTSNAP_DEBUG"):
            raise
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        print("error: " + explain(error), file=sys.stderr)
        sys.exit(2)


_EXTRAS = {"gradio": "app", "peft": "train", "accelerate": "train"}
_EXTRAS |= dict.fromkeys(("ray", "fsspec", "s3fs"), "cluster")


def explain(error: Exception) -> str:
    """One sentence for an error; a missing extra names its install command."""
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get(error.name or "")
        extra = extra or (
            "replay" if error.name in ("xarray", "zarr", "scipy", "pandas", "optuna", "yaml") else "diffusion"
        )
        return f"{error.name} is not installed; it comes with: pip install 'ttsnap[{extra}]'"
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())
