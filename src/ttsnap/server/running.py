"""A server as a whole: its worker, its application, and uvicorn, which serves it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttsnap.live.settings import ModelSettings, SearchSettings
    from ttsnap.server.settings import ServerSettings
    from ttsnap.server.worker import Worker

GRACE = 10  # seconds for which requests that are under way may end, when the server does


@contextmanager
def serving(
    model: ModelSettings, search: SearchSettings, settings: ServerSettings, *, metadata: bool = True
) -> Iterator[tuple[Any, Worker]]:
    """A uvicorn server that can be run, and its worker, which has loaded the model.

    Raises:
        ValueError: what was wrong with the model or an option.
    """
    import uvicorn

    from ttsnap.server.api import build
    from ttsnap.server.metrics import Metrics
    from ttsnap.server.worker import Worker

    metrics = Metrics()
    worker = Worker(model, search, settings, metrics)
    worker.start()
    try:
        config = uvicorn.Config(
            build(worker, settings, metrics, metadata=metadata),
            host=settings.host,
            port=settings.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE,
            server_header=False,
        )
        yield uvicorn.Server(config), worker
    finally:
        worker.close()


@contextmanager
def in_background(
    model: ModelSettings, search: SearchSettings, settings: ServerSettings
) -> Iterator[tuple[str, Worker]]:
    """A server in a thread of this process, for tests and notebooks: its URL and its worker."""
    with serving(model, search, settings) as (server, worker):
        socket = server.config.bind_socket()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        try:
            yield f"http://{settings.host}:{socket.getsockname()[1]}", worker
        finally:
            server.should_exit = True
            thread.join(GRACE + 5)
