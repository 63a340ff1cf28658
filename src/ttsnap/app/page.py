"""The page: its tabs, and which button does what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from ttsnap import policies
from ttsnap.app import explore, view
from ttsnap.app.job import Job, sentence
from ttsnap.app.queue import POLICIES, Request
from ttsnap.app.searches import Searches
from ttsnap.files import metadata
from ttsnap.files.metadata import FORMATS
from ttsnap.live.rerun import options
from ttsnap.pipelines.models import MODELS

if TYPE_CHECKING:
    from ttsnap.live.result import SearchResult

UNITS = {"candidates": None, "denoiser calls": "NFE", "GFLOP": "GFLOP", "TFLOP": "TFLOP", "seconds": "s"}
HEAD = """<div class="tt-head"><h1>ttsnap</h1><p>Many candidates are started. Each is looked at early, the poor ones are
dropped, and only the promising ones are finished: a better picture for the same compute.</p></div>"""
PAUSE = 0.08  # seconds between glances at a search
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
Update = dict[Any, Any]


def build(searches: Searches) -> gr.Blocks:
    """The page of a searches."""
    with gr.Blocks(title="ttsnap", analytics_enabled=False) as page:
        gr.HTML(HEAD)
        visitor = gr.BrowserState(None, storage_key="ttsnap-visitor", secret="ttsnap")
        with gr.Tab("Search"):
            _search_tab(searches, visitor, "search")
        with gr.Tab("Hand-picked"):
            _search_tab(searches, visitor, "hand")
        with gr.Tab("Compare"):
            _compare_tab(searches, visitor)
        with gr.Tab("Explore") as tab:
            explore.build(searches, visitor, tab)
        page.load(searches.welcome, visitor, visitor, **QUIET)

        def leave(request: gr.Request) -> None:
            searches.close(str(request.session_hash))

        page.unload(leave)
    return page


class Form:
    """The fields of a request, with these policies and this budget to begin with."""

    def __init__(
        self, searches: Searches, name: str, policies: Sequence[str], unit: str = "candidates", amount: float = 16
    ) -> None:
        first = searches.offered[0]
        self.prompt = gr.Textbox(
            MODELS[first].example if first in MODELS else "",
            label="Prompt",
            lines=1,
            max_length=searches.limits.prompt,
            elem_id=f"tt-{name}-prompt",
            placeholder="what to paint",
        )
        with gr.Row():
            self.unit = gr.Dropdown(list(UNITS), value=unit, label="Budget in", min_width=130)
            self.amount = gr.Number(amount, label="Budget", minimum=0, min_width=100, elem_id=f"tt-{name}-amount")
            self.policies = [
                gr.Dropdown(list(POLICIES), value=value, label=label, min_width=180)
                for label, value in zip(
                    ["Policy"] if len(policies) == 1 else ["One policy", "The other"], policies, strict=True
                )
            ]
        with gr.Accordion("Model, reward, seed, size", open=False):
            with gr.Row():
                self.model = gr.Dropdown(searches.offered, value=first, label="Model", min_width=160)
                self.rewards = gr.Dropdown(
                    searches.rewards, value=searches.rewards[:1], multiselect=True, label="Rewards", min_width=160
                )
            with gr.Row():
                self.seed = gr.Number(0, label="First seed", precision=0, minimum=0, min_width=100)
                self.size = gr.Number(None, label="Size in pixels (empty: the model's own)", precision=0, min_width=160)
                self.steps = gr.Number(None, label="Steps (empty: the model's own)", precision=0, min_width=160)
            with gr.Row():
                self.image = gr.Image(
                    type="filepath",
                    format="png",
                    sources=["upload", "clipboard"],
                    label="Start from a picture, or show it to an editing model",
                    height=180,
                    elem_id=f"tt-{name}-image",
                )
                self.strength = gr.Number(
                    None, label="Strength: how far from it, 0 to 1 (empty: the model's own)", min_width=160
                )
            if len(policies) == 1:
                self.picture = gr.File(
                    label="Or a picture that ttsnap made: its settings",
                    file_types=list(FORMATS),
                    height=110,
                    elem_id=f"tt-{name}-picture",
                )
        self.fields = [
            self.prompt,
            self.unit,
            self.amount,
            self.model,
            self.rewards,
            self.seed,
            self.size,
            self.steps,
            self.image,
            self.strength,
            *self.policies,
        ]


def restored(own: Mapping[str, Any], searches: Searches) -> tuple[list[Any], str]:
    """What the fields of a form with one policy are to say for a picture's settings, and what they cannot.

    Args:
        own: what the picture says of itself.
        searches: what is offered.
    """
    settings, missing = options(own), []
    model = settings.get("model")
    if model not in searches.offered:
        model = searches.offered[0]
        missing.append(f"the model {settings.get('model')}")
    rewards = [name for name in str(settings.get("reward", "")).split(",") if name in searches.rewards]
    if ",".join(rewards) != settings.get("reward"):
        missing.append(f"the reward {settings.get('reward')}")
    width, _, height = str(settings.get("size", "")).partition("x")
    size = int(width) if width.isdigit() and width == height else None
    if settings.get("size") and size is None:
        missing.append(f"the size {settings['size']}")
    steps = settings.get("steps")
    policy = policies.parse(settings["policy"])
    kind = policies.to_dict(policy)["policy"]
    tuned = policy == policies.tuned_policy(model, rewards, steps or 0)
    label = next((label for label, name in POLICIES.items() if name == (None if tuned else kind)), None)
    if label is None or (kind == "halving" and not tuned and policy != policies.default_policy(steps or 0)):
        missing.append("the schedule")
    also = ("guidance", "negative_prompt", "scheduler", "diversity", "weights", "look_frames")
    missing += [name.replace("_", " ") for name in also if name in settings]
    missing += ["the picture that it started from"] if "image" in own.get("local", ()) else []
    values = [own["prompt"], "candidates", settings["candidates"], model, rewards or searches.rewards[:1]]
    values += [settings["seed"], size, steps, None, settings.get("strength")]
    values.append(label or next(iter(POLICIES)))
    said = "These are the settings of the picture"
    return values, f"{said}, but for {', '.join(missing)}, which this page cannot set" if missing else said


def requests(values: Sequence[Any], *, by_hand: bool = False) -> list[Request]:
    """What the fields of a form say, one request per policy."""
    prompt, unit, amount, model, rewards, seed, size, steps, image, strength, *policies = values
    if unit not in UNITS:
        raise ValueError(f"there is no budget in {unit!r}; there is {', '.join(UNITS)}")
    if amount is None or not 0 < float(amount) < 1e12:
        raise ValueError("the budget must be a number above 0")
    kind = UNITS[unit]
    return [
        Request(
            prompt=str(prompt or ""),
            model=str(model),
            rewards=tuple(rewards or ()),
            policy=str(policy),
            budget=None if kind is None else f"{float(amount):.12g}{kind}",
            candidates=int(amount) if kind is None else None,
            seed=int(seed or 0),
            size=int(size) if size else None,
            steps=int(steps) if steps else None,
            image=str(image) if image else None,
            strength=None if strength is None else float(strength),
            by_hand=by_hand,
        )
        for policy in policies
    ]


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
            self.outcome: view.outcome(job.result),
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


def _search_tab(searches: Searches, visitor: gr.BrowserState, name: str) -> None:
    """Search, or with `name` hand the same with a person picking at each look."""
    by_hand = name == "hand"
    if by_hand:
        gr.Markdown(
            "At each look the search waits. The candidates that the reward would keep are ticked; tick and untick as "
            "you like, also those dropped earlier, then continue."
        )
    form = Form(searches, name, ["tuned for the model"])
    with gr.Row():
        go = gr.Button("Search", variant="primary", elem_id=f"tt-{name}-go", min_width=120)
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id=f"tt-{name}-stop", min_width=120)
    status = gr.HTML(elem_id=f"tt-{name}-status")
    result = Result(name)
    compare = gr.Button("What would best-of-N have got for the same cost?", visible=False, elem_id=f"tt-{name}-compare")
    ticked = gr.Textbox(visible=False)
    with gr.Row(visible=by_hand):
        onward = gr.Button("Continue with the ticked", variant="primary", interactive=False, elem_id="tt-hand-continue")
        finish = gr.Button("Finish the ticked after all", interactive=False, elem_id="tt-hand-finish")
    board = gr.HTML(view.EMPTY, elem_id=f"tt-{name}-board")
    result.below()
    outputs = [status, board, go, stop, onward, finish, compare, *result.all]

    def buttons(job: Job) -> Update:
        done = job.result is not None and not job.active
        return {
            go: gr.update(interactive=not job.active),
            stop: gr.update(interactive=job.active),
            onward: gr.update(interactive=job.phase == "picking"),
            finish: gr.update(interactive=done),
            compare: gr.update(visible=done),
        }

    async def follow(job: Job, shown: int) -> AsyncIterator[Update]:
        async for _, picture, line in watch([job], [shown]):
            yield {status: line, **({} if picture is None else {board: picture}), **buttons(job)}
        yield {**buttons(job), **result.show(job)}

    async def begin(request: gr.Request, visitor: str, *values: Any) -> AsyncIterator[Update]:
        try:
            (job,) = searches.begin(str(request.session_hash), name, visitor, requests(values, by_hand=by_hand))
        except Exception as error:
            yield {status: view.error(sentence(error))}
            return
        yield {board: view.EMPTY, status: "", **result.clear(), **buttons(job)}
        async for update in follow(job, 0):
            yield update

    def again(work: Callable[[Job, str], None]) -> Callable[..., AsyncIterator[Update]]:
        async def handle(ticks: str, request: gr.Request) -> AsyncIterator[Update]:
            try:
                job = searches.job(str(request.session_hash), name)
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

    def go_on(ticks: str, request: gr.Request) -> Update:
        try:
            searches.job(str(request.session_hash), name).answer(ticks)
        except Exception as error:
            return {status: view.error(sentence(error))}
        return {onward: gr.update(interactive=False)}

    def halt(request: gr.Request) -> None:
        searches.stop(str(request.session_hash))

    marks = f"() => [[...document.querySelectorAll('#tt-{name}-board input:checked')].map(e => e.value).join(',')]"
    gr.on([go.click, form.prompt.submit], begin, [visitor, *form.fields], outputs, **QUIET)
    form.picture.change(restore, form.picture, [status, *form.fields], **QUIET)
    stop.click(halt, **QUIET)
    onward.click(go_on, ticked, [status, onward], js=marks, **QUIET)
    finish.click(again(lambda job, ticks: job.finish(ticks)), ticked, outputs, js=marks, **QUIET)
    compare.click(again(lambda job, ticks: job.compare()), ticked, outputs, **QUIET)


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

    async def begin(request: gr.Request, visitor: str, *values: Any) -> AsyncIterator[Update]:
        try:
            asked = requests(values)
            if asked[0].budget is None:
                raise ValueError("two policies are compared at a budget in calls, FLOP or seconds, not in candidates")
            jobs = searches.begin(str(request.session_hash), "compare", visitor, asked)
        except Exception as error:
            yield {status: view.error(sentence(error))}
            return
        first: Update = {status: "", go: gr.update(interactive=False), stop: gr.update(interactive=True)}
        for (title, line, outcome, board), job in zip(sides, jobs, strict=True):
            first |= {title: f"### {job.request.policy}", line: "", outcome: "", board: ""}
        yield first
        async for number, picture, text in watch(jobs, [0, 0]):
            _, line, outcome, board = sides[number]
            update: Update = {line: text} | ({} if picture is None else {board: picture})
            ended = jobs[number].result
            yield update | ({outcome: view.outcome(ended)} if ended else {})
        yield {go: gr.update(interactive=True), stop: gr.update(interactive=False)}

    def halt(request: gr.Request) -> None:
        searches.stop(str(request.session_hash))

    gr.on([go.click, form.prompt.submit], begin, [visitor, *form.fields], outputs, **QUIET)
    stop.click(halt, **QUIET)
