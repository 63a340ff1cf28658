"""The tab that searches for many prompts of a file, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from ttsnap.app import view
from ttsnap.app.form import QUIET, Form, Update, requests
from ttsnap.app.job import Job, sentence
from ttsnap.app.searches import Searches
from ttsnap.files.prompts import read_prompt_file

PAUSE = 0.3  # seconds between glances
EMPTY = '<p class="tt-hint">One picture a prompt appears here. All of them lie under Runs afterwards.</p>'


def build(searches: Searches, visitor: gr.BrowserState) -> tuple[Callable[..., Any], list[Any]]:
    """The tab; answers with what shows a search to a page that was opened again, and where."""
    form = Form(searches, "many", ["tuned for the model"], prompts=True)
    with gr.Row():
        go = gr.Button("Search for all", variant="primary", elem_id="tt-many-go", min_width=120)
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="tt-many-stop", min_width=120)
    status = gr.HTML(elem_id="tt-many-status")
    board = gr.HTML(EMPTY, elem_id="tt-many-board")
    outputs = [status, board, go, stop]

    async def follow(jobs: list[Job]) -> AsyncIterator[Update]:
        before = None
        while True:
            over = [job for job in jobs if not job.active]
            at = next((job for job in jobs if job.active and job.phase != "waiting"), None)
            line = f"{len(over)} of {len(jobs)} prompts" + (f" · {at.phase}: {at.request.prompt}" if at else "")
            if line != before:
                buttons = {go: gr.update(interactive=False), stop: gr.update(interactive=True)}
                yield {status: view.status(line), board: _board(jobs), **buttons}
                before = line
            if len(over) == len(jobs):
                break
            await asyncio.sleep(PAUSE)
        yield {board: _board(jobs), go: gr.update(interactive=True), stop: gr.update(interactive=False)}

    async def begin(request: gr.Request, known: str | None, file: str | None, *values: Any) -> AsyncIterator[Update]:
        try:
            session = str(request.session_hash)
            known = searches.welcome(session, known)
            jobs = searches.begin_all(session, "many", known, _asked(searches, file, values))
        except Exception as error:
            yield {status: view.error(sentence(error))}
            return
        yield {visitor: known}
        async for update in follow(jobs):
            yield update

    async def resume(visitor: str | None) -> AsyncIterator[Update]:
        yield {status: gr.skip()}  # where nothing is answered, all is emptied
        if jobs := searches.jobs(visitor, "many"):
            async for update in follow(jobs):
                yield update

    def told(file: str | None, *values: Any) -> str:
        if file is None:
            return ""
        try:
            asked = _asked(searches, file, values)
            for request in asked:
                searches.check(request)
        except Exception as error:
            return view.hint(sentence(error), wrong=True)
        odd = [said for one in asked if (said := searches.models.unread(one.model, one.prompt))]
        more = f"; {len(odd)} that the model does not read as they stand, the first: {odd[0]}" if odd else ""
        return view.hint(f"{len(asked)} prompts{more}")

    form.wire()
    form.prompt.change(told, form.fields, form.hint, trigger_mode="always_last", **QUIET)
    go.click(begin, [visitor, *form.fields], [visitor, *outputs], **QUIET)
    stop.click(searches.stop, visitor, **QUIET)
    return resume, outputs


def _asked(searches: Searches, file: str | None, values: Any) -> list[Any]:
    """One request per prompt of the file."""
    if file is None:
        raise ValueError("choose a file with prompts")
    try:
        prompts = read_prompt_file(Path(file))
    except ValueError as error:
        raise ValueError(str(error).replace(file, Path(file).name)) from error
    if not 1 <= len(prompts) <= searches.limits.file:
        raise ValueError(f"a file has 1 to {searches.limits.file} prompts, this one has {len(prompts)}")
    return [request for prompt in prompts for request in requests([prompt, *values])]


def _board(jobs: list[Job]) -> str:
    """One tile a prompt: its picture, or how far it is."""
    tiles = ""
    for job in jobs:
        prompt, result = escape(job.request.prompt, quote=True), job.result
        kind, said = "tt-waiting", job.trouble or {"over": "stopped", "never": "not begun"}.get(job.phase, job.phase)
        picture = '<span class="tt-blank" role="img" aria-label="no picture yet"></span>'
        if result is not None and result.images:
            kind = "tt-miss" if job.missed else "tt-done"
            said = f"{result.reward:.2f}" + (", misses something" if job.missed else "")
            picture = f'<img src="{view.uri(np.asarray(result.image))}" alt="{prompt}">'
        caption = f'<span class="tt-seed">{prompt}</span><br>{escape(said)}'
        tiles += f'<li class="tt-tile {kind}">{picture}{caption}</li>'
    return f'<ol class="tt-board tt-wide" aria-label="Prompts">{tiles}</ol>'
