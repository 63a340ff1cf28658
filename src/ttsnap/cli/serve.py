"""`ttsnap serve`: an images server that clients of OpenAI's API use unchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ttsnap.cli.options import OUTPUT, SERVER, AsJson, DryRun, ModelOptions, SearchOptions, tell
from ttsnap.live.settings import ModelSettings, SearchSettings
from ttsnap.server.settings import ServerSettings

if TYPE_CHECKING:
    from ttsnap.live.forecast import Work

ServerOptions = Annotated[ServerSettings, Parameter(name="*", group=SERVER)]


def serve(
    *,
    server: ServerOptions = ServerSettings(),
    search: SearchOptions = SearchSettings(),
    model: ModelOptions = ModelSettings(),
    metadata: Annotated[bool, Parameter(group=OUTPUT, negative="--no-metadata")] = True,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Serve pictures as OpenAI's images API does, each the best that a search found.

    Try: ttsnap serve

    Args:
        metadata: Let the pictures say how they were made.
    """
    import sys

    import fastapi  # noqa: F401  # missing, they are named with their install command
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401

    if dry_run:
        tell(of_each("a server; of each picture", search, model), json)
        return
    from ttsnap.cli.progress import say
    from ttsnap.server.running import serving

    say(f"loading {model.model}")
    with serving(model, search, server, metadata=metadata) as (app, _):
        try:
            socket = app.config.bind_socket()
        except SystemExit:
            raise ValueError(f"cannot listen on {server.host} port {server.port}; give another --port") from None
        port = socket.getsockname()[1]
        keys = f", {len(server.keys)} keys" if server.keys else ", no key needed"
        print(
            f"ttsnap serves {model.model} at http://{server.host}:{port}/v1 (Ctrl-C ends it{keys})",
            file=sys.stderr,
        )
        app.run(sockets=[socket])


def of_each(what: str, search: SearchSettings, model: ModelSettings) -> Work:
    """What one search of a server costs that has these settings; `what` begins the sentence."""
    from ttsnap.cli.workers import quietly
    from ttsnap.live.forecast import forecast
    from ttsnap.pipelines.conditions import Pictures

    work = forecast(quietly(search.prepare, model, "a", Pictures(), None), ["a"], board=False).work
    return replace(work, what=f"{what} {work.what}")
