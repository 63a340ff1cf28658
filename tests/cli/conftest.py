"""The command line, run in this process."""

from __future__ import annotations

import sys

import pytest

from ttsnap import cli


@pytest.fixture
def ttsnap(monkeypatch, capsys):
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
