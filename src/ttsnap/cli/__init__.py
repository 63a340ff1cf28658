"""The command line. Each verb is one module here; it parses, calls the library and shows.

Verb modules import nothing heavy at the top, so that `ttsnap --help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import tomllib
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.config import Dict

import ttsnap
from ttsnap.cli import from_picture, verbosity
from ttsnap.core.errors import explain

SETTINGS_FILE = "ttsnap.toml"

commands = App(
    name="ttsnap",
    help="A better picture for the same compute: start many candidates, look early, drop the poor, finish the best.",
    version=f"ttsnap {ttsnap.__version__}",
    help_format="plaintext",
    result_action="return_value",
    default_parameter=Parameter(negative=(), show_default=False),
)
VERBS = {  # function, loaded when it is called; its arguments; what it does
    "generate": ("generate:generate", "[PROMPT ...]", "Find the best image for a prompt under a compute budget."),
    "score": (
        "score:score",
        "SOURCE ...",
        "Judge pictures that are there already: a table, a CSV file, a contact sheet, copies of the best.",
    ),
    "show": ("show:show", "FILE ...", "What a picture says of how it was made: prompt, settings, reward, cost."),
    "record": (
        "record:record",
        "[PROMPT ...] --out FILE",
        "Sample candidates and record every x0 estimate: its image, or with --reward what it is worth.",
    ),
    "label": (
        "label:label",
        "TREE OUT",
        "Judge the images of a tree into a recording, which simulate, tune and train read.",
    ),
    "train": (
        "train:train",
        "[TREE [LABELS]] --out DIR",
        "Train a reward to foretell, from noisy x0 estimates, what the finished image will be worth (TTSnap).",
    ),
    "import-values": (
        "import_values:import_values",
        "FOLDER OUT",
        "Read published reward values ({model}_{reward}_val_{base|naft}) into one recording.",
    ),
    "simulate": (
        "simulate:simulate",
        "RECORDING",
        "Replay policies on recorded rewards and compare them with best-of-N at equal cost.",
    ),
    "tune": (
        "tune:tune",
        "[RECORDING]",
        "Find the best schedule for a budget or a range of budgets, and say what it is worth on held-out prompts.",
    ),
    "bench": (
        "bench:bench",
        "[PROMPT ...]",
        "Compare policies at equal cost on a model of one's own, or measure which early look is worth its cost.",
    ),
    "app": (
        "app:open_page",
        "",
        "Open a page on this machine: watch the search, pick by hand, compare policies, explore recordings.",
    ),
    "serve": (
        "serve:serve",
        "",
        "Serve pictures as OpenAI's images API does, each the best that a search found.",
    ),
    "models": (
        "models:models",
        "[NAME ...]",
        "The supported models: memory, cost at full size, a schedule to start with, and a command for each.",
    ),
    "rewards": (
        "rewards:rewards",
        "",
        "List the rewards: what they judge, licence, size, what a look costs, where their weights are looked for.",
    ),
}
for place, (name, (function, arguments, summary)) in enumerate(VERBS.items()):
    usage = f"Usage: ttsnap {name} {arguments}".rstrip() + " [OPTIONS]"  # to find it out takes a tenth of a second
    commands.command(f"ttsnap.cli.{function}", name=name, help=summary, sort_key=place, usage=usage)
commands.register_install_completion_command()
commands.meta.group_parameters = Group("Options of every verb", sort_key=9)


@commands.meta.default
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
    verbosity.debug = debug
    verbosity.level = verbose - quiet
    file, given = settings or Path(SETTINGS_FILE), Dict({})
    if settings is not None and not settings.is_file():
        raise ValueError(f"there is no settings file {settings}")
    if file.is_file():
        try:
            given = Dict(tomllib.loads(file.read_text(encoding="utf-8")), source=str(file))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"the settings file {file} is not valid TOML: {error}") from error
    commands.config = from_picture.Defaults(given)
    if tokens and tokens[0] in VERBS:
        commands[tokens[0]].help = None  # its own docstring tells more than the line in the list
    try:
        commands(tokens, exit_on_error=False, print_error=False)
    finally:
        commands.config = None


def main() -> None:
    """Entry point: errors of use are one sentence on stderr and exit code 2, never a traceback.

    `--debug` or TTSNAP_DEBUG=1 shows it. SIGTERM, as schedulers send it before they kill, is taken for Ctrl-C.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main_thread else None
    try:
        commands.meta(sys.argv[1:], exit_on_error=False, print_error=False)
    except KeyboardInterrupt:
        print("stopped: nothing was kept, the same command begins again", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError, CycloptsError) as error:
        if verbosity.debug or os.environ.get("TTSNAP_DEBUG"):
            raise
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        print("error: " + explain(error), file=sys.stderr)
        sys.exit(2)
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)
