"""A thousand requests of clients that come and go: nothing leaks, nothing is lost."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import random
from pathlib import Path

import pytest

from tests.server.conftest import until
from ttsnap.server.settings import ServerSettings

pytest.importorskip("openai", reason="the server is tested with its client: pip install openai")
REQUESTS, CLIENTS = 1000, 24


def resident():
    """MiB of this process in main memory, after the allocator has given back what it only holds."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def alive(kind):
    """Objects of a kind that are still there; `isinstance` would load what lazy modules stand for."""
    gc.collect()
    return sum(type(one) is kind for one in gc.get_objects())


async def visit(client, number, draw):
    """One request; a third of them go before they have their picture. What came of it."""
    kind = draw.choice(["whole", "whole", "whole", "stream", "gone", "gone while it streams"])
    options = {"prompt": f"a red circle left of a blue square {number % 7}", "n": draw.choice([1, 1, 1, 2])}
    options["extra_body"] = {"seed": number, "steps": draw.choice([3, 4])}
    if "stream" in kind:
        got = 0
        async with await client.images.generate(**options, stream=True, partial_images=1) as events:
            async for event in events:
                got += event.type.endswith("completed")
                if kind.startswith("gone"):
                    return "gone"
        assert got == options["n"]
        return "whole"
    asked = asyncio.create_task(client.images.generate(**options))
    if kind == "gone":
        await asyncio.sleep(draw.uniform(0, 0.6))
        if not asked.done():
            asked.cancel()
            return "gone"
    answer = await asked
    assert len(answer.data) == options["n"]
    return "whole"


async def visits(url, numbers, seed):
    from openai import AsyncOpenAI

    draw, waiting, came = random.Random(seed), list(numbers), []
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:

        async def one():
            while waiting:
                came.append(await visit(client, waiting.pop(), draw))

        await asyncio.gather(*(one() for _ in range(CLIENTS)))
    return came


@pytest.mark.slow
def test_a_thousand_requests_leave_nothing_behind():
    from ttsnap.live.engine import Grid
    from ttsnap.live.settings import ModelSettings, SearchSettings
    from ttsnap.pipelines.call import Call
    from ttsnap.server.lanes import Search
    from ttsnap.server.running import in_background

    settings = ServerSettings(port=0, max_waiting=200, max_per_client=200)
    with in_background(ModelSettings(steps=4), SearchSettings(candidates=2), settings) as (url, worker):
        asyncio.run(visits(url, range(200), 0))  # until all that is kept once is there
        until(lambda: not worker._open)
        before = resident()
        came = asyncio.run(visits(url, range(REQUESTS), 1))
        until(lambda: not worker._open)
        assert (worker.running, worker.waiting, worker.open_calls) == (0, 0, 0)
        for kind in (Call, Grid, Search):
            until(lambda kind=kind: alive(kind) == 0, f"{kind.__name__}s of what is over are gone")
        after = resident()
        text = worker.metrics.text().decode()
    assert len(came) == REQUESTS
    assert REQUESTS / 10 < came.count("gone") < REQUESTS / 2
    outcomes = {
        line.split('"')[1]: float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("ttsnap_searches_total")
    }
    assert "failed" not in outcomes
    assert outcomes["cancelled"] > REQUESTS / 20
    print(f"\n{outcomes}, {before:.0f} MiB before, {after:.0f} MiB after")
    assert after - before < 40  # MiB
