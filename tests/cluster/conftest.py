"""One Ray for all tests, and the object store that its workers see."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest

from tests.object_store import serve


@pytest.fixture(scope="session")
def store():
    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def two_cores(store):
    """A Ray on this machine with two CPUs; pools join it."""
    pytest.importorskip("ray")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("agent_register_timeout_ms", "raylet_client_connect_timeout_milliseconds"):
        os.environ.setdefault(f"RAY_{name}", "600000")
    for name in ("worker_register_timeout_seconds", "raylet_start_wait_time_s", "gcs_server_request_timeout_seconds"):
        os.environ.setdefault(f"RAY_{name}", "600")
    from ttsnap.cluster import ray_pool

    ray_pool.prepare(None)
    import ray
    from ray._private import node

    # Ray gives its processes 30 s to start, of which a busy test machine makes little: its clock goes slower meanwhile.
    slow = SimpleNamespace(**vars(time), start=time.monotonic())
    slow.monotonic = lambda: slow.start + (time.monotonic() - slow.start) / 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "time", slow)
        assert ray_pool.connect(None, 2)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
