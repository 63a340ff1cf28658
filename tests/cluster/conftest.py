"""One Ray for all tests, and the object store that its workers see."""

from __future__ import annotations

import os

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
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")
    from ttsnap.cluster import ray_pool

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_pool, "STARTS", 10)  # Ray's own processes must start within 15 s, which a busy machine denies
        assert ray_pool.connect(None, 2)
    import ray

    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
