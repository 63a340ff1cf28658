"""The command line, run in this process: the same as in one of its own, without the seconds that one takes to load."""

from __future__ import annotations

import contextlib
import io
import sys
from subprocess import CompletedProcess
from unittest.mock import patch

from ttsnap import cli


def ttsnap(*arguments: object) -> CompletedProcess[str]:
    """What the command prints, and its exit code."""
    typed = ["ttsnap", *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), patch.object(sys, "argv", typed):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
    return CompletedProcess(typed, code, out.getvalue(), err.getvalue())
