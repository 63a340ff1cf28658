"""Throughput of the server with many clients at a time against that of the engine alone, by turns in the same run.

    OMP_NUM_THREADS=1 python benchmarks/serve.py
    OMP_NUM_THREADS=1 python benchmarks/serve.py --clients 4 --searches 64

Clients are tasks of OpenAI's own client in a process of its own; each asks for its next picture when it has the last
one. The engine alone gets the same prompts and seeds as one stream, of which it opens as many at a time as fill its
batches; and once more with no more of them at a time than there are clients, which is all that a server can know of.
Beside the seconds on the clock, which others on the machine disturb, the table has the processor's seconds of this
process, in which model and server run. On two cores that nobody else uses, a search takes about .27 s: 3 repeats of 64
searches, each made three times, about three minutes; how far it is stands on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from ttsnap.live import engine
from ttsnap.live.settings import ModelSettings, SearchSettings
from ttsnap.server.running import in_background
from ttsnap.server.settings import ServerSettings
from ttsnap.shapes.scenes import held_out_prompts


def ask(url, prompts, clients):
    """What the process of the clients does: it says when it is ready, and asks when it is told to."""
    from openai import AsyncOpenAI

    async def all_of_them():
        waiting = list(prompts)
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:

            async def one():
                while waiting:
                    answer = await client.images.generate(prompt=waiting.pop(0), extra_body={"seed": 0})
                    assert answer.data[0].b64_json

            await client.models.list()
            print("ready", flush=True)
            sys.stdin.readline()
            await asyncio.gather(*(one() for _ in range(clients)))
            print("done", flush=True)

    asyncio.run(all_of_them())


def timed(work):
    """Seconds on the clock, and of the processor in this process."""
    wall, own = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - own


def served(url, prompts, clients):
    """Seconds until all clients have all pictures."""
    command = [sys.executable, __file__, "--clients", str(clients), "--searches", str(len(prompts)), "--ask", url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"

        def work():
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"

        return timed(work)


def alone(session, prompts, most=engine.MOST_OPEN):
    """Seconds of the same searches as one stream, at most so many at a time."""

    def work():
        with patch.object(engine, "MOST_OPEN", most):
            stream()

    def stream():
        for _, result in session.stream(prompts, previews=False):
            assert result.images

    return timed(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--searches", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ask", metavar="URL", help=argparse.SUPPRESS)
    a = parser.parse_args()
    texts = held_out_prompts()
    prompts = [texts[number % len(texts)] for number in range(a.searches)]
    if a.ask:
        ask(a.ask, prompts, a.clients)
        return
    settings = ServerSettings(port=0, max_waiting=1000, max_per_client=1000)
    with in_background(ModelSettings(), SearchSettings(), settings) as (url, worker):
        session = worker.session()
        alone(session, prompts[:8])
        took = []
        for number in range(a.repeats):
            row = alone(session, prompts), alone(session, prompts, a.clients), served(url, prompts, a.clients)
            took.append(row)
            each = ", ".join(f"{wall:.0f} s ({own:.0f} s of the processor)" for wall, own in row)
            print(f"turn {number + 1} of {a.repeats}: {each}", file=sys.stderr, flush=True)
    few = f"{a.clients} at a time"
    table = Table(
        "searches a second",
        "engine alone",
        f"engine alone, {few}",
        f"server, {a.clients} clients",
        "server / engine alone",
        f"server / engine alone, {few}",
        title=f"{a.searches} searches on shapes; medians of {a.repeats} (least to largest)",
    )
    for name, place in (("on the clock", 0), ("of the processor", 1)):
        rates = [[a.searches / seconds[place] for seconds in row] for row in took]
        medians = [f"{statistics.median(column):.2f}" for column in zip(*rates, strict=True)]
        table.add_row(name, *medians, *(spread([row[2] / row[n] for row in rates]) for n in (0, 1)))
    Console(width=130).print(table)


def spread(ratios):
    """A median and what it lies between."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


if __name__ == "__main__":
    main()
