"""The tab of past runs: their pictures to look through, download, share, and begin again from."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ttsnap.app import explore, view
from ttsnap.app.form import QUIET, Form, Update, restored
from ttsnap.app.job import sentence
from ttsnap.app.searches import Searches
from ttsnap.files import metadata
from ttsnap.files.storage import write_json

MOST = 120  # pictures in the gallery; the search finds the others
SIDE = 256
NOTHING = '<p class="tt-hint">No run yet. What you search for on this page appears here, the latest first.</p>'


def past(searches: Searches, visitor: str | None, wanted: str = "") -> list[Path]:
    """Folders of a visitor's runs that have a picture and all words of `wanted` in their prompt, the latest first."""
    try:
        found = sorted(searches.home(visitor).glob("*/result.json"), key=lambda path: path.parent.name, reverse=True)
    except ValueError:
        return []
    words = wanted.lower().split()
    with_picture = [path.parent for path in found if (path.parent / "best.png").is_file()]
    return [folder for folder in with_picture if all(word in _prompt(folder).lower() for word in words)][:MOST]


def share(searches: Searches, folder: Path) -> str:
    """A name under which a run can be opened by everybody who knows it and can open the page."""
    place = searches.out / ".shared"
    place.mkdir(exist_ok=True)
    for file in place.glob("*.json"):
        if json.loads(file.read_text(encoding="utf-8"))["run"] == str(folder.relative_to(searches.out)):
            return file.stem
    token = secrets.token_urlsafe(16)
    write_json({"run": str(folder.relative_to(searches.out))}, place / f"{token}.json")
    return token


def shared(searches: Searches, token: str) -> Path:
    """The folder of a run that was shared.

    Raises:
        ValueError: none was by that name, or it is gone.
    """
    file = searches.out / ".shared" / f"{token}.json"
    if not re.fullmatch(r"[A-Za-z0-9_-]{22}", token) or not file.is_file():
        raise ValueError("there is no run by that link")
    folder = searches.out / json.loads(file.read_text(encoding="utf-8"))["run"]
    if not (folder / "result.json").is_file():
        raise ValueError("the run of that link is not there any more")
    return Path(folder)


@lru_cache(maxsize=4096)
def _prompt(folder: Path) -> str:
    return str(json.loads((folder / "result.json").read_text(encoding="utf-8"))["prompt"])


@lru_cache(maxsize=512)
def _thumbnail(file: Path, changed: float) -> Image.Image:
    with Image.open(file) as image:
        image.thumbnail((SIDE, SIDE))
        return image.convert("RGB")


def build(
    searches: Searches, visitor: gr.BrowserState, tab: gr.Tab, tabs: gr.Tabs, form: Form
) -> tuple[Callable[..., Any], list[Any]]:
    """The tab; answers with what opens the run of a link, and where it is shown.

    Args:
        searches: what is offered.
        visitor: who looks.
        tab: of the page.
        tabs: all of them.
        form: that takes the settings of a run.
    """
    wanted = gr.Textbox(label="Words of the prompt", placeholder="all runs", elem_id="tt-runs-wanted")
    said = gr.HTML(NOTHING, elem_id="tt-runs-said")
    gallery = gr.Gallery(
        label="Runs",
        show_label=False,
        columns=None,
        height="auto",
        fit_columns=False,
        allow_preview=False,
        object_fit="contain",
        elem_id="tt-runs-gallery",
        visible=False,
        buttons=[],
    )
    shown, opened = gr.State([]), gr.State(None)
    with gr.Column(visible=False) as one:
        with gr.Row():
            again = gr.Button("Use these settings", variant="primary", size="sm", min_width=130, elem_id="tt-runs-use")
            image = gr.DownloadButton("Image", size="sm", min_width=90)
            board = gr.DownloadButton("Board", size="sm", min_width=90)
            record = gr.DownloadButton("result.json", size="sm", min_width=90)
            link = gr.Button("Link to this run", size="sm", min_width=120, elem_id="tt-runs-share")
        address = gr.Textbox(
            label="Whoever can open this page sees the run by this link",
            interactive=False,
            visible=False,
            buttons=["copy"],
            elem_id="tt-runs-link",
        )
        run = gr.HTML(elem_id="tt-runs-run", elem_classes="tt-figure")
    parts = [one, opened, image, board, record, address, run, said]

    def look(visitor: str | None, words: str) -> Update:
        folders = past(searches, visitor, words or "")
        files = [folder / "best.png" for folder in folders]
        pictures = [(_thumbnail(file, file.stat().st_mtime), _prompt(file.parent)) for file in files]
        none = view.hint("no run has these words in its prompt") if words else NOTHING
        return {
            shown: [str(folder) for folder in folders],
            gallery: gr.update(value=pictures, visible=bool(pictures), selected_index=None),
            said: "" if pictures else none,
        }

    def show(folder: Path) -> Update:
        files = [folder / name for name in ("best.png", "board.png", "result.json")]
        downloads = [gr.update(value=str(f) if f.is_file() else None, interactive=f.is_file()) for f in files]
        return {
            one: gr.update(visible=True),
            opened: str(folder),
            **dict(zip((image, board, record), downloads, strict=True)),
            address: gr.update(visible=False),
            run: explore.show_run(folder),
            said: "",
        }

    def pick(visitor: str | None, folders: list[str], event: gr.SelectData) -> Update:
        mine = set(past(searches, visitor))
        folder = Path(folders[int(event.index)])
        return show(folder) if folder in mine else {said: view.error("that run is not there any more")}

    def use(folder: str) -> Update:
        try:
            own = metadata.read(Path(folder) / "best.png").own
            if own is None:
                raise ValueError("the picture of this run does not say how it was made")
            values, told = restored(own, searches)
        except Exception as error:
            return {said: view.error(sentence(error))}
        return {
            tabs: gr.update(selected="search"),
            form.hint: view.hint(told.replace("picture", "run")),
            **dict(zip(form.fields, values, strict=True)),
        }

    def give(folder: str, request: gr.Request) -> Update:
        origin = str(request.headers.get("origin") or request.headers.get("referer") or "").split("?")[0].rstrip("/")
        return {address: gr.update(value=f"{origin}/?run={share(searches, Path(folder))}", visible=True)}

    def visit(request: gr.Request) -> Update:
        token = request.query_params.get("run")
        if not token:
            return {said: gr.skip()}
        try:
            return {tabs: gr.update(selected="runs"), **show(shared(searches, str(token)))}
        except ValueError as error:
            return {tabs: gr.update(selected="runs"), said: view.error(str(error))}

    tab.select(look, [visitor, wanted], [shown, gallery, said], **QUIET)
    wanted.change(look, [visitor, wanted], [shown, gallery, said], trigger_mode="always_last", **QUIET)
    gallery.select(pick, [visitor, shown], parts, **QUIET)
    again.click(use, opened, [tabs, said, form.hint, *form.fields], **QUIET)
    link.click(give, opened, address, **QUIET)
    return visit, [tabs, *parts]
