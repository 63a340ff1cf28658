"""The routes of the server, as OpenAI's API has them: https://platform.openai.com/docs/api-reference/images."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from ttsnap.core import __version__
from ttsnap.core.errors import explain
from ttsnap.files.metadata import encode
from ttsnap.live.result import SearchResult
from ttsnap.server.files import Files
from ttsnap.server.guard import Guard, problem
from ttsnap.server.lanes import Edit, Search, Unavailable
from ttsnap.server.requests import Generation, edit_of
from ttsnap.server.settings import ServerSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from ttsnap.server.metrics import Metrics
    from ttsnap.server.worker import Worker

logger = logging.getLogger(__name__)

PULSE = 10.0  # seconds after which a stream in which nothing happens sends a comment, so that it is not cut
NO_TOKENS = {  # clients read it; nothing is counted in tokens here
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
TYPES = {400: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error", 503: "server_error"}


class Refused(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.retry_after: int | None = None

    @classmethod
    def of(cls, error: Exception) -> Refused:
        """What a client is told of an error; what is not the client's doing goes to the log in full."""
        if isinstance(error, Refused):
            return error
        if isinstance(error, Unavailable):
            refused = cls(429 if error.whose == "client" else 503, str(error), "overloaded")
            refused.retry_after = error.retry_after
            return refused
        if isinstance(error, ValueError):
            name, colon, _ = str(error).partition(": ")
            return cls(400, explain(error), param=name if colon and name.isidentifier() else None)
        logger.error("a search failed", exc_info=error)
        said = explain(error) if isinstance(error, MemoryError) else "the search failed; the server's log says why"
        return cls(500, said, "search_failed")

    def body(self) -> Any:
        """As OpenAI's clients read it."""
        return problem(str(self), TYPES.get(self.status, "server_error"), self.code, self.param)

    def response(self) -> Response:
        """The answer."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else None
        return JSONResponse(self.body(), self.status, headers)


@dataclass(eq=False)
class Order:
    """A request and the searches that answer it, one for each of its pictures.

    Attributes:
        asked: the request.
        edit: the picture that it starts from, if any.
        searches: one for each of its pictures.
        events: what they tell, in order: the number of the picture, and a look, a result or an error.
    """

    asked: Generation
    edit: Edit | None
    searches: list[Search]
    events: asyncio.Queue[tuple[int, Image | SearchResult | Exception]]

    @classmethod
    def of(cls, asked: Generation, edit: Edit | None, settings: ServerSettings, client: str) -> Order:
        """What is to be searched for."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any]]()

        def tell(number: int) -> Callable[[Any], None]:
            return lambda told: void(loop.call_soon_threadsafe(events.put_nowait, (number, told)))

        first = Search(
            asked.text(),
            asked.first_seed(),
            tell(0),
            options=asked.options(settings, edit),
            effort=asked.effort(),
            shows=asked.partial_images if asked.stream else 0,
            shown=tell(0),
            client=client,
        )
        others = [replace(first, done=tell(n), shown=tell(n), offset=n) for n in range(1, asked.n)]
        return cls(asked, edit, [first, *others], events)


def void(_: object) -> None:
    """Nothing."""


def build(worker: Worker, settings: ServerSettings, metrics: Metrics, *, metadata: bool = True) -> Guard:
    """The application.

    Args:
        worker: searches.
        settings: who may ask for what.
        metrics: counts requests.
        metadata: let pictures say how they were made.
    """
    app = FastAPI(title="ttsnap", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    files, created = Files(), int(time.time())
    names = [worker.name, *settings.alias]

    def order(asked: Generation, request: Request, edit: Edit | None = None) -> Order:
        if asked.model is not None and asked.model not in names:
            there = ", ".join(names)
            raise Refused(
                404, f"there is no model {asked.model[:80]!r} here; there is {there}", "model_not_found", "model"
            )
        try:
            made = Order.of(asked, edit, settings, request.scope["client_name"])
            worker.submit(made.searches)
        except (ValueError, Unavailable) as error:
            raise Refused.of(error) from error
        return made

    async def answer(made: Order, request: Request) -> Response:
        if made.asked.stream:
            kind = "image_edit" if made.edit else "image_generation"
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(streamed(made, kind), media_type="text/event-stream", headers=headers)
        results: dict[int, SearchResult] = {}
        gone = asyncio.create_task(left(request))
        try:
            while len(results) < len(made.searches):
                told = asyncio.create_task(made.events.get())
                await asyncio.wait([told, gone], return_when=asyncio.FIRST_COMPLETED)
                if not told.done():
                    told.cancel()
                    raise Refused(499, "the client has gone")
                number, outcome = told.result()
                if isinstance(outcome, Exception):
                    raise Refused.of(outcome) from outcome
                if isinstance(outcome, SearchResult):
                    results[number] = outcome
        finally:
            gone.cancel()
            worker.cancel(made.searches)
        data = await asyncio.gather(*(item(made, results[number], request) for number in sorted(results)))
        return JSONResponse({"created": int(time.time()), "data": data, "usage": NO_TOKENS, **shape(made, results[0])})

    async def item(made: Order, result: SearchResult, request: Request) -> dict[str, Any]:
        """One picture of an answer."""
        asked = made.asked
        packed = await asyncio.to_thread(written, asked, result, metadata)
        if asked.response_format == "url":
            name = files.add(packed, asked.output_format)
            return {"url": str(request.url_for("file", name=name)), "ttsnap": facts(result)}
        return {"b64_json": base64.b64encode(packed).decode(), "ttsnap": facts(result)}

    async def streamed(made: Order, kind: str) -> AsyncIterator[bytes]:
        """Events: looks at what is becoming of the pictures, then the pictures."""
        asked, open_, shown = made.asked, set(range(len(made.searches))), [0] * len(made.searches)
        try:
            while open_:
                try:
                    number, told = await asyncio.wait_for(made.events.get(), PULSE)
                except TimeoutError:
                    yield b": still at work\n\n"
                    continue
                if isinstance(told, Exception):
                    yield event("error", Refused.of(told).body())
                    return
                common = {"created_at": int(time.time()), "image_index": number}
                if isinstance(told, SearchResult):
                    open_.discard(number)
                    packed = await asyncio.to_thread(written, asked, told, metadata)
                    body = common | {"usage": NO_TOKENS, "ttsnap": facts(told)} | shape(made, told)
                    yield event(f"{kind}.completed", body | {"b64_json": base64.b64encode(packed).decode()})
                else:
                    body = common | {"partial_image_index": shown[number]} | shape(made, told)
                    shown[number] += 1
                    packed = await asyncio.to_thread(encode, told, kind=asked.output_format.upper())
                    yield event(f"{kind}.partial_image", body | {"b64_json": base64.b64encode(packed).decode()})
        finally:
            worker.cancel(made.searches)

    @app.post("/v1/images/generations")
    async def generations(asked: Generation, request: Request) -> Response:
        return await answer(order(asked, request), request)

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        async with request.form(max_files=20, max_fields=40) as form:
            given: dict[str, Any] = {name: value for name, value in form.items() if isinstance(value, str)}
            pictures = [*form.getlist("image"), *form.getlist("image[]")]
            read = [await part.read() for part in pictures if isinstance(part, UploadFile)]
            mask = form.get("mask")
            over = await mask.read() if isinstance(mask, UploadFile) else None
        asked = Generation.model_validate(given)
        if len(read) != 1:
            raise Refused(400, f"image: give one picture as a file, got {len(read)}", param="image")
        edit = await asyncio.to_thread(edit_of, read[0], over, asked.strength)
        return await answer(order(asked, request, edit), request)

    @app.get("/v1/images/files/{name}", name="file")
    async def file(name: str) -> Response:
        found = files.get(name)
        if found is None:
            raise Refused(404, "there is no such picture, or its hour is over", "not_found")
        return Response(found.data, media_type=found.media_type, headers={"X-Content-Type-Options": "nosniff"})

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [model(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Any:
        if name not in names:
            raise Refused(404, f"there is no model {name[:80]!r} here; there is {', '.join(names)}", "model_not_found")
        return model(name)

    def model(name: str) -> Any:
        return {"id": name, "object": "model", "created": created, "owned_by": "ttsnap"}

    @app.get("/healthz")
    async def healthz() -> Response:
        alive = worker.alive
        return JSONResponse({"status": "ok" if alive else "ending", "version": __version__}, 200 if alive else 503)

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def invalid(request: Request, error: Any) -> Response:
        return misread(error.errors())

    @app.exception_handler(ValueError)
    async def wrong(request: Request, error: ValueError) -> Response:
        return Refused.of(error).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}"
        text = f"there is no {what} here" if error.status_code in (404, 405) else str(error.detail)
        return JSONResponse(problem(text), error.status_code, error.headers)

    return Guard(app, settings, metrics)


async def left(request: Request) -> None:
    """Until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def written(asked: Generation, result: SearchResult, metadata: bool) -> bytes:
    """The winner as the bytes of a file."""
    kind = asked.output_format.upper()
    options = {} if kind == "PNG" else {"quality": asked.output_compression}
    return encode(result.image, result.metadata() if metadata else None, kind=kind, **options)


def facts(result: SearchResult) -> dict[str, Any]:
    """What OpenAI's API has no place for."""
    return {
        "seed": result.seed,
        "reward": result.reward,
        "rewards": result.best.rewards,
        "candidates": {"started": result.started, "finished": result.finished},
        "cost": result.cost.to_dict(),
        "notes": result.notes,
    }


def shape(made: Order, picture: SearchResult | Image) -> dict[str, Any]:
    """What an answer says of its pictures, beside themselves."""
    width, height = (picture.image if isinstance(picture, SearchResult) else picture).size
    asked = made.asked
    return {
        "size": f"{width}x{height}",
        "quality": asked.quality,
        "output_format": asked.output_format,
        "background": "opaque",
    }


def event(name: str, body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **body})}\n\n".encode()


def misread(errors: Sequence[Any]) -> Response:
    """What is wrong with a body."""
    first = errors[0]
    name = ".".join(str(part) for part in first["loc"] if part != "body") or None
    if first["type"] == "extra_forbidden":
        known = ", ".join(Generation.model_fields)
        return Refused(
            400, f"there is no parameter {str(name)[:60]!r}; there are {known}", "unknown_parameter", name
        ).response()
    said = (
        "the body is no JSON object" if name is None or first["type"] == "json_invalid" else f"{name}: {first['msg']}"
    )
    return Refused(400, said, param=name).response()


__all__ = ["build"]
