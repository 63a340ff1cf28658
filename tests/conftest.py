"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tiny tensors gain nothing from a second thread, and lose much where other work runs on the same cores.
# Set before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The files that take longest, longest first. They begin first, so that all cores end together (--dist loadfile).
LONGEST = (
    "app/test_page.py",
    "cluster/test_ray.py",
    "cli/test_record.py",
    "pipelines/test_schedulers.py",
    "pipelines/test_sampler.py",
    "rewards/test_counting.py",
    "live/test_forks.py",
    "replay/test_tuning.py",
    "shapes/test_hard_model.py",
    "training/test_loop.py",
    "training/test_judges.py",
    "cli/test_train.py",
    "cli/test_any_model.py",
    "shapes/test_model.py",
    "cli/test_bench.py",
    "cli/test_full_size.py",
)


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture
def ttsnap():
    """The command line, run in this process."""
    from tests import commands

    def command(*arguments):
        """Exit code of the command, and what it prints."""
        done = commands.ttsnap(*arguments)
        return done.returncode, done.stdout, done.stderr

    return command
