"""One server of the embedded model for all tests, with two keys and small limits."""

from __future__ import annotations

import time

import pytest

KEYS = ("key-number-one", "key-number-two")
PATIENCE = 120  # seconds; nothing waits that long on a quiet machine


@pytest.fixture(scope="session")
def served():
    """URL of a server, and its worker."""
    pytest.importorskip("openai", reason="the server is tested with its client: pip install openai")
    from ttsnap.live.settings import ModelSettings, SearchSettings
    from ttsnap.server.running import in_background
    from ttsnap.server.settings import ServerSettings

    settings = ServerSettings(
        port=0, api_key=KEYS, max_waiting=12, max_per_client=10, alias=("gpt-image-1",), max_size=96
    )
    search = SearchSettings(candidates=4)
    with in_background(ModelSettings(steps=8), search, settings) as (url, worker):
        yield url, worker


@pytest.fixture(scope="session")
def client(served):
    from openai import OpenAI

    with OpenAI(base_url=f"{served[0]}/v1", api_key=KEYS[0], max_retries=0, timeout=PATIENCE) as client:
        yield client


def until(holds, what="it"):
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come true"
        time.sleep(0.01)
