"""The page: its tabs, and which button does what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from ttsnap.app import explore, many, runs, view
from ttsnap.app.form import QUIET, Form, Update, requests, restored
from ttsnap.app.job import Job, sentence
from ttsnap.app.searches import Searches
from ttsnap.files import metadata
from ttsnap.pipelines.models import MODELS

if TYPE_CHECKING:
    from ttsnap.live.result import SearchResult

HEAD = """<div class="tt-head"><h1>ttsnap</h1><p>Many candidates are started. Each is looked at early, the poor ones are
dropped, and only the promising ones are finished: a better picture for the same compute.</p></div>"""
PAUSE = 0.08  # seconds between glances at a search


def build(searches: Searches) -> gr.Blocks:
    """The page of a searches."""
    with gr.Blocks(title="ttsnap", analytics_enabled=False) as page:
        gr.HTML(HEAD)
        visitor = gr.BrowserState(None, storage_key="ttsnap-visitor", secret="ttsnap")
        with gr.Tabs() as tabs:
            with gr.Tab("Search", id="search"):
                form, resume = _search_tab(searches, visitor, "search")
            with gr.Tab("Hand-picked", id="hand"):
                _, resume_hand = _search_tab(searches, visitor, "hand")
            with gr.Tab("Many prompts", id="many"):
                resume_many = many.build(searches, visitor)
            with gr.Tab("Compare", id="compare"):
                _compare_tab(searches, visitor)
            with gr.Tab("Runs", id="runs") as mine:
                shared = runs.build(searches, visitor, mine, tabs, form)
            with gr.Tab("Explore", id="explore") as tab:
                explore.build(searches, visitor, tab)

        def come(visitor: str | None, request: gr.Request) -> str:
            return searches.welcome(str(request.session_hash), visitor)

        def leave(request: gr.Request) -> None:
            searches.close(str(request.session_hash))

        page.load(*form.of_choice(), **QUIET)
        here = page.load(come, visitor, visitor, **QUIET)
        for handler, outputs in (resume, resume_hand, resume_many):
            here.then(handler, visitor, outputs, **QUIET)
        page.load(shared[0], None, shared[1], **QUIET)
        page.unload(leave)
    return page


async def watch(jobs: Sequence[Job], shown: Sequence[int]) -> AsyncIterator[tuple[int, str | None, str]]:
    """Every frame of the jobs from those `shown` on, and their status in between: (which job, board if new, status)."""
    places, lines = list(shown), [""] * len(jobs)
    while True:
        busy = any(job.active for job in jobs)
        for number, job in enumerate(jobs):
            while places[number] < len(job.frames):
                frame = job.frames[places[number]]
                places[number] += 1
                lines[number] = frame.status
                yield number, frame.board, frame.status
            if job.active and (line := job.status()) != lines[number]:
                lines[number] = line
                yield number, None, line
        if not busy:
            return
        await asyncio.sleep(PAUSE)


class Result:
    """What is shown when a search is over: the winner above the board, the rest below it."""

    def __init__(self, name: str) -> None:
        self.outcome = gr.HTML(elem_id=f"tt-{name}-outcome")

    def below(self) -> None:
        """What belongs below the board."""
        with gr.Column(visible=False) as self.after:
            with gr.Row():
                self.image = gr.DownloadButton("Image", size="sm", min_width=100)
                self.board = gr.DownloadButton("Board", size="sm", min_width=100)
                self.record = gr.DownloadButton("result.json", size="sm", min_width=100)
                self.again = gr.Button("Use the winner's seed", size="sm", min_width=100)
            self.code = gr.Code(label="The same picture in the stock pipeline", language="python", interactive=False)
            self.plot = gr.HTML(elem_classes="tt-figure")
        self.all = [self.outcome, self.after, self.image, self.board, self.record, self.code, self.plot]

    def clear(self) -> Update:
        """Nothing."""
        return {self.outcome: "", self.after: gr.update(visible=False)}

    def show(self, job: Job) -> Update:
        """The winner, files to download, how to make it again, and the history."""
        if job.result is None or job.folder is None:
            return self.clear()
        files = {name: str(job.folder / file) for name, file in _files(job.result).items()}
        return {
            self.outcome: view.outcome(job.result, job.said),
            self.after: gr.update(visible=True),
            self.image: gr.update(value=files.get("image"), interactive="image" in files),
            self.board: files["board"],
            self.record: files["record"],
            self.code: job.result.reproduce,
            self.plot: explore.history_svg(job.result.history, job.result.num_steps, " + ".join(job.result.rewards)),
        }


def _files(result: SearchResult) -> dict[str, str]:
    files = {"board": "board.png", "record": "result.json"}
    return files | {"image": "best.png"} if result.images else files


Handler = tuple[Callable[..., Any], list[Any]]


def _search_tab(searches: Searches, visitor: gr.BrowserState, name: str) -> tuple[Form, Handler]:
    """Search, or with `name` hand the same with a person picking at each look.

    Returns:
        The form; and what shows a search that is on, or over, to a page that was opened again, and where.
    """
    by_hand = name == "hand"
    if by_hand:
        gr.Markdown(
            "At each look the search waits. The candidates that the reward would keep are ticked; tick and untick as "
            "you like, also those dropped earlier, then continue. What you tick is what comes out."
        )
    form = Form(searches, name, ["tuned for the model"])
    with gr.Row():
        go = gr.Button("Search", variant="primary", elem_id=f"tt-{name}-go", min_width=120)
        now = gr.Button(
            "Finish the best now", interactive=False, elem_id=f"tt-{name}-now", min_width=120, visible=not by_hand
        )
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id=f"tt-{name}-stop", min_width=120)
    status = gr.HTML(elem_id=f"tt-{name}-status")
    result = Result(name)
    compare = gr.Button("What would best-of-N have got for the same cost?", visible=False, elem_id=f"tt-{name}-compare")
    ticked = gr.Textbox(visible=False)
    with gr.Row(visible=by_hand):
        onward = gr.Button("Continue with the ticked", variant="primary", interactive=False, elem_id="tt-hand-continue")
        finish = gr.Button("Finish and take the ticked", interactive=False, elem_id="tt-hand-finish")
    board = gr.HTML(view.EMPTY, elem_id=f"tt-{name}-board")
    result.below()
    outputs = [status, board, go, now, stop, onward, finish, compare, *result.all]

    def buttons(job: Job) -> Update:
        done = job.result is not None and not job.active
        return {
            go: gr.update(interactive=not job.active),
            now: gr.update(interactive=job.phase == "searching"),
            stop: gr.update(interactive=job.active),
            onward: gr.update(interactive=job.phase == "picking"),
            finish: gr.update(interactive=done),
            compare: gr.update(visible=done),
        }

    async def follow(job: Job, shown: int) -> AsyncIterator[Update]:
        async for _, picture, line in watch([job], [shown]):
            yield {status: line, **({} if picture is None else {board: picture}), **buttons(job)}
        yield {**buttons(job), **result.show(job)}

    async def begin(request: gr.Request, known: str | None, *values: Any) -> AsyncIterator[Update]:
        try:
            session = str(request.session_hash)
            known = searches.welcome(session, known)
            (job,) = searches.begin(session, name, known, requests(values, by_hand=by_hand))
        except Exception as error:
            yield {status: view.error(sentence(error))}
            return
        yield {visitor: known, form.hint: "", board: view.EMPTY, status: "", **result.clear(), **buttons(job)}
        async for update in follow(job, 0):
            yield update

    async def resume(visitor: str | None) -> AsyncIterator[Update]:
        yield {status: gr.skip()}  # where nothing is answered, all fields are emptied
        for job in searches.jobs(visitor, name)[:1]:
            yield dict(zip(form.fields, form.values(job.request), strict=True))
            async for update in follow(job, max(0, len(job.frames) - 1)):
                yield update

    def again(work: Callable[[Job, str], None]) -> Callable[..., AsyncIterator[Update]]:
        async def handle(ticks: str, visitor: str) -> AsyncIterator[Update]:
            try:
                job = searches.job(visitor, name)
                shown = len(job.frames)
                work(job, ticks)
            except Exception as error:
                yield {status: view.error(sentence(error))}
                return
            async for update in follow(job, shown):
                yield update

        return handle

    def restore(file: str | None) -> Update:
        if file is None:
            return {status: ""}
        try:
            own = metadata.read(file).own
            if own is None:
                raise ValueError("the picture was not made by ttsnap, or its metadata was cut")
            values, said = restored(own, searches)
        except (ValueError, KeyError, TypeError) as error:
            text = "the picture's metadata is not complete" if not isinstance(error, ValueError) else sentence(error)
            return {status: view.error(text.replace(file, "the picture"))}
        return {status: view.status(said), **dict(zip(form.fields, values, strict=True))}

    def go_on(ticks: str, visitor: str) -> Update:
        try:
            searches.job(visitor, name).answer(ticks)
        except Exception as error:
            return {status: view.error(sentence(error))}
        return {onward: gr.update(interactive=False)}

    def winners_seed(visitor: str) -> int:
        made = searches.job(visitor, name).result
        return made.seed if made and made.images else 0

    checked = f"[...document.querySelectorAll('#tt-{name}-board input:checked')].map(e => e.value).join(',')"
    both = f"(_, visitor) => [{checked}, visitor]"
    form.wire()
    gr.on([go.click, form.prompt.submit], begin, [visitor, *form.fields], [visitor, *outputs, form.hint], **QUIET)
    form.picture.change(restore, form.picture, [status, *form.fields], **QUIET)
    now.click(lambda visitor: searches.job(visitor, name).hurry(), visitor, **QUIET)
    stop.click(searches.stop, visitor, **QUIET)
    onward.click(go_on, [ticked, visitor], [status, onward], js=both, **QUIET)
    finish.click(again(lambda job, ticks: job.finish(ticks)), [ticked, visitor], outputs, js=both, **QUIET)
    compare.click(again(lambda job, ticks: job.compare()), [ticked, visitor], outputs, **QUIET)
    result.again.click(winners_seed, visitor, form.seed, **QUIET)
    return form, (resume, [*outputs, *form.fields])


def _compare_tab(searches: Searches, visitor: gr.BrowserState) -> None:
    """The same prompt, seeds and budget with two policies side by side."""
    gr.Markdown("The same prompt, the same seeds and the same budget, twice. The budget is what both may cost.")
    small = searches.offered[0] in MODELS
    unit, amount = ("GFLOP", 10) if small else ("TFLOP", 1000)
    form = Form(searches, "compare", ["tuned for the model", "best-of-N"], unit, amount)
    with gr.Row():
        go = gr.Button("Compare", variant="primary", elem_id="tt-compare-go", min_width=120)
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="tt-compare-stop", min_width=120)
    status = gr.HTML(elem_id="tt-compare-status")
    sides = []
    with gr.Row():
        for number in range(2):
            with gr.Column(min_width=300):
                title = gr.Markdown()
                line = gr.HTML()
                outcome = gr.HTML(elem_id=f"tt-compare-outcome-{number}")
                board = gr.HTML(view.EMPTY if number == 0 else "", elem_id=f"tt-compare-board-{number}")
                sides.append((title, line, outcome, board))
    outputs = [status, go, stop, *(part for side in sides for part in side)]

    async def begin(request: gr.Request, known: str | None, *values: Any) -> AsyncIterator[Update]:
        try:
            session, asked = str(request.session_hash), requests(values)
            if asked[0].budget is None:
                raise ValueError("two policies are compared at a budget in calls, FLOP or seconds, not in candidates")
            known = searches.welcome(session, known)
            jobs = searches.begin(session, "compare", known, asked)
        except Exception as error:
            yield {status: view.error(sentence(error))}
            return
        first: Update = {
            visitor: known,
            status: "",
            go: gr.update(interactive=False),
            stop: gr.update(interactive=True),
        }
        for (title, line, outcome, board), job in zip(sides, jobs, strict=True):
            first |= {title: f"### {job.request.policy}", line: "", outcome: "", board: ""}
        yield first
        async for number, picture, text in watch(jobs, [0, 0]):
            _, line, outcome, board = sides[number]
            update: Update = {line: text} | ({} if picture is None else {board: picture})
            ended = jobs[number].result
            yield update | ({outcome: view.outcome(ended)} if ended else {})
        yield {go: gr.update(interactive=True), stop: gr.update(interactive=False)}

    form.wire()
    gr.on([go.click, form.prompt.submit], begin, [visitor, *form.fields], [visitor, *outputs], **QUIET)
    stop.click(searches.stop, visitor, **QUIET)
