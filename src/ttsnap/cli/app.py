"""`ttsnap app`: the search in the browser, live, and picking by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_OFFER, _SERVE = "What is offered", "Who may come"


def open_page(
    model: Annotated[
        list[str] | None,
        typer.Option(help="`shapes`, a hub id, or a diffusers directory; may be repeated.", rich_help_panel=_OFFER),
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="Reward on offer; may be repeated.", rich_help_panel=_OFFER)
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Results are written here, and recordings and runs are opened from here.")
    ] = Path("app"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; 127.0.0.1: only this machine.", rich_help_panel=_SERVE)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.", rich_help_panel=_SERVE)] = 7860,
    auth: Annotated[
        list[str] | None, typer.Option(help="user:password; may be repeated.", rich_help_panel=_SERVE)
    ] = None,
    max_candidates: Annotated[int, typer.Option(help="Most candidates of a search.", rich_help_panel=_OFFER)] = 128,
    max_size: Annotated[int, typer.Option(help="Largest image side in pixels.", rich_help_panel=_OFFER)] = 2048,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", rich_help_panel=_OFFER)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16.", rich_help_panel=_OFFER)] = None,
) -> None:
    """Open a page on this machine: watch the search, pick by hand, compare policies, explore recordings.

    Try: ttsnap app
    """
    import gradio  # noqa: F401  # missing, it is named with its install command

    from ttsnap.app.desk import Desk
    from ttsnap.app.orders import Limits
    from ttsnap.app.server import serve

    users = []
    for pair in auth or []:
        user, colon, password = pair.partition(":")
        if not (user and colon and password):
            raise ValueError(f"--auth takes user:password, got {pair!r}")
        users.append((user, password))
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must be 1 to 65535, got {port}")
    for name, value in (("--max-candidates", max_candidates), ("--max-size", max_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    try:
        desk = Desk(
            out,
            model or ["shapes"],
            reward or [],
            device,
            dtype,
            Limits(candidates=max_candidates, side=max_size),
        )
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}; give another --out") from error
    page, url = serve(desk, host=host, port=port, auth=users or None, block=False)
    typer.echo(f"ttsnap is at {url} (Ctrl-C ends it); results are in {desk.out}", err=True)
    desk.warm()
    page.block_thread()
