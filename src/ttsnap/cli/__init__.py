"""The command line. Each verb is one module here; it parses, calls the library and shows.

Verb modules import nothing heavy at the top, so that `ttsnap --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.config import Dict

import ttsnap
from ttsnap.cli import options
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
from ttsnap.core.errors import explain

SETTINGS_FILE = "ttsnap.toml"

app = App(
    name="ttsnap",
    help="A better picture for the same compute: start many candidates, look early, drop the poor, finish the best.",
    version=f"ttsnap {ttsnap.__version__}",
    help_format="plaintext",
    result_action="return_value",
    default_parameter=Parameter(negative=(), show_default=False),
)
VERBS: tuple[tuple[str, Callable[..., None]], ...] = (
    ("generate", generate),
    ("record", record),
    ("label", label),
    ("train", train),
    ("import-values", import_values),
    ("simulate", simulate),
    ("tune", tune),
    ("app", open_page),
    ("models", models),
    ("rewards", rewards),
)
for place, (name, verb) in enumerate(VERBS):
    app.command(verb, name=name, sort_key=place)
app.register_install_completion_command()
app.meta.group_parameters = Group("Options of every verb", sort_key=9)


@app.meta.default
def run(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    settings: Path | None = None,
    quiet: Annotated[bool, Parameter(name=("--quiet", "-q"))] = False,
    verbose: Annotated[bool, Parameter(name=("--verbose", "-v"))] = False,
    debug: bool = False,
) -> None:
    """Run a verb.

    Args:
        settings: A TOML file with options, a table per verb such as [generate] (default: ttsnap.toml, if it is there).
        quiet: No progress and no notes.
        verbose: Also what diffusers and transformers have to say.
        debug: Show the traceback of an error.
    """
    options.debug = debug
    options.verbosity = verbose - quiet
    file = settings or Path(SETTINGS_FILE)
    if settings is not None and not settings.is_file():
        raise ValueError(f"there is no settings file {settings}")
    if file.is_file():
        try:
            app.config = Dict(tomllib.loads(file.read_text(encoding="utf-8")), source=str(file))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"the settings file {file} is not valid TOML: {error}") from error
    try:
        app(tokens, exit_on_error=False, print_error=False)
    finally:
        app.config = None


def main() -> None:
    """Entry point: errors of use are one sentence on stderr and exit code 2, never a traceback.

    `--debug` or TTSNAP_DEBUG=1 shows it.
    """
    try:
        app.meta(sys.argv[1:], exit_on_error=False, print_error=False)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError, MemoryError, CycloptsError) as error:
        if options.debug or os.environ.get("TTSNAP_DEBUG"):
            raise
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        print("error: " + explain(error), file=sys.stderr)
        sys.exit(2)
