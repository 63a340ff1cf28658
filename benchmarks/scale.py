"""What more workers buy: throughput of 1 and 2, Ray against one process, memory; and 10,000 prompts on many GPUs.

    python benchmarks/scale.py measure [--prompts 64]
    python benchmarks/scale.py simulate [--times times.json] [--call 1.75 --decode .25 --look .1 --load 90]
    python benchmarks/scale.py devices [--times times.json] [--call 1.75 --decode .25 --look .1 --candidates 64]

`measure` records images of the embedded model, each number of workers in a process of its own. It also writes the
seconds of each denoiser call, decode and look of a batch to times.json, from which `simulate` draws: a worker takes a
block when it has finished the last one, as in `ttsnap.cluster.scheduling`, and a block takes the calls, decodes and
looks that its searches need. --call and so on set the mean of a batch in seconds; the spread is always that which was
recorded.

`devices` simulates one prompt on many devices (`--devices`): before every round the candidates that are left are dealt
out anew (`ttsnap.pipelines.replicas.batch_size`), or they stay where they began; rewards run on each device
(`--reward-device each`) or on the first.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil

from ttsnap.cluster.record import Record
from ttsnap.cluster.scheduling import Observer, ThisProcess, execute
from ttsnap.core.grid import Policy
from ttsnap.live.engine import prompts_per_block
from ttsnap.pipelines.replicas import FIXED
from ttsnap.policies import BestOfN, SuccessiveHalving

PUBLISHED = SuccessiveHalving((3, 7, 12), keep=(0.4, 0.4, 0.5))
BATCH, CANDIDATES, STEPS = 32, 32, 20


def load():
    from ttsnap.live.session import load_sampler

    return load_sampler("shapes", max_batch=BATCH)


def describe(sampler):
    return {"model": "shapes"}


class Rate(Observer):
    """Images and prompts per second, from the first event when all workers are loaded to the last event."""

    def __init__(self, pool) -> None:
        self.pool, self.marks = pool, []

    def event(self, worker, event, outcome):
        if self.marks or not hasattr(self.pool, "pids") or len(self.pool.pids()) == self.pool.size:
            self.marks.append((time.perf_counter(), outcome.images, len(outcome.stored)))

    @property
    def value(self) -> tuple[float, float]:
        first, last = np.asarray(self.marks[0]), np.asarray(self.marks[-1])
        return tuple(((last - first)[1:] / (last - first)[0]).tolist())


class Memory(threading.Thread):
    """Peak memory of this process, of the workers and of what Ray starts besides, in MiB.

    Resident memory counts pages that processes share (libraries, Ray's object store) in each of them; PSS counts them
    once, divided among those who map them. The kernel keeps the peak of the former; the latter is read while the run
    goes on.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.peaks: dict[str, float] = defaultdict(float)

    def __enter__(self) -> Memory:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        while not self.over.wait(5):
            shares = defaultdict(float)
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    role = role_of(process)
                    resident, share = high_water(process.pid), process.memory_full_info().pss / 2**20
                except (psutil.Error, OSError, TypeError):
                    continue  # it has just ended
                self.peaks[role, "resident"] = max(self.peaks[role, "resident"], resident)
                shares["ray" if role == "ray" else (role, process.pid)] += share
                shares["all"] += share
            for key, share in shares.items():
                role = key[0] if isinstance(key, tuple) else key
                self.peaks[role, "share"] = max(self.peaks[role, "share"], share)

    def report(self) -> dict[str, float]:
        return {" ".join(key): value for key, value in self.peaks.items()}


def role_of(process: psutil.Process) -> str:
    if process.pid == os.getpid():
        return "driver"
    return "worker" if process.cmdline()[:1] and "_Actor" in process.cmdline()[0] else "ray"


def high_water(pid: int) -> float:
    """The most that a process ever had resident, in MiB, by the kernel's books."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def run_one(options: argparse.Namespace) -> None:
    """Record with so many workers (0: without Ray), and print what was measured as JSON."""
    from ttsnap.shapes.scenes import train_prompts

    prompts = train_prompts()[: options.prompts]
    if options.workers:
        from ttsnap.cluster.ray_pool import RayPool

        pool = RayPool(options.workers)
    else:
        pool = ThisProcess()
    rate = Rate(pool)
    with tempfile.TemporaryDirectory() as folder, Memory() as memory:
        job = Record(load, None, describe, prompts, range(len(prompts)), 8, Path(folder, "tree"), calls=[5, 10, 20])
        execute(job, pool, rate)
    print(json.dumps({"images": rate.value[0], "prompts": rate.value[1], **memory.report()}))


def measured(workers: int, prompts: int) -> dict[str, float]:
    """The same in a process of its own, whose peak memory is that of this run alone."""
    command = [sys.executable, __file__, "one", "--workers", str(workers), "--prompts", str(prompts)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def record_times(path: Path, batches: int = 8) -> None:
    """Seconds of each call, decode and look of a full batch."""
    from ttsnap.live.judging import judge
    from ttsnap.rewards import load as load_rewards

    sampler, (name, reward) = load(), next(iter(load_rewards("shapes").items()))
    prompts = ["a red circle left of a blue square"] * BATCH
    found: dict[str, list[float]] = {"call": [], "decode": [], "look": []}
    for batch in range(batches):
        state = sampler.start(prompts, list(range(batch * BATCH, (batch + 1) * BATCH)))
        for call in range(1, STEPS + 1):
            marks = [time.perf_counter()]
            state = sampler.advance(state, call)
            marks.append(time.perf_counter())
            images = sampler.decode(state.x0)
            marks.append(time.perf_counter())
            judge(name, reward, images, prompts, 0.0)
            marks.append(time.perf_counter())
            for key, seconds in zip(found, np.diff(marks), strict=True):
                found[key].append(float(seconds))
    path.write_text(json.dumps(found))


def measure(options: argparse.Namespace) -> None:
    print("| | images/s | prompts/s | a worker: resident, PSS | driver | Ray's own | all, PSS |")
    print("|---|---|---|---|---|---|---|")
    runs = {workers: measured(workers, options.prompts) for workers in (0, 1, 2)}
    for workers, run in runs.items():
        cells = [
            "-" if f"{role} share" not in run else f"{run[f'{role} resident']:.0f}, {run[f'{role} share']:.0f} MiB"
            for role in ("worker", "driver")
        ]
        cells += [f"{run[f'{role} share']:.0f} MiB" if f"{role} share" in run else "-" for role in ("ray", "all")]
        name = f"Ray, {workers} worker{'s' * (workers > 1)}" if workers else "one process"
        print(f"| {name} | {run['images']:.1f} | {run['prompts']:.2f} | " + " | ".join(cells) + " |")
    alone, one, two = (runs[workers]["images"] for workers in (0, 1, 2))
    print(f"overhead of Ray: {alone / one - 1:.1%}")
    print(f"efficiency of two workers: {two / one / 2:.2f}")
    record_times(options.times)
    found = json.loads(options.times.read_text())
    print("seconds per batch: " + ", ".join(f"{key} {statistics.mean(values):.4f}" for key, values in found.items()))


def block_seconds(prompts: int, times: dict[str, np.ndarray], rng: np.random.Generator) -> float:
    """A block of searches: full batches but for the last of each rung."""
    total, before = 0.0, 0
    for step, size, *_ in PUBLISHED.plan(CANDIDATES, STEPS):
        batches = -(-size * prompts // BATCH)
        total += rng.choice(times["call"], (step - before) * batches).sum()
        total += rng.choice(times["decode"], batches).sum() + rng.choice(times["look"], batches).sum()
        before = step
    return total


def makespan(blocks: list[float], gpus: int, load_seconds: float, event: float) -> float:
    """Seconds until all is done: each GPU loads, then takes the next block; one loop hands out and counts."""
    free = [load_seconds * (1 + 0.2 * (gpu % 7) / 7) for gpu in range(gpus)]  # a shared disk serves some later
    heapq.heapify(free)
    loop = 0.0
    for seconds in blocks:
        start = max(heapq.heappop(free), loop)
        loop = start + event
        heapq.heappush(free, start + event + seconds)
    return max(free)


def scaled(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Recorded seconds of batches, scaled to the means that were asked for; without a record, of no spread."""
    means = {"call": options.call, "decode": options.decode, "look": options.look}
    if options.times.exists():
        recorded = {key: np.asarray(values) for key, values in json.loads(options.times.read_text()).items()}
    else:
        if not all(means.values()):
            raise SystemExit(f"there is no {options.times}; run `measure`, or give --call, --decode and --look")
        print(f"there is no {options.times}: every batch takes its mean")
        recorded = {key: np.ones(1) for key in means}
    return {key: values * (means[key] / values.mean() if means[key] else 1) for key, values in recorded.items()}


def simulate(options: argparse.Namespace) -> None:
    times = scaled(options)
    full = prompts_per_block(PUBLISHED.plan(CANDIDATES, STEPS), BATCH)
    sizes = [full, max(1, full // 4)]
    print(f"{options.prompts} prompts x {CANDIDATES} candidates; blocks of {' and '.join(map(str, sizes))} prompts")
    print("| GPUs | " + " | ".join(f"hours, blocks of {size} | efficiency" for size in sizes) + " |")
    print("|---|" + "---|---|" * len(sizes))
    rng = np.random.default_rng(0)
    work = {size: [block_seconds(size, times, rng) for _ in range(-(-options.prompts // size))] for size in sizes}
    ideal = sum(work[full])
    for gpus in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        cells = []
        for size in sizes:
            # One event per prompt, and one per block, of a few milliseconds each in the loop.
            seconds = makespan(work[size], gpus, options.load, options.event * (size + 1))
            cells.append(f"{seconds / 3600:.3g} | {ideal / gpus / seconds:.0%}")
        print(f"| {gpus} | " + " | ".join(cells) + " |")
    for size in sizes:
        print(f"a block of {size} takes {statistics.mean(work[size]):.0f} s")


def parts_of(count: int) -> list[int]:
    """Sizes of the batches that so many candidates are run in."""
    return [min(BATCH, count - start) for start in range(0, count, BATCH)]


def search_seconds(
    policy: Policy,
    candidates: int,
    devices: int,
    times: dict[str, np.ndarray],
    rng: np.random.Generator,
    *,
    fixed: float,
    rebalanced: bool = True,
    judges: bool = True,
) -> float:
    """One prompt on many devices, round by round: the longest batch of a round is waited for.

    Args:
        policy: decides who is left.
        candidates: of the prompt.
        devices: that share them.
        times: seconds of full batches.
        rng: draws from these.
        fixed: what a batch costs beside its candidates, in the time of one candidate.
        rebalanced: candidates are dealt out anew before every round.
        judges: rewards run on each device, and not on the first alone.
    """
    from ttsnap.pipelines.replicas import batch_size

    def batch(kind: str, size: int) -> float:
        return float(rng.choice(times[kind])) * (fixed + size) / (fixed + BATCH)

    total, before = 0.0, 0
    home = np.arange(candidates) % devices  # where a candidate began
    for step, size, *_ in policy.plan(candidates, STEPS):
        alive = np.sort(rng.permutation(candidates)[:size]) if size < candidates else np.arange(candidates)
        left = np.full(size, step - before)
        while left.max() > 0:
            if rebalanced:
                most = batch_size(left[left > 0].tolist(), devices, BATCH)
                chosen = np.argsort(-left, kind="stable")[: most * devices]
                chosen = chosen[left[chosen] > 0]
                shares = [len(part) for part in np.array_split(chosen, min(devices, -(-len(chosen) // most)))]
            else:
                chosen = np.flatnonzero(left > 0)
                shares = np.bincount(home[alive[chosen]]).tolist()
            left[chosen] -= 1
            total += max(sum(batch("call", part) for part in parts_of(share)) for share in shares)
        each = -(-size // devices)
        total += sum(batch("decode", part) for part in parts_of(each))
        total += sum(batch("look", part) for part in parts_of(each if judges else size))
        before = step
    return total


def simulate_devices(options: argparse.Namespace) -> None:
    times, count = scaled(options), options.candidates
    ways = {
        "published schedule, rewards on each": (PUBLISHED, {}),
        "on the first": (PUBLISHED, {"judges": False}),
        "on the first, candidates stay where they began": (PUBLISHED, {"judges": False, "rebalanced": False}),
        "half of them kept each time, rewards on each": (SuccessiveHalving(PUBLISHED.rungs, keep=(0.5,) * 3), {}),
        "best-of-N, rewards on each": (BestOfN(), {}),
    }
    fixed = options.fixed
    print(
        f"one prompt, {count} candidates, {STEPS} calls; a batch costs as much as its candidates and {fixed:g} of one"
    )
    print("| devices | " + " | ".join(f"{way}: seconds | efficiency" for way in ways) + " |")
    print("|---|" + "---|---|" * len(ways))
    alone: dict[Policy, float] = {}
    for devices in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        cells = []
        for policy, how in ways.values():
            rng = np.random.default_rng(0)
            works = [search_seconds(policy, count, devices, times, rng, fixed=fixed, **how) for _ in range(20)]
            alone.setdefault(policy, statistics.mean(works))
            cells.append(f"{statistics.mean(works):.2f} | {alone[policy] / devices / statistics.mean(works):.0%}")
        print(f"| {devices} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "simulate", "devices", "one"])
    parser.add_argument("--times", type=Path, default=Path("times.json"))
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--workers", type=int, default=0, help="of `one`, a single run; 0: without Ray")
    for name in ("call", "decode", "look"):
        parser.add_argument(f"--{name}", type=float, help="mean seconds of a batch of 32")
    parser.add_argument("--candidates", type=int, default=64, help="of `devices`")
    parser.add_argument(
        "--fixed", type=float, default=FIXED, help="of `devices`: of a batch, in the time of a candidate"
    )
    parser.add_argument("--load", type=float, default=90.0, help="seconds to load a model")
    parser.add_argument("--event", type=float, default=0.004, help="seconds of the loop per event")
    options = parser.parse_args()
    options.prompts = options.prompts or (10_000 if options.what == "simulate" else 64)
    {"measure": measure, "simulate": simulate, "devices": simulate_devices, "one": run_one}[options.what](options)


if __name__ == "__main__":
    main()
