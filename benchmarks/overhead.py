"""Time: what the search adds to its model calls, throughput against a plain pipeline loop, start-up, memory.

python benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ttsnap.core.driver import run
from ttsnap.live.engine import Clock, Engine
from ttsnap.live.session import prepare
from ttsnap.shapes.scenes import held_out_prompts

IMAGES = 64
HELP = "import sys; sys.argv = ['ttsnap', '--help']; from ttsnap.cli import main\ntry: main()\nexcept SystemExit: pass"


def seconds(work) -> float:
    """Median of three runs after a warm-up."""
    work()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def command(code: str) -> float:
    """Median time of a fresh process."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table = Table(title=f"Time on this machine, {torch.get_num_threads()} threads")
    for name in ("what", "value"):
        table.add_column(name)
    start = time.perf_counter()
    session = prepare("shapes", candidates=32)
    load = time.perf_counter() - start
    sampler, prompt = session.sampler, held_out_prompts()[0]
    session.block([prompt])
    ratios = []
    for seed in range(9):
        seeds = seed * 100 + np.arange(32)[None]
        clock = Clock()
        grid = Engine(sampler, session.judges, clock=clock).grid([prompt], seeds, previews=True)
        start = time.perf_counter()
        run(session.policy, grid)
        wall = time.perf_counter() - start
        ratios.append(wall / (clock.calls + clock.decodes + clock.looks))
    table.add_row("search wall time / its calls, decodes and looks (32 candidates)", f"{np.median(ratios):.3f}")

    options = {"height": 64, "width": 64, "num_inference_steps": 20, "max_sequence_length": 12, "output_type": "pt"}

    def stock(batch: int):
        def work():
            for start in range(0, IMAGES, batch):
                generators = [torch.Generator("cpu").manual_seed(start + i) for i in range(batch)]
                sampler.pipe([prompt] * batch, generator=generators, **options)

        return work

    def ours():
        sampler.forget_prompts()
        state = sampler.advance(sampler.start([prompt] * IMAGES, list(range(IMAGES))), 20)
        sampler.look(state)

    mine = {}
    for batch in (8, 16, 32, 64):
        sampler.max_batch = batch
        mine[batch] = IMAGES / seconds(ours)
    plain = {batch: IMAGES / seconds(stock(batch)) for batch in (1, 8, 16, 32, 64)}
    best, best_plain = max(mine, key=mine.get), max(plain, key=plain.get)
    table.add_row("pipe(...) in a loop, batch 1", f"{plain[1]:.1f} images/s")
    table.add_row(f"pipe(...) in a loop, best batch ({best_plain})", f"{plain[best_plain]:.1f} images/s")
    table.add_row(f"ttsnap's sampler, best batch ({best})", f"{mine[best]:.1f} images/s")
    table.add_row("ratio to batch 1", f"{mine[best] / plain[1]:.2f}")
    table.add_row("ratio to best batch", f"{mine[best] / plain[best_plain]:.2f}")
    table.add_row("ttsnap --help", f"{command(HELP):.2f} s")
    table.add_row("import ttsnap", f"{command('import ttsnap'):.2f} s")
    table.add_row("import and load everything for a search", f"{load:.1f} s")
    table.add_row("peak memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
