"""The exact checker: does an image show what a prompt asks for? Image analysis only, no network.

Things are connected blobs that differ from the background; a blob's colour is the nearest of the six by hue
direction, its shape the best-matching template. Wanted and found things are matched to agree as far as possible, and
each kind of constraint is judged by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ttsnap.shapes.scenes import (
    BACKGROUND,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZE,
    Noun,
    Spec,
    Thing,
    coverage,
    parse,
)

__all__ = ["Found", "Verdict", "check", "detect", "fidelity", "judge"]

LEAST_AREA = 40  # pixels of a 64 x 64 image; smaller blobs are specks
LEAST_CONTRAST = 45.0  # of 255, distance from the background
LEAST_MATCH = 0.80  # intersection over union with the template of the shape
LEAST_HUE = 0.93  # cosine between a blob's colour and its named colour, background subtracted
LEAST_HOLE = 0.5  # how much darker a hollow thing's middle is, of its brightness
MIDDLE = 2.0  # pixels from its centre
MOST_THINGS = 7  # that are matched with the wanted ones, the largest first


@dataclass(frozen=True)
class Found:
    """A thing found in an image; None where no colour or shape fits, or where holes were not looked for.

    Attributes:
        x: of the centre, in pixels of the looked-at image.
        y: likewise.
        area: likewise.
        match: intersection over union with the template of its shape.
        hole: how dark its middle is, 0 as the thing itself to 1 as the background.
    """

    colour: str | None
    shape: str | None
    x: float
    y: float
    area: float
    match: float = 0.0
    hole: float | None = None

    @property
    def hollow(self) -> bool | None:
        """Whether it has a hole."""
        return None if self.hole is None else self.hole > LEAST_HOLE


@dataclass(frozen=True)
class Verdict:
    """Which kinds of constraints an image meets. A single thing's relation is always met."""

    count: bool
    colour: bool
    shape: bool
    relation: bool
    hollow: bool = True

    @property
    def all(self) -> bool:
        """Whether everything is met."""
        return self.count and self.colour and self.shape and self.relation and self.hollow


def check(image: NDArray[np.uint8], prompt: str | Spec) -> Verdict:
    """Judge an image [h, w, 3] (uint8) against a prompt of this world."""
    return judge(detect(image), parse(prompt) if isinstance(prompt, str) else prompt)


def judge(found: list[Found], spec: Spec) -> Verdict:
    """Judge the things found in an image against what a prompt asks for."""
    wanted = spec.things
    complete = len(found) >= len(wanted)
    best: tuple[int, int, bool, float] | None = None
    verdict = Verdict(len(found) == len(wanted), False, False, False, False)
    for chosen in permutations(found[:MOST_THINGS], min(len(found), len(wanted))):
        pairs = list(zip(wanted, chosen, strict=False))
        colours = sum(want.colour == thing.colour for want, thing in pairs)
        shapes = sum(want.shape == thing.shape for want, thing in pairs)
        hollows = sum(thing.hollow in (None, want.hollow) for want, thing in pairs)
        both = sum(_is(thing, want) for want, thing in pairs)
        related = complete and _related(spec, list(chosen))
        merit = (both, colours + shapes + hollows, related, sum(thing.area for thing in chosen))
        if best is None or merit > best:
            best = merit
            verdict = Verdict(
                count=len(found) == len(wanted),
                colour=complete and colours == len(wanted),
                shape=complete and shapes == len(wanted),
                relation=related,
                hollow=complete and hollows == len(wanted),
            )
    return verdict


def _is(thing: Found, noun: Noun) -> bool:
    """Whether a found thing is what a noun names."""
    return (thing.colour, thing.shape) == noun[:2] and thing.hollow in (None, noun.hollow)


def _related(spec: Spec, things: list[Found]) -> bool:
    """Whether each thing lies to the next as asked; the axis of the relation must dominate."""
    for relation, thing, other in zip(spec.relations, things, things[1:], strict=False):
        dx, dy = thing.x - other.x, thing.y - other.y
        along, across = (dx, dy) if relation in RELATIONS[:2] else (dy, dx)
        sign = -1 if relation in ("left of", "above") else 1
        if not (sign * along > 4 and abs(along) > abs(across)):
            return False
    return True


def fidelity(found: list[Found]) -> float:
    """How well drawn the things of an image are, 0..1, whatever was asked for: clean shapes, holes dark or none."""
    if not found:
        return 0.0
    kept = []
    for thing in found:
        hole = thing.hole or 0.0
        kept.append(thing.match * (hole if thing.hollow else 1 - hole))
    return float(np.mean(kept))


def detect(image: NDArray[np.uint8], size: int = SIZE, *, holes: bool = False) -> list[Found]:
    """All things in an image [h, w, 3] (uint8), largest first.

    Args:
        image: of any size.
        size: pixels a side at which it is looked at.
        holes: whether to look for holes.
    """
    pixels = np.asarray(image, dtype=np.float32)
    if pixels.shape[:2] != (size, size):
        zoom = (size / pixels.shape[0], size / pixels.shape[1], 1)
        pixels = ndimage.zoom(pixels, zoom, order=1)
    difference = pixels - np.asarray(BACKGROUND, dtype=np.float32)
    strength = np.sqrt((difference**2).sum(-1))
    hue = difference / np.maximum(strength, 1e-6)[..., None]
    likeness = hue @ _hues().T  # [size, size, colours]
    nearest = likeness.argmax(-1)
    seen = strength > LEAST_CONTRAST
    blobs, _ = ndimage.label(seen)
    found: list[Found] = []
    for number, place in enumerate(ndimage.find_objects(blobs), 1):
        blob = np.zeros_like(seen)
        blob[place] = blobs[place] == number
        for mask in _by_colour(blob, nearest, strength):
            if mask.sum() >= LEAST_AREA:
                found.append(_describe(mask, difference, strength, holes))
    return sorted(found, key=lambda thing: -thing.area)


def _by_colour(
    blob: NDArray[np.bool_], nearest: NDArray[np.intp], strength: NDArray[np.float32]
) -> list[NDArray[np.bool_]]:
    """Split a blob in which two colours touch; edge pixels of other hues stay with the largest part."""
    core = blob & (strength > 80)
    parts = []
    for colour in np.unique(nearest[core]) if core.any() else []:
        labels, count = ndimage.label(core & (nearest == colour))
        parts += [labels == i for i in range(1, count + 1) if (labels == i).sum() >= LEAST_AREA]
    if len(parts) <= 1:
        return [blob]
    distance = np.stack([ndimage.distance_transform_edt(~part) for part in parts])
    owner = distance.argmin(0)
    return [blob & (owner == i) for i in range(len(parts))]


def _describe(
    mask: NDArray[np.bool_], difference: NDArray[np.float32], strength: NDArray[np.float32], holes: bool
) -> Found:
    inner = ndimage.binary_erosion(mask)
    inner = inner if inner.sum() >= 20 else mask
    mean = np.median(difference[inner], axis=0)
    likeness = (mean / max(float(np.linalg.norm(mean)), 1e-6)) @ _hues().T
    colour = tuple(COLOURS)[int(likeness.argmax())] if likeness.max() >= LEAST_HUE else None
    # Half-covered edge pixels count half: coverage is contrast relative to the thing's own.
    cover = np.where(mask, np.clip(strength / max(float(np.median(strength[inner])), 1.0), 0, 1), 0)
    shown = cover
    if holes:
        filled = ndimage.binary_fill_holes(mask)
        cover = np.where(ndimage.binary_erosion(filled), 1.0, cover)
        mask = filled
    area = float(cover.sum())
    rows, columns = np.nonzero(mask)
    y = float((cover[rows, columns] * (rows + 0.5)).sum() / area)
    x = float((cover[rows, columns] * (columns + 0.5)).sum() / area)
    matches = [_match(shape, cover, x, y, area) for shape in SHAPES]
    best = int(np.argmax(matches))
    hole = _hole(shown, x, y) if holes else None
    return Found(colour, SHAPES[best] if matches[best] >= LEAST_MATCH else None, x, y, area, matches[best], hole)


def _hole(cover: NDArray[np.float64], x: float, y: float) -> float:
    """How little of the middle of a thing is covered, 0..1."""
    axis = np.arange(len(cover)) + 0.5
    middle = np.hypot(axis[None] - x, axis[:, None] - y) <= MIDDLE
    return float(1 - cover[middle].mean()) if middle.any() else 0.0


def _match(shape: str, cover: NDArray[np.float64], x: float, y: float, area: float) -> float:
    """Soft intersection over union with the template of the same area and centre."""
    unit, lift = _template(shape)
    size = float(np.sqrt(area / unit))
    template = coverage([Thing("red", shape, x, y - lift * size, size)], len(cover))[0]
    return float(np.minimum(template, cover).sum() / np.maximum(template, cover).sum())


@cache
def _template(shape: str) -> tuple[float, float]:
    """Area of a shape of size 1 and how far its centroid lies below its centre."""
    cover = coverage([Thing("red", shape, 32, 32, 20)])[0]
    area = float(cover.sum())
    rows = np.arange(64) + 0.5
    return area / 400, (float((cover.sum(1) * rows).sum()) / area - 32) / 20


@cache
def _hues() -> NDArray[np.float32]:
    colours = np.asarray(list(COLOURS.values()), dtype=np.float32) - np.asarray(BACKGROUND, dtype=np.float32)
    return np.asarray(colours / np.linalg.norm(colours, axis=1, keepdims=True), dtype=np.float32)
