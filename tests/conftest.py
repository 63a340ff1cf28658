"""What all tests share."""

from __future__ import annotations

import os

import pytest

# Tiny tensors gain nothing from a second thread, and lose much where other work runs on the same cores.
# Set before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def ttsnap():
    """The command line, run in this process."""
    from tests import commands

    def command(*arguments):
        """Exit code of the command, and what it prints."""
        done = commands.ttsnap(*arguments)
        return done.returncode, done.stdout, done.stderr

    return command
