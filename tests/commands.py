"""The command line, run in this process: the same as in one of its own, without the seconds that one takes to load."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
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


def in_ranks(
    command: Sequence[object], count: int = 2, timeout: float = 300, **env: str
) -> list[CompletedProcess[str]]:
    """A command in so many processes that work together, as `torchrun` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **env}
    typed, root = list(map(str, command)), Path(__file__).parents[1]
    ranks = [
        Popen(
            typed,
            cwd=root,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=PIPE,
            stderr=PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [rank.communicate(timeout=timeout) for rank in ranks]
    return [CompletedProcess(typed, rank.returncode, *one) for rank, one in zip(ranks, said, strict=True)]
