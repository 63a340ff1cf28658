"""A contact sheet: pictures in the order of their rewards, in one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from ttsnap.files.decoding import decode, read_file
from ttsnap.live.board import GAP, INK, MARGIN, PAPER, SOFT, WIDTH, fit, font, wrap

if TYPE_CHECKING:
    from ttsnap.live.scoring import Scored, Scores

MOST = 200  # pictures on a sheet
COLUMNS = 8
SIDE = (WIDTH - 2 * MARGIN + GAP) // COLUMNS - GAP
LINE = 17


def contact_sheet(scores: Scores) -> Image.Image:
    """The scored pictures of files, the best first, each with its rank, its rewards and its name.

    Of more than 200 the best hundred are shown, and a hundred at equal distances among the others.
    """
    ranked = [(place, picture) for place, picture in enumerate(scores.ranked, 1) if picture.path]
    chosen = _chosen(ranked)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        small = list(pool.map(lambda one: _small(one[1]), chosen))
    height = SIDE + 12 + LINE * (1 + len(scores.rewards))
    head = [f"{len(scores.ranked)} pictures by {', '.join(scores.rewards)}, the best first"]
    if len(chosen) < len(ranked):
        head.append(f"Shown are the best {MOST // 2}, and {MOST // 2} at equal distances among the others.")
    lines = [line for text in head for line in wrap(text, font(20), WIDTH - 2 * MARGIN)]
    top = MARGIN + 28 * len(lines) + 10
    page = Image.new("RGB", (WIDTH, top + -(-len(chosen) // COLUMNS) * height + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + 28 * number), line, fill=INK, font=font(20))
    for number, ((place, picture), tile) in enumerate(zip(chosen, small, strict=True)):
        x, y = MARGIN + number % COLUMNS * (SIDE + GAP), top + number // COLUMNS * height
        if tile is not None:
            page.paste(tile, (x, y))
        values = [f"{picture.rewards[name]:.4g}" for name in scores.rewards]
        captions = [(f"{place}.  {values[0]}", INK), *((value, INK) for value in values[1:])]
        for row, (text, colour) in enumerate([*captions, (_short(picture), SOFT)]):
            draw.text((x, y + SIDE + 2 + LINE * row), text, fill=colour, font=font(13))
    return page


def _chosen(ranked: Sequence[tuple[int, Scored]]) -> Sequence[tuple[int, Scored]]:
    if len(ranked) <= MOST:
        return ranked
    half, rest = MOST // 2, len(ranked) - MOST // 2
    return [*ranked[:half], *(ranked[half + (number + 1) * rest // half - 1] for number in range(half))]


def _small(picture: Scored) -> Image.Image | None:
    """A picture in the square of a tile; None if its file is gone since it was judged."""
    assert picture.path is not None
    try:
        return fit(decode(read_file(picture.path), least=2 * SIDE).picture, SIDE)
    except ValueError:
        return None


def _short(picture: Scored) -> str:
    """The name of a file, its middle left out where it does not fit."""
    assert picture.path is not None
    name, face = picture.name.rsplit("/", 1)[-1], font(13)
    shown, kept = name, len(name)
    while face.getlength(shown) > SIDE and kept > 2:
        kept -= 1
        shown = f"{name[: kept - kept // 2]}…{name[-(kept // 2) :]}"
    return shown
