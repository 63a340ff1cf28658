"""Replay: against the plain algorithm on the same draws, and how it grows; import and opening times.

    python benchmarks/replay.py                        # the published sweep, on made-up rewards of the same size
    python benchmarks/replay.py --values ../shared/ttsnap_values     # on the published values, import included
    python benchmarks/replay.py --scale                # up to 2000 prompts x 1000 candidates x 50 steps

The plain algorithm is a Python loop over trials and prompts with boolean masks.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ttsnap.core.cost import NAMED_COST_MODELS, parse_budgets
from ttsnap.policies import BestOfN, SuccessiveHalving
from ttsnap.recordings import Recording
from ttsnap.replay import Contender, EveryCall, simulate
from ttsnap.replay.simulator import draw

HALVING = SuccessiveHalving((3, 7, 12), (0.4, 0.4, 0.5))
FIELD = [Contender("best-of-N", BestOfN()), Contender("halving", HALVING)]
CHARGE = EveryCall(NAMED_COST_MODELS["flux-512"])
SCALES = ((200, 200, 20, 50), (500, 200, 20, 50), (200, 1000, 20, 50), (200, 200, 20, 500), (2000, 1000, 50, 50))


def made_up(path: Path, prompts: int, candidates: int, steps: int) -> Recording:
    """A recording whose looks say more with every step."""
    made = Recording.create(
        path,
        prompts=[str(p) for p in range(prompts)],
        num_candidates=candidates,
        num_steps=steps,
        rewards=["reward"],
        whole=True,
    )
    fading = (steps / np.arange(1, steps + 1) - 1).astype(np.float32)
    rng = np.random.default_rng(0)
    for start in range(0, prompts, 100):
        size = (min(100, prompts - start), candidates, steps)
        values = rng.standard_normal(size, dtype=np.float32) * fading
        values += rng.standard_normal((*size[:2], 1), dtype=np.float32)
        made.write(slice(start, start + size[0]), values[..., None])
    return Recording.open(path)


def plainly(recording: Recording, budgets, trials: int) -> np.ndarray:
    """Mean reward [policies, budgets] by a loop over prompts and trials with boolean masks, same draws."""
    guide = recording.guide("aware")[..., 0].astype(np.float64)
    prompts, pool, steps = guide.shape
    result = np.zeros((len(FIELD), len(budgets)))
    for p, contender in enumerate(FIELD):
        for b, budget in enumerate(budgets):
            n = CHARGE.candidates(contender.policy, budget, steps)
            plan = contender.policy.plan(n, steps)
            total = 0.0
            for prompt in range(prompts):
                for drawn in draw([prompt], pool, trials, n, 0)[0]:
                    rewards = guide[prompt, drawn]
                    alive = np.ones(n, dtype=bool)
                    for rung, following in itertools.pairwise(plan):
                        values = np.where(alive, rewards[:, rung.step - 1], -np.inf)
                        kept = np.argsort(-values, kind="stable")[: following.size]
                        alive = np.zeros(n, dtype=bool)
                        alive[kept] = True
                    total += rewards[alive, -1].max()
            result[p, b] = total / (prompts * trials)
    return result


def timed(work):
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def sweep(values: Path | None, reward: str) -> None:
    """19 budgets x 50 trials x 2 policies, both ways."""
    table = Table(title="19 budgets x 50 trials x 2 policies, same draws")
    for name in ("what", "seconds", "ratio"):
        table.add_column(name, justify="right" if name != "what" else "left")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording.zarr"
        if values:
            from ttsnap.recordings.published_values import import_values

            _, seconds = timed(lambda: import_values(values, path, rewards=[reward]))
            table.add_row(f"import-values, {reward}, one core", f"{seconds:.2f}", "")
        else:
            made_up(path, 200, 200, 20)
        recording, seconds = timed(lambda: Recording.open(path))
        table.add_row("open and check the recording", f"{seconds:.3f}", "")
        budgets = parse_budgets("400:4000:200TFLOP")
        simulate(recording, FIELD, budgets[:2], CHARGE, trials=2)  # imports
        ours, fast = timed(lambda: simulate(recording, FIELD, budgets, CHARGE, trials=50).dataset)
        plain, slow = timed(lambda: plainly(recording, budgets, 50))
        table.add_row("the plain loop", f"{slow:.1f}", "1")
        table.add_row("ttsnap.replay.simulate", f"{fast:.2f}", f"{slow / fast:.1f}")
        mean, std = recording.scales.get(recording.rewards[0], (0.0, 1.0))
        difference = np.abs(ours.value.values.mean(axis=(2, 3)) * std + mean - plain).max()
        table.add_row("largest difference of a mean reward", f"{difference:.1e}", "")
    Console().print(table)


def grow(prompts: int, candidates: int, steps: int, trials: int) -> None:
    """One size, in a process of its own: seconds and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        recording = made_up(Path(folder) / "recording.zarr", prompts, candidates, steps)
        model = CHARGE.model
        one = model.of_plan(BestOfN().plan(1, steps)).tflop
        budgets = parse_budgets(f"{2 * one}:{candidates / 4 * one}:{candidates / 40 * one}TFLOP")
        _, seconds = timed(lambda: simulate(recording, FIELD, budgets, CHARGE, trials=trials))
        print(len(budgets), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def scale() -> None:
    """Seconds and memory against the size."""
    table = Table(title="Growth: 2 policies x the budgets of best-of-2 to best-of-(candidates/4)")
    for name in ("prompts", "candidates", "steps", "trials", "budgets", "seconds", "peak GiB"):
        table.add_column(name, justify="right")
    for size in SCALES:
        command = [sys.executable, __file__, "--one", ",".join(map(str, size))]
        budgets, seconds, memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        table.add_row(*map(str, size), budgets, f"{float(seconds):.1f}", f"{float(memory):.2f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=Path, help="folder of published values")
    parser.add_argument("--reward", default="hps")
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        grow(*map(int, a.one.split(",")))
    elif a.scale:
        scale()
    else:
        sweep(a.values, a.reward)


if __name__ == "__main__":
    main()
