"""Serve the page. No connection is made to anywhere else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from ttsnap.core.hosts import foreign_host, foreign_origin

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from ttsnap.app.searches import Searches


def serve(
    searches: Searches,
    *,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    auth: list[tuple[str, str]] | None = None,
    allow_host: Sequence[str] = (),
    block: bool = True,
) -> tuple[Any, str]:
    """Open the page.

    Args:
        searches: what is offered.
        host: address to listen on; 127.0.0.1 lets only this machine in.
        port: None: any free one from 7860 on.
        auth: users and passwords, if a login is asked for.
        allow_host: other names by which the page is reached, such as that of a proxy.
        block: return only when it is interrupted.

    Returns:
        The Gradio page and its URL.

    Raises:
        OSError: the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(searches.out / ".served")  # what the page may hand out
    os.environ.setdefault("GRADIO_HEARTBEAT_INTERVAL", "2")  # a closed tab is noticed soon
    import gradio as gr
    from starlette.middleware import Middleware

    from ttsnap.app.page import build

    page = build(searches)
    page.queue(default_concurrency_limit=None, api_open=False)
    font = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    theme = gr.themes.Soft(
        primary_hue="emerald", neutral_hue="slate", font=font, font_mono=["ui-monospace", "monospace"]
    )
    theme.set(
        block_title_background_fill="none",
        block_title_padding="0",
        block_title_text_color="*neutral_700",
        body_text_color_subdued="*neutral_500",
        block_label_text_color="*primary_800",
        block_label_background_fill_dark="*primary_700",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_secondary_background_fill_hover_dark="*primary_700",
    )
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        allowed_paths=[str(searches.out)],
        max_file_size="64mb",  # pictures, of which the settings are read
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        app_kwargs={
            "middleware": [Middleware(HostGuard, listens=host, allowed=tuple(allow_host))],
            "exception_handlers": {KeyError: unknown},
        },
        theme=theme,
        css=resources.files("ttsnap.app").joinpath("style.css").read_text(encoding="utf-8"),
    )
    if block:
        page.block_thread()
    return page, url


async def unknown(request: Request, error: Exception) -> Response:
    """Answers a request for a function that the page does not have: Gradio looks it up in a dictionary."""
    from starlette.responses import PlainTextResponse

    return PlainTextResponse(f"the page has no function {error}", 404)


class HostGuard:
    """Answers requests by another name than this machine's, and those of other sites' pages, with 403.

    Args:
        app: the page.
        listens: address that it listens on.
        allowed: other names.
    """

    def __init__(self, app: ASGIApp, listens: str, allowed: Sequence[str]) -> None:
        self.app, self.listens, self.allowed = app, listens, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = foreign_host(self.listens, headers, self.allowed), foreign_origin(headers)
        if host is None and origin is None:
            await self.app(scope, receive, send)
            return
        called = f"this page is not called {host!r}; --allow-host lets it be"
        text = (called if host is not None else f"pages of {origin!r} may not ask this one").encode()
        kind = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": 403, "headers": kind})
        await send({"type": "http.response.body", "body": text})
