"""A real S3-compatible server (moto) on 127.0.0.1, which can be told to answer 503 for a while."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("moto")
pytest.importorskip("s3fs")

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Store:
    """The server.

    Attributes:
        url: of a fresh bucket.
        refused: requests that were answered with 503.
        puts: paths put, in order.
        conditional: whether it knows puts on condition; else it ignores the condition.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._app = DomainDispatcherApplication(create_backend_app)
        self._until, self.refused, self.puts, self.conditional = 0.0, 0, [], True
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _answer(self, environ, start_response):
        if time.monotonic() < self._until:
            self.refused += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Connection", "close")])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [SLOW_DOWN]
        if environ["REQUEST_METHOD"] == "PUT":
            self.puts.append(environ["PATH_INFO"])
            if not self.conditional:
                environ.pop("HTTP_IF_NONE_MATCH", None)
        return self._app(environ, start_response)

    def fail_for(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def bucket(self) -> str:
        import s3fs

        name = f"b{uuid.uuid4().hex[:12]}"
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
        return f"s3://{name}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()


@contextmanager
def serve() -> Iterator[Store]:
    """The server, with the environment variables by which clients find it."""
    import s3fs

    store = Store()
    variables = {
        "AWS_ENDPOINT_URL": store.endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    s3fs.S3FileSystem.clear_instance_cache()  # a client of an earlier server would ask that one
    try:
        yield store
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        store.close()
