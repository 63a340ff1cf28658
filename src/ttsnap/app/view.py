"""The pruning board and its status line as HTML. Everything that came from outside is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from ttsnap.app.history import ALIVE, CUT, FINISHED, RUNNING, WAITING, WINNER, History, Tile
from ttsnap.core.cost import format_amount
from ttsnap.live.result import cost_line

if TYPE_CHECKING:
    from PIL.Image import Image

    from ttsnap.live.reporting import HeldOut
    from ttsnap.live.result import SearchResult

MOST_PIXELS = 192  # longest side of a preview on the board
SAYS = {
    WAITING: "not begun",
    RUNNING: "on its way",
    ALIVE: "alive",
    CUT: "dropped",
    FINISHED: "finished",
    WINNER: "the winner",
}
EMPTY = '<p class="tt-hint">The board fills here: every candidate, what it is about to become, and its reward.</p>'


def board(history: History, *, ticks: bool = False, more: bool = False, late: bool = False) -> str:
    """All candidates, in the order of their seeds, so that each keeps its place.

    Args:
        history: what happened so far.
        ticks: a box to tick on each candidate that is not finished; those proposed are ticked.
        more: beside it, a box for more like the candidate.
        late: the search is over: those that are finished have a box, too.
    """
    if not history.tiles:
        return EMPTY
    items = "".join(_tile(tile, history.num_steps, ticks or late, more, late) for tile in history.tiles)
    kind = (" tt-many" if len(history.tiles) > 16 else "") + (" tt-missed" if history.missed else "")
    return f'<ol class="tt-board{kind}" aria-label="Candidates">{items}</ol>{_rungs(history)}'


def _tile(tile: Tile, num_steps: int, ticks: bool, more: bool, late: bool) -> str:
    reward = "" if tile.reward is None else f"{tile.reward:.2f}"
    child = "" if tile.parent is None else f", child of {tile.parent}"
    says = f"seed {tile.seed}{child}, {SAYS[tile.state]}"
    if tile.step:
        says += f" after {tile.step} of {num_steps} calls"
    if reward:
        says += f", reward {reward}"
    if tile.picture is None:
        inside = f'<span class="tt-blank" role="img" aria-label="{says}"></span>'
    else:
        inside = f'<img src="{uri(tile.picture)}" alt="{says}">'
    name = f"#{tile.seed}" if tile.parent is None else f"#{tile.seed}&lt;{tile.parent}"
    caption = f'<span class="tt-seed">{name}</span><span class="tt-reward">{reward}</span>'
    if ticks and (late or tile.state not in (FINISHED, WINNER)):
        on = " checked" if tile.proposed else ""
        box = f'<input type="checkbox" value="{tile.seed}"{on} aria-label="keep {says}">'
        like = ""
        if more and tile.state == ALIVE:
            like = f'<label class="tt-more"><input type="checkbox" value="{tile.seed}+"> more like it</label>'
        return f'<li class="tt-tile tt-{tile.state}"><label>{box}{inside}{caption}</label>{like}</li>'
    return f'<li class="tt-tile tt-{tile.state}">{inside}{caption}</li>'


def _rungs(history: History) -> str:
    if not history.rungs:
        return ""
    rows = ""
    for number, rung in enumerate(history.rungs):
        following = history.rungs[number + 1 : number + 2]
        went_on = str(following[0].looked_at) if following else ("" if rung.step == history.num_steps else "…")
        name = f"draft of {rung.step} calls" if rung.draft else f"call {rung.step}"
        name = "finished" if rung.step == history.num_steps else name
        rows += f"<tr><th>{name}</th><td>{rung.looked_at}</td><td>{rung.best:.2f}</td><td>{went_on}</td></tr>"
    head = "<tr><th>look</th><th>looked at</th><th>best reward</th><th>went on</th></tr>"
    return f'<table class="tt-rungs"><thead>{head}</thead><tbody>{rows}</tbody></table>'


def progress(history: History, what: str) -> str:
    """One line that says what goes on, what is spent and how long it takes."""
    parts, bar = [what], ""
    if history.planned is not None:
        planned, spent = history.planned, format_amount(history.tflop, "TFLOP")
        beyond = history.calls > planned.nfe  # more was kept than the policy proposes, or finished after all
        if history.over or beyond:
            parts.append(f"spent {spent}, {history.calls} calls")
            if history.calls != planned.nfe:
                parts.append(f"planned were {format_amount(planned.tflop, 'TFLOP')}, {planned.nfe} calls")
        else:
            parts.append(f"spent {spent} of {format_amount(planned.tflop, 'TFLOP')}")
            parts.append(f"{history.calls} of {planned.nfe} calls")
            if (left := history.seconds_left) is not None:
                parts.append(f"about {left:.0f} s left")
        if not history.over:
            share = min(1.0, history.calls / max(1, planned.nfe))
            bar = f'<progress max="1" value="{share:.3f}" aria-label="denoiser calls made"></progress>'
    return status(" · ".join(parts)) + bar


def status(text: str) -> str:
    """A line that screen readers are told of."""
    return f'<p class="tt-status" role="status">{escape(text)}</p>'


def hint(text: str, *, wrong: bool = False) -> str:
    """What is to be said before a search runs; `wrong` where it will not."""
    return f'<p class="{"tt-error" if wrong else "tt-note"}" role="status">{escape(text)}</p>'


def error(text: str) -> str:
    """What went wrong, in one sentence."""
    return f'<p class="tt-error" role="alert">{escape(text)}</p>'


def doing(history: History) -> str:
    """What the search does at this moment."""
    if not history.tiles:
        return "Starting"
    if history.goal == history.num_steps:
        return f"Finishing {history.running} of {len(history.tiles)}"
    return f"Bringing {history.running} of {len(history.tiles)} to call {history.goal} of {history.num_steps}"


def outcome(result: SearchResult, said: str = "") -> str:
    """The winner, large, what rewards that steered nothing say of it, and what it cost.

    Args:
        result: of a search that is over.
        said: how it ended, if not by its policy.
    """
    if not result.images:
        return status("Stopped before an image was finished; nothing is lost but the calls: " + cost_line(result.cost))
    best = result.best
    rewards = ", ".join(f"{name} {value:.3f}" for name, value in best.rewards.items())
    stopped = "The search was stopped; this is the best of what was finished." if result.stopped else ""
    facts = (
        f"{rewards} · seed {best.seed} · {result.finished} of {result.started} finished · {cost_line(result.cost)}. "
    )
    facts += said or stopped
    notes = "".join(f"<p>Note: {escape(note)}</p>" for note in result.notes)
    missed = misses(result)
    verdicts = "".join(f"<br>{escape(_verdict(held_out))}" for held_out in result.held_out)
    title = f"The best that was found, seed {best.seed}" if missed else f"The winner, seed {best.seed}"
    figures = _figure(best.image, title, result.prompt, facts, "tt-miss" if missed else "tt-win", verdicts)
    for other in (result.best_of_n, *result.best_of_n_at):
        if other.best is None:
            continue
        steps = f", with {other.num_steps} steps" if other.num_steps else ""
        title = f"Best of {other.candidates} for the same cost{steps}"
        text = f"reward {other.best.reward:.3f} against {best.reward:.3f} · seed {other.best.seed}"
        figures += _figure(other.best.image, title, result.prompt, text, "")
    return f'<div class="tt-outcome">{figures}</div>{notes}'


def misses(result: SearchResult) -> bool:
    """Whether a reward that steered nothing finds that the winner does not show what was asked for."""
    return any(held_out.missed for held_out in result.held_out)


def _verdict(held_out: HeldOut) -> str:
    value = f"{held_out.name}, which steered nothing: {held_out.reward:.3f}"
    if held_out.missed:
        return f"It misses something that was asked for. {value} of {held_out.perfect:g}"
    if held_out.perfect is not None:
        return f"It shows all that was asked for. {value} of {held_out.perfect:g}"
    worse = "; worse than the median of the finished, so the rewards may part" if held_out.parted else ""
    return f"{value} (median of {held_out.images} finished: {held_out.median:.3f}){worse}"


def _figure(image: Image, title: str, prompt: str, text: str, kind: str, verdicts: str = "") -> str:
    return (
        f'<figure class="{kind}"><img src="{_png(image)}" alt="{escape(title)}: {escape(prompt, quote=True)}">'
        f"<figcaption><strong>{escape(title)}</strong>{verdicts}<br>{escape(text)}</figcaption></figure>"
    )


def picked(text: str, seeds: Sequence[int]) -> np.ndarray:
    """The mask [1, candidates] of ticked seeds, such as `3,5`, as the page sends them; `5+` asks for more like it, too.

    Raises:
        ValueError: something else than seeds of this search, or none.
    """
    try:
        wanted = {int(part.strip().removesuffix("+")) for part in text.split(",") if part.strip()}
    except ValueError:
        wanted = {-1}
    if wanted - set(seeds):
        raise ValueError("only candidates of this search can be picked")
    if not wanted:
        raise ValueError("tick at least one candidate")
    return np.array([[seed in wanted for seed in seeds]])


def more_like(text: str, seeds: Sequence[int], keep: np.ndarray) -> np.ndarray:
    """How many children each candidate has [1, candidates]: two, of those marked as `5+`, as long as there are places.

    Args:
        text: as for `picked`.
        seeds: of the candidates.
        keep: who goes on [1, candidates]; the places of the others are free.
    """
    marked = {part.strip() for part in text.split(",") if part.strip().endswith("+")}
    each = min(2, int((~keep).sum()) // max(1, len(marked)))
    return np.array([[each if f"{seed}+" in marked else 0 for seed in seeds]])


def uri(picture: np.ndarray) -> str:
    """A preview as a data URI."""
    return _uri(picture.tobytes(), picture.shape)


@lru_cache(maxsize=2048)
def _uri(data: bytes, shape: tuple[int, ...]) -> str:
    from PIL import Image

    image = Image.fromarray(np.frombuffer(data, dtype=np.uint8).reshape(shape))
    if max(image.size) > MOST_PIXELS:
        image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _png(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
