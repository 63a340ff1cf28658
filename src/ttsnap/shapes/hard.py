"""The harder level of the embedded world: three small things, two relations, holes, on 96 x 96 pixels.

A prompt is `a hollow red circle left of a blue square above a cyan triangle`: each relation holds between the things
beside it. Prompts of one and two things are known too. One sample of the model is seldom right.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ttsnap.pipelines.models import Model
from ttsnap.shapes import checker
from ttsnap.shapes.checker import Found, Verdict
from ttsnap.shapes.scenes import COLOURS, OPPOSITE, RELATIONS, SHAPES, Noun, Scene, Spec, Thing, is_held_out
from ttsnap.shapes.scenes import parse as parse_any

if TYPE_CHECKING:
    from ttsnap.rewards.feature_head import FeatureReward
    from ttsnap.shapes.reward import ShapesReward

WEIGHTS = Path(__file__).parent / "weights" / "hard"
SIZE, MOST = 96, 3
OPTIONS: dict[str, Any] = {"num_inference_steps": 20, "height": SIZE, "width": SIZE, "max_sequence_length": 17}
_DIRECTION = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def parse(prompt: str) -> Spec:
    """The Spec of a prompt.

    Raises:
        ValueError: the prompt is not in the grammar of this level.
    """
    return parse_any(prompt, most=MOST, holes=True)


def detect(image: NDArray[np.uint8]) -> list[Found]:
    """All things in an image [h, w, 3] (uint8), largest first."""
    return checker.detect(image, SIZE, holes=True)


def check(image: NDArray[np.uint8], prompt: str | Spec) -> Verdict:
    """Judge an image [h, w, 3] (uint8) against a prompt of this level."""
    return checker.judge(detect(image), parse(prompt) if isinstance(prompt, str) else prompt)


def allowed(spec: Spec) -> bool:
    """Whether a Spec can be drawn: no thing twice, and the outer two of three not on the same side of the middle."""
    distinct = len({noun[:2] for noun in spec.things}) == len(spec.things)
    return distinct and (len(spec.relations) < 2 or spec.relations[0] != OPPOSITE[spec.relations[1]])


def sample_spec(rng: np.random.Generator, *, held_out: bool = False, fewer: float = 0.2) -> Spec:
    """A random Spec of three things; of one or two with probability `fewer` (never when `held_out`)."""
    colours = tuple(COLOURS)
    while True:
        count = int(rng.integers(1, MOST)) if not held_out and rng.random() < fewer else MOST
        nouns = tuple(
            Noun(colours[rng.integers(len(colours))], SHAPES[rng.integers(len(SHAPES))], bool(rng.integers(2)))
            for _ in range(count)
        )
        spec = Spec(nouns, tuple(RELATIONS[rng.integers(len(RELATIONS))] for _ in range(count - 1)))
        if allowed(spec) and is_held_out(spec) == held_out:
            return spec


def sample_scene(spec: Spec, rng: np.random.Generator) -> Scene:
    """A random layout that fulfils a Spec: the second thing in the middle, the others beside it."""
    centres = [np.zeros(2)]
    if spec.relations:
        sides = [np.array(_DIRECTION[spec.relations[0]])]
        sides += [-np.array(_DIRECTION[relation]) for relation in spec.relations[1:]]  # of the third to the second
        beside = [side * rng.uniform(26, 31) + (1 - abs(side)) * rng.uniform(-5, 5) for side in sides]
        centres = [beside[0], np.zeros(2), *beside[1:]]
    low, high = np.min(centres, axis=0), np.max(centres, axis=0)
    shift = rng.uniform(12.5 - low, SIZE - 12.5 - high)
    return Scene(
        tuple(
            Thing(noun.colour, noun.shape, float(x), float(y), rng.uniform(8.5, 10.5), noun.hollow)
            for noun, (x, y) in zip(spec.things, centres + shift, strict=True)
        ),
        SIZE,
    )


@cache
def _prompts(held_out: bool, count: int) -> tuple[str, ...]:
    rng = np.random.default_rng(40 + held_out)
    return tuple(dict.fromkeys(sample_spec(rng, held_out=held_out, fewer=0).prompt for _ in range(count)))


def held_out_prompts() -> list[str]:
    """960 prompts of three things of combinations that no training sees, in a fixed order."""
    return list(_prompts(True, 970)[:960])


def train_prompts() -> list[str]:
    """4000 prompts of three things that may be trained on, in a fixed order."""
    return list(_prompts(False, 4100)[:4000])


def load_pipeline(dtype: Any = None, device: Any = "cpu") -> Any:
    """The stock `FluxPipeline` of this level (fp32 unless told otherwise); call it with `OPTIONS`."""
    from ttsnap.shapes.pipeline import load_pipeline as load

    return load(dtype, device, WEIGHTS / "pipeline")


def load_reward(device: Any = "cpu") -> ShapesReward:
    """The clean reward of this level."""
    from ttsnap.shapes.reward import load_reward as load

    return load(device, WEIGHTS / "reward")


def load_foresight(device: Any = "cpu") -> FeatureReward:
    """The noise-aware reward of this level."""
    from ttsnap.shapes.foresight import load_foresight as load

    return load(device, WEIGHTS / "foresight", load_reward(device), "shapes-hard")


MODEL = Model(
    load_pipeline,
    WEIGHTS / "pipeline",
    arguments=OPTIONS,
    reward="shapes-hard-aware",
    pushed_reward="shapes-hard",
    report="shapes-hard-checker",
    candidates=6,
    preview=WEIGHTS / "preview",
    prompts={"train": train_prompts, "held-out": held_out_prompts},
    example="a hollow red circle left of a blue square above a green triangle",
    reads=parse,
)
