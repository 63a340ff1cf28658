"""The harder level without its weights: prompts, layouts, the checker."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ttsnap.shapes import hard
from ttsnap.shapes.checker import fidelity, judge
from ttsnap.shapes.scenes import COLOURS, SHAPES, Scene, is_held_out, parse, render_batch

KINDS = ("count", "colour", "shape", "relation", "hollow")


def test_prompts_are_read_back():
    rng = np.random.default_rng(0)
    for spec in [hard.sample_spec(rng) for _ in range(500)]:
        assert hard.parse(spec.prompt) == spec
        assert hard.allowed(spec)
    for prompt in ("a red circle above", "a red circle above a blue square below a red circle above a cyan square"):
        with pytest.raises(ValueError, match=r"such as 'a red circle' or .* above a cyan triangle"):
            hard.parse(prompt)
    with pytest.raises(ValueError, match="not a prompt of the shapes world"):
        parse("a hollow red circle")  # the first level knows no holes


def test_held_out_prompts_are_never_trained_on():
    held, train = hard.held_out_prompts(), hard.train_prompts()
    assert (len(set(held)), len(set(train))) == (960, 4000)
    assert all(is_held_out(hard.parse(prompt)) for prompt in held)
    assert not any(is_held_out(hard.parse(prompt)) for prompt in train)


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_clean_renders_pass_and_those_with_one_thing_changed_fail(count):
    """Scenes of three things and five changes of each; the gate is 99.5 %."""
    rng = np.random.default_rng(1)
    specs = [hard.sample_spec(rng, fewer=0) for _ in range(count)]
    scenes = [hard.sample_scene(spec, rng) for spec in specs]
    found = [hard.detect(image) for image in render_batch(scenes)]
    assert np.mean([judge(things, spec).all for things, spec in zip(found, specs, strict=True)]) >= 0.995
    assert min(map(fidelity, found)) > 0.9
    for kind in KINDS:
        changed = [changed_scene(scene, kind, rng) for scene in scenes]
        verdicts = [hard.check(image, spec) for image, spec in zip(render_batch(changed), specs, strict=True)]
        assert np.mean([not getattr(verdict, kind) for verdict in verdicts]) >= 0.995, kind
        if kind not in ("count", "relation"):  # two that changed places may meet the prompt's other half no more
            others = [all(getattr(v, other) for other in KINDS if other not in (kind, "relation")) for v in verdicts]
            assert np.mean(others) >= 0.99, kind


def changed_scene(scene: Scene, kind: str, rng: np.random.Generator) -> Scene:
    things = list(scene.things)
    which = int(rng.integers(3))
    thing = things[which]
    if kind == "colour":
        things[which] = replace(thing, colour=[c for c in COLOURS if c != thing.colour][rng.integers(5)])
    elif kind == "shape":
        things[which] = replace(thing, shape=[s for s in SHAPES if s != thing.shape][rng.integers(2)])
    elif kind == "hollow":
        things[which] = replace(thing, hollow=not thing.hollow)
    elif kind == "relation":
        other = things[1 if which != 1 else 0]
        position = things.index(other)
        things[which], things[position] = (
            replace(thing, x=other.x, y=other.y),
            replace(other, x=thing.x, y=thing.y),
        )
    else:
        del things[which]
    return Scene(tuple(things), hard.SIZE)
