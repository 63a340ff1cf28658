"""The pruning board: one picture that tells the whole story of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, SOFT, GOLD, CUT, KEPT = "#ffffff", "#1c1f24", "#6a717c", "#e8a200", "#c7402d", "#2f8f5b"
WIDTH, MARGIN, GAP = 1240, 40, 8
MOST_TILES = 48
LEGEND = (
    "Each small picture is what the model, at that step, expects the finished image to be; below it its reward. "
    "Struck: dropped there. Gold frame: the winner."
)


@dataclass(frozen=True)
class Tile:
    """One candidate at one look: its x0 preview, its reward, whether it went on or wins, and its name, if any."""

    seed: int
    image: Image.Image
    reward: float
    kept: bool
    wins: bool = False
    name: str = ""


@dataclass(frozen=True)
class Row:
    """One look: all candidates that were alive after `step` denoiser calls, or drafts with so many steps."""

    step: int
    tiles: Sequence[Tile]
    draft: bool = False


@dataclass(frozen=True)
class Finish:
    """A finished image with what to say about it."""

    title: str
    image: Image.Image
    lines: Sequence[str]


def draw(
    prompt: str,
    num_steps: int,
    rows: Sequence[Row],
    finishes: Sequence[Finish],
    facts: Sequence[str],
) -> Image.Image:
    """Draw the board.

    Args:
        prompt: the title.
        num_steps: denoiser calls of a finished image.
        rows: the looks in order, the finished images last.
        finishes: the winner, then what it is compared with, drawn large at the bottom.
        facts: lines under the title.
    """
    canvas = _Canvas()
    canvas.text(f"“{prompt}”", 30, INK, bold=True)
    for line in facts:
        canvas.text(line, 17, SOFT)
    canvas.text(LEGEND, 17, SOFT)
    canvas.space(14)
    for number, row in enumerate(rows):
        last = row.step == num_steps
        alive, kept = len(row.tiles), sum(tile.kept for tile in row.tiles)
        head = (
            f"Finished ({num_steps} of {num_steps} steps)"
            if last
            else f"Drafts of {row.step} steps"
            if row.draft
            else f"Look {number + 1}: step {row.step} of {num_steps}"
        )
        tail = f"{alive} finished, the best one wins" if last else f"{alive} alive, the best {kept} go on"
        if not last and kept == alive:
            tail = f"{alive} alive, all go on"
        if row.draft:
            tail = f"{alive} drafted, the seeds of the best {kept} are begun anew"
        if alive == 1 and last:
            tail = "1 finished"
        canvas.heading(head, tail)
        canvas.tiles(sorted(row.tiles, key=lambda tile: (-tile.reward, tile.seed)))
    canvas.finishes(finishes)
    return canvas.crop()


def font(size: int, bold: bool = False) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font, so that boards look the same everywhere."""
    return ImageFont.load_default(size)


class _Canvas:
    """A page that grows downwards."""

    def __init__(self) -> None:
        self.page = Image.new("RGB", (WIDTH, 400), PAPER)
        self.draw = ImageDraw.Draw(self.page)
        self.y = MARGIN

    def space(self, height: int) -> None:
        self.y += height

    def room(self, height: int) -> None:
        """Make sure that `height` more pixels fit below."""
        if self.y + height + MARGIN > self.page.height:
            page = Image.new("RGB", (WIDTH, 2 * (self.y + height + MARGIN)), PAPER)
            page.paste(self.page, (0, 0))
            self.page, self.draw = page, ImageDraw.Draw(page)

    def crop(self) -> Image.Image:
        return self.page.crop((0, 0, WIDTH, self.y + MARGIN))

    def text(self, text: str, size: int, colour: str, bold: bool = False) -> None:
        for line in wrap(text, font(size), WIDTH - 2 * MARGIN):
            self.room(size + 10)
            self.draw.text((MARGIN, self.y), line, fill=colour, font=font(size), stroke_width=0.4 if bold else 0)
            self.y += size + 8

    def heading(self, head: str, tail: str) -> None:
        self.room(60)
        self.space(10)
        self.draw.line([(MARGIN, self.y), (WIDTH - MARGIN, self.y)], fill="#dfe2e6", width=1)
        self.space(12)
        self.draw.text((MARGIN, self.y), head, fill=INK, font=font(20), stroke_width=0.4)
        offset = font(20).getlength(head) + 18
        self.draw.text((MARGIN + offset, self.y + 2), tail, fill=SOFT, font=font(18))
        self.space(36)

    def tiles(self, tiles: Sequence[Tile]) -> None:
        """A grid of previews, best first; the cut ones dimmed and struck, the winner framed."""
        shown = list(tiles[:MOST_TILES])
        if framed := [tile for tile in tiles[MOST_TILES:] if tile.wins]:
            shown[-1:] = framed
        inner = WIDTH - 2 * MARGIN
        side = max(72, min(150, (inner + GAP) // max(1, min(len(shown), 16)) - GAP))
        columns = (inner + GAP) // (side + GAP)
        for start in range(0, len(shown), columns):
            self.room(side + 34)
            for column, tile in enumerate(shown[start : start + columns]):
                self.tile(tile, MARGIN + column * (side + GAP), side)
            self.space(side + 32)
        if len(tiles) > len(shown):
            self.text(f"… and {len(tiles) - len(shown)} more", 16, SOFT)

    def tile(self, tile: Tile, x: int, side: int) -> None:
        y = self.y
        picture = fit(tile.image, side)
        if not tile.kept:
            picture = Image.blend(picture, Image.new("RGB", picture.size, PAPER), 0.6)
        self.page.paste(picture, (x, y))
        if not tile.kept:
            self.draw.line([(x + 6, y + side - 6), (x + side - 6, y + 6)], fill=CUT, width=3)
        if tile.wins:
            self.draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), outline=GOLD, width=4)
        caption = f"{tile.name} {tile.reward:.2f}".strip()
        small = font(14)
        middle = x + (side - small.getlength(caption)) / 2
        self.draw.text((middle, y + side + 5), caption, fill=INK if tile.kept else SOFT, font=small)

    def finishes(self, finishes: Sequence[Finish]) -> None:
        if not finishes:
            return
        self.heading("Result", "")
        side = min(360, (WIDTH - 2 * MARGIN - 60 * (len(finishes) - 1)) // max(2, len(finishes)))
        small = font(16)
        texts = [[part for line in finish.lines for part in wrap(line, small, side + 40)] for finish in finishes]
        self.room(side + 40 + 25 * max(len(lines) + 1 for lines in texts))
        lowest = self.y
        for number, (finish, lines) in enumerate(zip(finishes, texts, strict=True)):
            x, y = MARGIN + number * (side + 60), self.y
            self.page.paste(fit(finish.image, side), (x, y))
            if number == 0:
                self.draw.rectangle((x - 4, y - 4, x + side + 3, y + side + 3), outline=GOLD, width=5)
            y += side + 14
            self.draw.text((x, y), finish.title, fill=INK, font=font(19), stroke_width=0.4)
            for line in lines:
                y += 25
                self.draw.text((x, y), line, fill=SOFT, font=small)
            lowest = max(lowest, y + 25)
        self.y = lowest


def fit(image: Image.Image, side: int) -> Image.Image:
    """The image in a square of `side` pixels, whole, on a quiet ground."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), "#f1f2f4")
    square.paste(small, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def wrap(text: str, face: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Break a text into lines that fit; very long words are broken too, and more than six lines are cut."""
    lines, line = [], ""
    for word in text.split():
        while face.getlength(word) > width:
            part = math.floor(len(word) * width / face.getlength(word))
            lines.append(word[:part])
            word = word[part:]
        if line and face.getlength(f"{line} {word}") > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    lines = [*lines, line]
    return lines if len(lines) <= 6 else [*lines[:5], lines[5] + " …"]
