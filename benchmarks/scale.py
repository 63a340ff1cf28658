"""What more workers buy: throughput of 1 and 2, Ray against one process, memory; and 10,000 prompts on many GPUs.

    python benchmarks/scale.py measure [--prompts 64]
    python benchmarks/scale.py simulate [--times times.json] [--call 1.75 --decode .25 --look .1 --load 90]

`measure` records images of the embedded model. It also writes the seconds of each denoiser call, decode and look of a
batch to times.json, from which `simulate` draws: a worker takes a block when it has finished the last one, as in
`ttsnap.cluster.scheduling`, and a block takes the calls, decodes and looks that its searches need. --call and so on set
the mean of a batch in seconds; the spread is always that which was recorded.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from ttsnap.cluster.record import Record
from ttsnap.cluster.scheduling import Observer, ThisProcess, execute
from ttsnap.environments.queue import prompts_per_block
from ttsnap.policies import SuccessiveHalving

PUBLISHED = SuccessiveHalving((3, 7, 12), keep=(0.4, 0.4, 0.5))
BATCH, CANDIDATES, STEPS = 32, 32, 20


def load():
    from ttsnap.generation import load_sampler

    return load_sampler("shapes", max_batch=BATCH)


def describe(sampler):
    return {"model": "shapes"}


class Rate(Observer):
    """Images per second from the first event to the last, when all workers were loaded, and the workers' memory."""

    def __init__(self) -> None:
        self.pool, self.times, self.images, self.memory = None, [], [], 0.0

    def event(self, worker, event, outcome):
        self.times.append(time.perf_counter())
        self.images.append(outcome.images)
        if self.pool is not None and len(self.times) % 50 == 0:
            self.memory = max([self.memory, *(resident(pid) for pid in self.pool.pids().values())])

    @property
    def value(self) -> float:
        start = len(self.times) // 5
        return (self.images[-1] - self.images[start]) / (self.times[-1] - self.times[start])


def resident(pid: int) -> float:
    """MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def throughput(workers: int | None, count: int) -> Rate:
    from ttsnap.shapes.scenes import train_prompts

    rate = Rate()
    with tempfile.TemporaryDirectory() as folder:
        prompts = train_prompts()[:count]
        job = Record(load, None, describe, prompts, range(count), 8, Path(folder, "tree"), calls=[5, 10, 20])
        if workers is None:
            pool = ThisProcess()
        else:
            from ttsnap.cluster.ray_pool import RayPool

            pool = rate.pool = RayPool(workers)
        execute(job, pool, rate)
    if workers is None:
        rate.memory = resident(os.getpid())
    return rate


def record_times(path: Path, batches: int = 8) -> None:
    """Seconds of each call, decode and look of a full batch."""
    from ttsnap.environments.live import judge
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
    alone = throughput(None, options.prompts)
    print(f"one process: {alone.value:.1f} images/s, {alone.memory:.0f} MiB")
    one, two = throughput(1, options.prompts), throughput(2, options.prompts)
    for workers, rate in ((1, one), (2, two)):
        print(f"{workers} workers: {rate.value:.1f} images/s, {rate.memory:.0f} MiB each")
    print(f"overhead of Ray: {alone.value / one.value - 1:.1%}")
    print(f"efficiency of two workers: {two.value / one.value / 2:.2f}")
    record_times(options.times)
    found = json.loads(options.times.read_text())
    print("seconds per batch: " + ", ".join(f"{key} {statistics.mean(values):.4f}" for key, values in found.items()))


def block_seconds(prompts: int, times: dict[str, np.ndarray], rng: np.random.Generator) -> float:
    """A block of searches: full batches but for the last of each rung."""
    total, before = 0.0, 0
    for step, size in PUBLISHED.plan(CANDIDATES, STEPS):
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


def simulate(options: argparse.Namespace) -> None:
    recorded = {key: np.asarray(values) for key, values in json.loads(options.times.read_text()).items()}
    means = {"call": options.call, "decode": options.decode, "look": options.look}
    times = {key: values * (means[key] / values.mean() if means[key] else 1) for key, values in recorded.items()}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "simulate"])
    parser.add_argument("--times", type=Path, default=Path("times.json"))
    parser.add_argument("--prompts", type=int)
    for name in ("call", "decode", "look"):
        parser.add_argument(f"--{name}", type=float, help="mean seconds of a batch of 32")
    parser.add_argument("--load", type=float, default=90.0, help="seconds to load a model")
    parser.add_argument("--event", type=float, default=0.004, help="seconds of the loop per event")
    options = parser.parse_args()
    options.prompts = options.prompts or {"measure": 64, "simulate": 10_000}[options.what]
    {"measure": measure, "simulate": simulate}[options.what](options)


if __name__ == "__main__":
    main()
