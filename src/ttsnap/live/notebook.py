"""A result as a notebook shows it: the picture, what it cost, and the pruning board to open."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

from ttsnap.files.metadata import encode
from ttsnap.live.result import cost_line

if TYPE_CHECKING:
    from PIL.Image import Image

    from ttsnap.live.result import SearchResult

WIDEST = 512  # pixels of the picture; the file behind it keeps its size
BOARD = 1200  # pixels of the board


def html(result: SearchResult) -> str:
    """The HTML of a result, with its pictures inside. Everything that came from outside is escaped."""
    prompt = escape(result.prompt, quote=True)
    parts = [f"<p><strong>{prompt}</strong></p>"]
    if result.images:
        best = result.best
        rewards = ", ".join(f"{name} {value:.3f}" for name, value in best.rewards.items())
        parts.append(f'<img src="{_uri(best.image)}" alt="{prompt}" style="max-width:{WIDEST}px;min-width:128px">')
        parts.append(f"<p>{escape(rewards)} · seed {best.seed}</p>")
    else:
        parts.append("<p>Stopped before an image was finished.</p>")
    stopped = " · stopped" if result.stopped else ""
    counts = f"{result.finished} of {result.started} candidates finished"
    parts.append(f"<p>{counts} · {escape(cost_line(result.cost))} · {escape(result.model)}{stopped}</p>")
    parts += [f"<p>Note: {escape(note)}</p>" for note in result.notes]
    if any(seen.picture is not None for looks in result.history.values() for seen in looks):
        board = result.board()
        board.thumbnail((BOARD, BOARD * 4))
        picture = f'<img src="{_uri(board)}" alt="Every candidate at every look" style="max-width:100%">'
        parts.append(f"<details><summary>How it was found</summary>{picture}</details>")
    return f'<div class="ttsnap-result">{"".join(parts)}</div>'


def _uri(image: Image) -> str:
    return "data:image/png;base64," + base64.b64encode(encode(image)).decode()
