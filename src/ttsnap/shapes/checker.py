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

from ttsnap.shapes.scenes import BACKGROUND, COLOURS, RELATIONS, SHAPES, Spec, Thing, coverage, parse

__all__ = ["Found", "Verdict", "check", "detect", "judge"]

LEAST_AREA = 40  # pixels of a 64 x 64 image; smaller blobs are specks
LEAST_CONTRAST = 45.0  # of 255, distance from the background
LEAST_MATCH = 0.80  # intersection over union with the template of the shape
LEAST_HUE = 0.93  # cosine between a blob's colour and its named colour, background subtracted


@dataclass(frozen=True)
class Found:
    """A thing found in an image; centre in pixels of a 64 x 64 image, None where no colour or shape fits."""

    colour: str | None
    shape: str | None
    x: float
    y: float
    area: float


@dataclass(frozen=True)
class Verdict:
    """Which kinds of constraints an image meets. A single thing's relation is always met."""

    count: bool
    colour: bool
    shape: bool
    relation: bool

    @property
    def all(self) -> bool:
        """Whether everything is met."""
        return self.count and self.colour and self.shape and self.relation


def check(image: NDArray[np.uint8], prompt: str | Spec) -> Verdict:
    """Judge an image [h, w, 3] (uint8) against a prompt of this world."""
    return judge(detect(image), parse(prompt) if isinstance(prompt, str) else prompt)


def judge(found: list[Found], spec: Spec) -> Verdict:
    """Judge the things found in an image against what a prompt asks for."""
    wanted = spec.things
    complete = len(found) >= len(wanted)
    best: tuple[int, int, bool, float] | None = None
    verdict = Verdict(len(found) == len(wanted), False, False, False)
    for chosen in permutations(found, min(len(found), len(wanted))):
        pairs = list(zip(wanted, chosen, strict=False))
        colours = sum(want[0] == thing.colour for want, thing in pairs)
        shapes = sum(want[1] == thing.shape for want, thing in pairs)
        both = sum(want == (thing.colour, thing.shape) for want, thing in pairs)
        related = complete and _related(spec, list(chosen))
        merit = (both, colours + shapes, related, sum(thing.area for thing in chosen))
        if best is None or merit > best:
            best = merit
            verdict = Verdict(
                count=len(found) == len(wanted),
                colour=complete and colours == len(wanted),
                shape=complete and shapes == len(wanted),
                relation=related,
            )
    return verdict


def _related(spec: Spec, things: list[Found]) -> bool:
    """Whether the first thing lies to the second as asked; the axis of the relation must dominate."""
    if spec.relation is None:
        return True
    dx, dy = things[0].x - things[1].x, things[0].y - things[1].y
    along, across = (dx, dy) if spec.relation in RELATIONS[:2] else (dy, dx)
    sign = -1 if spec.relation in ("left of", "above") else 1
    return sign * along > 4 and abs(along) > abs(across)


def detect(image: NDArray[np.uint8]) -> list[Found]:
    """All things in an image [h, w, 3] (uint8), largest first."""
    pixels = np.asarray(image, dtype=np.float32)
    if pixels.shape[:2] != (64, 64):
        zoom = (64 / pixels.shape[0], 64 / pixels.shape[1], 1)
        pixels = ndimage.zoom(pixels, zoom, order=1)
    difference = pixels - np.asarray(BACKGROUND, dtype=np.float32)
    strength = np.sqrt((difference**2).sum(-1))
    hue = difference / np.maximum(strength, 1e-6)[..., None]
    likeness = hue @ _hues().T  # [64, 64, colours]
    nearest = likeness.argmax(-1)
    seen = strength > LEAST_CONTRAST
    blobs, _ = ndimage.label(seen)
    found: list[Found] = []
    for number, place in enumerate(ndimage.find_objects(blobs), 1):
        blob = np.zeros_like(seen)
        blob[place] = blobs[place] == number
        for mask in _by_colour(blob, nearest, strength):
            if mask.sum() >= LEAST_AREA:
                found.append(_describe(mask, difference, strength))
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


def _describe(mask: NDArray[np.bool_], difference: NDArray[np.float32], strength: NDArray[np.float32]) -> Found:
    inner = ndimage.binary_erosion(mask)
    inner = inner if inner.sum() >= 20 else mask
    mean = np.median(difference[inner], axis=0)
    likeness = (mean / max(float(np.linalg.norm(mean)), 1e-6)) @ _hues().T
    colour = tuple(COLOURS)[int(likeness.argmax())] if likeness.max() >= LEAST_HUE else None
    # Half-covered edge pixels count half: coverage is contrast relative to the thing's own.
    cover = np.where(mask, np.clip(strength / max(float(np.median(strength[inner])), 1.0), 0, 1), 0)
    area = float(cover.sum())
    rows, columns = np.nonzero(mask)
    y = float((cover[rows, columns] * (rows + 0.5)).sum() / area)
    x = float((cover[rows, columns] * (columns + 0.5)).sum() / area)
    matches = [_match(shape, cover, x, y, area) for shape in SHAPES]
    best = int(np.argmax(matches))
    return Found(colour, SHAPES[best] if matches[best] >= LEAST_MATCH else None, x, y, area)


def _match(shape: str, cover: NDArray[np.float64], x: float, y: float, area: float) -> float:
    """Soft intersection over union with the template of the same area and centre."""
    unit, lift = _template(shape)
    size = float(np.sqrt(area / unit))
    template = coverage([Thing("red", shape, x, y - lift * size, size)])[0]
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
