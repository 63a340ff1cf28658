"""GenEval's prompts (Ghosh et al., 2023, arXiv 2310.11513), made from its definition: six kinds, 553 in all.

    single object     a photo of a bench                    each of COCO's 80 classes
    two objects       a photo of a bench and a sports ball
    counting          a photo of three pizzas               two to four
    colours           a photo of a purple potted plant      never of a person
    position          a photo of a dog right of a tie
    colour attribution  a photo of a red cup and a green dog

Of each kind but the first a hundred are drawn, and what was drawn before is left out. The draws are the published ones,
in their order and with their seed, so that the list is the published one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, "
    "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, "
    "backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, "
    "baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, "
    "knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, "
    "chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, "
    "computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, "
    "scissors, teddy bear, hair drier, toothbrush"
)
CLASSES = tuple(_NAMES.split(", "))
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3, "four": 4}
SEED = 43
DRAWN = 100  # of each kind but the first, before what was drawn twice is left out
START = "a photo of "
KINDS = ("single object", "two objects", "counting", "colours", "position", "colour attribution")


@dataclass(frozen=True)
class Thing:
    """What must be in a picture.

    Attributes:
        name: one of COCO's classes.
        count: how many at least.
        colour: that they have.
        relation: where they are, seen from the scene's first thing.
    """

    name: str
    count: int = 1
    colour: str | None = None
    relation: str | None = None


@dataclass(frozen=True)
class Scene:
    """A prompt as data.

    Attributes:
        kind: one of KINDS.
        things: all of which must be there; in `counting` there must not be one more.
    """

    kind: str
    things: tuple[Thing, ...]

    @property
    def prompt(self) -> str:
        """As text."""
        first = self.things[0]
        if self.kind == "counting":
            word = next(word for word, count in NUMBERS.items() if count == first.count)
            return f"{START}{word} {plural(first.name)}"
        if self.kind == "position":
            return f"{START}{_one(self.things[1])} {self.things[1].relation} {_one(first)}"
        return START + " and ".join(map(_one, self.things))


def _one(thing: Thing) -> str:
    text = f"{thing.colour} {thing.name}" if thing.colour else thing.name
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def plural(name: str) -> str:
    """As GenEval spells it: sheeps, benchs, buses."""
    return name + ("es" if name.endswith("s") else "s")


def prompts() -> list[str]:
    """The published list."""
    return [scene.prompt for scene in scenes()]


@cache
def scenes(seed: int = SEED) -> tuple[Scene, ...]:
    """The scenes of a seed, in order; by default the published 553."""
    rng = np.random.default_rng(seed)
    people = CLASSES.index("person")

    def two() -> tuple[str, str]:
        first, second = rng.choice(len(CLASSES), size=2, replace=False)
        return CLASSES[first], CLASSES[second]

    def without_people(place: int) -> str:
        return CLASSES[(place + 1 + people) % len(CLASSES)]

    def counting() -> tuple[Thing, ...]:
        return (Thing(CLASSES[rng.choice(len(CLASSES))], int(rng.integers(2, 4, endpoint=True))),)

    def coloured() -> tuple[Thing, ...]:
        name = without_people(int(rng.choice(len(CLASSES) - 1)))
        return (Thing(name, colour=COLOURS[rng.choice(len(COLOURS))]),)

    def placed() -> tuple[Thing, ...]:
        name, seen_from = two()
        return Thing(seen_from), Thing(name, relation=RELATIONS[rng.choice(len(RELATIONS))])

    def attributed() -> tuple[Thing, ...]:
        places = rng.choice(len(CLASSES) - 1, size=2, replace=False)
        colours = rng.choice(len(COLOURS), size=2, replace=False)
        return tuple(Thing(without_people(int(p)), colour=COLOURS[c]) for p, c in zip(places, colours, strict=True))

    order = rng.choice(len(CLASSES), size=len(CLASSES), replace=False)
    found = [Scene(KINDS[0], (Thing(CLASSES[place]),)) for place in order]
    draws: tuple[Callable[[], tuple[Thing, ...]], ...]
    draws = (lambda: tuple(map(Thing, two())), counting, coloured, placed, attributed)
    for kind, draw in zip(KINDS[1:], draws, strict=True):
        found += [Scene(kind, draw()) for _ in range(DRAWN)]
    return tuple(dict.fromkeys(found))


def read(prompt: str) -> Scene:
    """The scene of a prompt of this grammar, whether it is in the list or not.

    Raises:
        ValueError: it is of another grammar.
    """
    text = " ".join(prompt.split()).lower().rstrip(".")
    if match := _counted().fullmatch(text):
        name = next(name for name in CLASSES if plural(name) == match[2])
        return Scene("counting", (Thing(name, NUMBERS[match[1]]),))
    match = _named().fullmatch(text)
    if not match:
        raise ValueError(
            f"GenEval's objects are asked for in prompts such as `{START}two dogs` or `{START}a red cup below a tie`, "
            f"of COCO's 80 classes; got {prompt[:80]!r}"
        )
    colour, name, joint, other_colour, other = match.groups()
    if joint is None:
        return Scene("colours" if colour else "single object", (Thing(name, colour=colour),))
    if joint == "and":
        both = Thing(name, colour=colour), Thing(other, colour=other_colour)
        return Scene("colour attribution" if colour or other_colour else "two objects", both)
    return Scene("position", (Thing(other, colour=other_colour), Thing(name, colour=colour, relation=joint)))


def _any_of(words: tuple[str, ...]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


@cache
def _counted() -> re.Pattern[str]:
    return re.compile(rf"{START}({_any_of(tuple(NUMBERS))}) ({_any_of(tuple(map(plural, CLASSES)))})")


@cache
def _named() -> re.Pattern[str]:
    one = rf"an? (?:({_any_of(COLOURS)}) )?({_any_of(CLASSES)})"
    return re.compile(rf"{START}{one}(?: (and|{_any_of(RELATIONS)}) {one})?")
