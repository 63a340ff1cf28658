"""Scenes of the embedded world: coloured shapes on dark grey, the prompts that describe them, a renderer.

A prompt is `a red circle` or `a red circle left of a blue square`. The relation decides the layout: the two things lie
in opposite halves of the image along its axis. One fifth of all combinations is held out of every training. The harder
level, with three things and holes, is `ttsnap.shapes.hard`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIZE = 64
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 48, 48),
    "green": (52, 178, 64),
    "blue": (58, 88, 232),
    "yellow": (236, 212, 52),
    "purple": (168, 62, 204),
    "cyan": (52, 206, 214),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BACKGROUND = (40, 40, 44)
_COLOUR_NAMES = tuple(COLOURS)
_LIFT = 0.22  # how far a triangle's centre lies below its middle
_HELD_OUT_SHARE = 5  # one combination in this many


HOLE = 0.5  # size of a hollow thing's hole, of its own


class Noun(NamedTuple):
    """What a prompt says of one thing."""

    colour: str
    shape: str
    hollow: bool = False

    def __str__(self) -> str:
        return f"a {'hollow ' if self.hollow else ''}{self.colour} {self.shape}"


@dataclass(frozen=True)
class Thing:
    """One coloured shape; centre and radius (half its extent) in pixels of its scene."""

    colour: str
    shape: str
    x: float
    y: float
    size: float
    hollow: bool = False


@dataclass(frozen=True)
class Scene:
    """Things that do not overlap, on a square of `size` pixels a side."""

    things: tuple[Thing, ...]
    size: int = SIZE


@dataclass(frozen=True)
class Spec:
    """What a prompt asks for: things, and how each lies to the next."""

    things: tuple[Noun, ...]
    relations: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The prompt, such as `a red circle left of a blue square`."""
        words = [str(self.things[0])]
        for relation, noun in zip(self.relations, self.things[1:], strict=True):
            words += [relation, str(noun)]
        return " ".join(words)


_NOUN = f"a (hollow )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PROMPT = re.compile(f"{_NOUN}(?: ({'|'.join(RELATIONS)}) {_NOUN})?(?: ({'|'.join(RELATIONS)}) {_NOUN})?")


def parse(prompt: str, *, most: int = 2, holes: bool = False) -> Spec:
    """The Spec of a prompt.

    Args:
        prompt: in the grammar of this world.
        most: things that a prompt may name.
        holes: whether things may be hollow.

    Raises:
        ValueError: the prompt is not in the grammar of this world.
    """
    match = _PROMPT.fullmatch(" ".join(prompt.lower().split()))
    groups = match.groups() if match else ()
    nouns = [Noun(groups[i + 1], groups[i + 2], bool(groups[i])) for i in range(0, len(groups), 4) if groups[i + 1]]
    if not match or len(nouns) > most or (not holes and any(noun.hollow for noun in nouns)):
        more = ", 'a hollow red circle left of a blue square above a cyan triangle'" if most > 2 else ""
        raise ValueError(
            f"{prompt!r} is not a prompt of the shapes world; it knows prompts such as 'a red circle' or "
            f"'a red circle left of a blue square'{more} "
            f"({', '.join(COLOURS)}; {', '.join(SHAPES)}; {', '.join(RELATIONS)})"
        )
    return Spec(tuple(nouns), tuple(groups[i] for i in (3, 7) if groups[i]))


def is_held_out(spec: Spec) -> bool:
    """Whether a combination is kept out of every training (a stable hash of its prompt)."""
    return bool(spec.relations) and zlib.crc32(spec.prompt.encode()) % _HELD_OUT_SHARE == 0


def all_specs() -> Iterator[Spec]:
    """Every two-object Spec, in a fixed order."""
    nouns = [Noun(*both) for both in product(COLOURS, SHAPES)]
    for pair in permutations(nouns, 2):
        for relation in RELATIONS:
            yield Spec(pair, (relation,))


def held_out_prompts() -> list[str]:
    """All held-out prompts (about 240) in a fixed shuffled order."""
    return _shuffled(spec for spec in all_specs() if is_held_out(spec))


def train_prompts() -> list[str]:
    """All two-object prompts that may be trained on (about 980), in a fixed shuffled order."""
    return _shuffled(spec for spec in all_specs() if not is_held_out(spec))


def _shuffled(specs: Iterable[Spec]) -> list[str]:
    prompts = [spec.prompt for spec in specs]
    return [prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))]


def sample_spec(rng: np.random.Generator, *, held_out: bool = False, single: float = 0.2) -> Spec:
    """A random Spec; one object with probability `single` (never when `held_out`)."""
    while True:
        nouns = [Noun(_COLOUR_NAMES[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))]) for _ in range(2)]
        if not held_out and rng.random() < single:
            return Spec((nouns[0],))
        spec = Spec((nouns[0], nouns[1]), (RELATIONS[rng.integers(len(RELATIONS))],))
        if nouns[0] != nouns[1] and is_held_out(spec) == held_out:
            return spec


def sample_scene(spec: Spec, rng: np.random.Generator) -> Scene:
    """A random layout that fulfils a Spec."""
    sizes = rng.uniform(9.5, 12, len(spec.things))
    if not spec.relations:
        centres = [rng.uniform(24, 40, 2)]
    else:
        low, high = rng.uniform(14.5, 19), rng.uniform(45, 49.5)
        relation = spec.relations[0]
        along = (low, high) if relation in ("left of", "above") else (high, low)
        across = rng.uniform(24, 40, 2)
        horizontal = relation in ("left of", "right of")
        centres = [np.array((a, b) if horizontal else (b, a)) for a, b in zip(along, across, strict=True)]
    return Scene(
        tuple(
            Thing(noun.colour, noun.shape, float(centre[0]), float(centre[1]), float(size), noun.hollow)
            for noun, centre, size in zip(spec.things, centres, sizes, strict=True)
        )
    )


def render(scene: Scene, size: int | None = None) -> NDArray[np.uint8]:
    """Antialiased image [size, size, 3] of a scene, of the scene's own size unless told otherwise."""
    return render_batch([scene], size)[0]


def render_batch(scenes: list[Scene], size: int | None = None) -> NDArray[np.uint8]:
    """Antialiased images [n, size, size, 3] of scenes of one size with any number of things, later things on top."""
    most = max((len(scene.things) for scene in scenes), default=0)
    own = scenes[0].size if scenes else SIZE
    size = size or own
    images = np.empty((len(scenes), size, size, 3), dtype=np.uint8)
    ground = np.asarray(BACKGROUND, dtype=np.float32)
    for start in range(0, len(scenes), 1024):
        chunk = scenes[start : start + 1024]
        canvas = np.broadcast_to(ground, (len(chunk), size, size, 3)).copy()
        for layer in range(most):
            rows = [i for i, scene in enumerate(chunk) if len(scene.things) > layer]
            if not rows:
                continue
            things = [chunk[i].things[layer] for i in rows]
            alpha = coverage(things, size, size / own)[..., None]
            holes = [i for i, thing in enumerate(things) if thing.hollow]
            if holes:
                alpha[holes] -= coverage([_hole(things[i]) for i in holes], size, size / own)[..., None]
            colour = np.asarray([COLOURS[thing.colour] for thing in things], dtype=np.float32)[:, None, None]
            canvas[rows] = canvas[rows] * (1 - alpha) + colour * alpha
        images[start : start + 1024] = np.round(canvas).astype(np.uint8)
    return images


def _hole(thing: Thing) -> Thing:
    """The hole of a hollow thing: its shape around the same point, smaller."""
    lift = _LIFT * (thing.size - HOLE * thing.size) if thing.shape == "triangle" else 0.0
    return replace(thing, size=HOLE * thing.size, y=thing.y + lift)


def coverage(things: list[Thing], size: int = SIZE, scale: float = 1.0) -> NDArray[np.float32]:
    """How much of each pixel [n, size, size] a thing covers, 0..1, from its signed distance.

    `scale`: pixels of the image for one of the things' own.
    """
    x, y, r = (
        np.asarray([getattr(thing, name) * scale for thing in things], dtype=np.float32)[:, None, None]
        for name in ("x", "y", "size")
    )
    axis = np.arange(size, dtype=np.float32) + np.float32(0.5)
    dx, dy = axis[None, None, :] - x, axis[None, :, None] - y
    distance = np.empty((len(things), size, size), dtype=np.float32)
    for number, shape in enumerate(SHAPES):
        rows = [i for i, thing in enumerate(things) if thing.shape == shape]
        if not rows:
            continue
        a, b, s = dx[rows], dy[rows], r[rows]
        if number == 0:
            distance[rows] = np.hypot(a, b) - s
        elif number == 1:
            distance[rows] = np.maximum(np.abs(a), np.abs(b)) - 0.92 * s
        else:  # upright equilateral: three half planes at the inradius from a centre a little below the middle
            c = b - _LIFT * s
            inradius = 0.62 * s
            slanted = np.abs(a) * np.float32(np.sqrt(3) / 2) - c / 2
            distance[rows] = np.maximum(c, slanted) - inradius
    covered: NDArray[np.float32] = np.clip(0.5 - distance, 0, 1)
    return covered
