"""Memory of one session over an hour of random searches, cancels and forks: it must stay flat within 2 %.

    python benchmarks/soak.py [--minutes 60] [--seed 0] [--out soak.json]

Searches of several policies, some of which fork, of one prompt and of several, with and without previews; a third is
stopped in the middle, and candidates are asked about again afterwards. The first fifth of the time fills the caches.
After it the median resident memory of the first and of the last tenth are compared. Exit code 1 where they differ.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from pathlib import Path

import psutil

from ttsnap.core.observers import Observer, Stop
from ttsnap.live.session import prepare
from ttsnap.policies import (
    BestOfN,
    Branching,
    DraftThenRefine,
    Evolution,
    Restart,
    Steering,
    SuccessiveHalving,
    ZeroOrder,
)

POLICIES = (
    BestOfN(),
    SuccessiveHalving((2, 4), keep=(0.5, 0.5)),
    Branching(),
    Steering(),
    ZeroOrder(),
    Evolution(),
    Restart(),
    DraftThenRefine(),
)
COLOURS, SHAPES = ("red", "green", "blue", "yellow", "cyan"), ("circle", "square", "triangle")
WARM, FLAT = 0.2, 0.02


class Impatient(Observer):
    """Stops a search after so many looks or calls."""

    def __init__(self, after: int) -> None:
        self.left = after

    def called(self, calls: int) -> None:
        self.left -= calls
        if self.left < 0:
            raise Stop


def one(session, chance: random.Random) -> str:
    """A random search; what it was."""
    session.policy, session.candidates = chance.choice(POLICIES), chance.choice((4, 6, 8, 12))
    prompts = [
        f"a {chance.choice(COLOURS)} {chance.choice(SHAPES)} left of a {chance.choice(COLOURS)} {chance.choice(SHAPES)}"
        for _ in range(chance.choice((1, 1, 1, 3)))
    ]
    options = {"seed": chance.randrange(1000), "previews": chance.random() < 0.5}
    if len(prompts) > 1:
        observers = (lambda place: Impatient(chance.randrange(60))) if chance.random() < 0.3 else None
        found = list(session.stream(prompts, observers=observers, **options))
        assert len(found) == len(prompts)
        return "several prompts"
    stopped = chance.random() < 0.33
    search = session.open(prompts, **options)
    search.run(Impatient(chance.randrange(60)) if stopped else None)
    if not stopped and chance.random() < 0.3:
        search.compare()
    search.results(1)
    return "stopped" if stopped else type(session.policy).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chance, me = random.Random(options.seed), psutil.Process()
    session = prepare("shapes", candidates=8, num_inference_steps=6, policy=BestOfN(), report="none")
    start, memory, kinds = time.monotonic(), [], {}
    while (spent := time.monotonic() - start) < 60 * options.minutes:
        kind = one(session, chance)
        kinds[kind] = kinds.get(kind, 0) + 1
        gc.collect()
        memory.append((spent, me.memory_info().rss))
    total = 60 * options.minutes
    warm = [rss for spent, rss in memory if WARM * total <= spent < (WARM + 0.1) * total]
    last = [rss for spent, rss in memory if spent >= 0.9 * total]
    first, end = statistics.median(warm), statistics.median(last)
    grown = end / first - 1
    told = {
        "minutes": options.minutes,
        "searches": sum(kinds.values()),
        "kinds": kinds,
        "MiB after the first fifth": round(first / 2**20, 1),
        "MiB at the end": round(end / 2**20, 1),
        "grown": round(grown, 4),
        "threads": me.num_threads(),
        "open files": me.num_fds(),
    }
    print(json.dumps(told, indent=1))
    if options.out:
        options.out.write_text(json.dumps(told | {"memory": memory}))
    sys.exit(grown > FLAT)


if __name__ == "__main__":
    main()
