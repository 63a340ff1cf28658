"""Who may ask: API keys, names of this server, origins of web pages, and how much a request may hold.

What pages of other sites may do is said in `ttsnap.core.hosts`.
"""

from __future__ import annotations

import hmac
import json
from typing import TYPE_CHECKING, Any

from ttsnap.core.hosts import foreign_host, foreign_origin
from ttsnap.server.settings import ServerSettings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ttsnap.server.metrics import Metrics

OPEN = ("/healthz", "/v1/images/files/")  # paths that need no key; the names of the files cannot be guessed
MOST_TEXT, MOST_FORM = 1 << 20, 64 << 20  # bytes of a JSON body, of a form with pictures


def problem(
    message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None
) -> Any:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class TooLarge(Exception):
    """A body is larger than it may be."""


class Guard:
    """Lets requests through to an application, or answers why not.

    Args:
        app: the application.
        settings: keys and names.
        metrics: counts answers.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.keys = [key.encode() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self.metrics.requested(path, message["status"])
            await send(message)

        if refusal := self._refusal(scope["path"], headers):
            await _answer(counted, *refusal)
            return
        scope["client_name"] = self._client(scope, headers)
        most = MOST_FORM if headers.get("content-type", "").startswith("multipart/") else MOST_TEXT
        await self._bounded(scope, receive, counted, headers.get("content-length", ""), most)

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, Any] | None:
        host = foreign_host(self.settings.host, headers, self.settings.allow_host)
        if host is not None:
            return 403, problem(f"this server is not called {host!r}; --allow-host lets it be", code="host_not_allowed")
        if origin := foreign_origin(headers, self.settings.allow_origin):
            return 403, problem(
                f"pages of {origin!r} may not ask this server; --allow-origin lets them", code="origin_not_allowed"
            )
        if self.keys and not path.startswith(OPEN) and self._key(headers) is None:
            return 401, problem("give an API key of this server, as Authorization: Bearer KEY", code="invalid_api_key")
        return None

    def _key(self, headers: dict[str, str]) -> int | None:
        """Number of the key that is given, if it is one of ours."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            return None
        same = [hmac.compare_digest(key, given.strip().encode()) for key in self.keys]  # each in the same time
        return same.index(True) if any(same) else None

    def _client(self, scope: Scope, headers: dict[str, str]) -> str:
        if (number := self._key(headers)) is not None:
            return f"key {number}"
        return str((scope.get("client") or ("",))[0])

    async def _bounded(self, scope: Scope, receive: Receive, send: Send, length: str, most: int) -> None:
        taken, begun = 0, False

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise TooLarge
            return message

        async def noticed(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            if length.isdigit() and int(length) > most:
                raise TooLarge
            await self.app(scope, bounded, noticed)
        except TooLarge:
            if not begun:
                await _answer(send, 413, problem(f"the request is larger than {most >> 20} MiB", code="too_large"))


async def _answer(send: Send, status: int, body: Any) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
