"""What all tests share."""

from __future__ import annotations

import os
import sys

import pytest

# Tiny tensors gain nothing from a second thread, and lose much where other work runs on the same cores.
# Set before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def ttsnap(monkeypatch, capsys):
    """The command line, run in this process."""
    from ttsnap import cli

    def command(*arguments):
        """What the command prints, and its exit code."""
        monkeypatch.setattr(sys, "argv", ["ttsnap", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return command
