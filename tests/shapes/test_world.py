from __future__ import annotations

import numpy as np
import pytest

from ttsnap.shapes.checker import check
from ttsnap.shapes.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Noun,
    Scene,
    Spec,
    Thing,
    all_specs,
    held_out_prompts,
    is_held_out,
    parse,
    render_batch,
    sample_scene,
    sample_spec,
    train_prompts,
)

KINDS = ("count", "colour", "shape", "relation")


def test_prompts_are_read_back():
    for spec in all_specs():
        assert parse(spec.prompt) == spec
    with pytest.raises(ValueError, match="not a prompt of the shapes world"):
        parse("a pink elephant")


def test_held_out_prompts_are_never_trained_on():
    held, train = held_out_prompts(), train_prompts()
    assert len(held) >= 200
    assert not set(held) & set(train)
    assert len(held) + len(train) == 18 * 17 * 4
    rng = np.random.default_rng(0)
    assert not any(is_held_out(sample_spec(rng)) for _ in range(500))


@pytest.mark.parametrize("count", [80, pytest.param(400, marks=pytest.mark.slow)])
def test_clean_renders_pass_and_those_with_one_thing_changed_fail(count):
    """Scenes of two things and four changes of each; the gate is 99.5 %."""
    rng = np.random.default_rng(1)
    specs = [sample_spec(rng, single=0) for _ in range(count)]
    scenes = [sample_scene(spec, rng) for spec in specs]
    right = [check(image, spec) for image, spec in zip(render_batch(scenes), specs, strict=True)]
    assert np.mean([verdict.all for verdict in right]) >= 0.995
    for kind in KINDS:
        changed = [changed_scene(scene, kind, rng) for scene in scenes]
        verdicts = [check(image, spec) for image, spec in zip(render_batch(changed), specs, strict=True)]
        assert np.mean([not getattr(verdict, kind) for verdict in verdicts]) >= 0.995, kind
        if kind != "count":
            others = [all(getattr(v, other) for other in KINDS if other != kind) for v in verdicts]
            assert np.mean(others) >= 0.995, kind


def changed_scene(scene: Scene, kind: str, rng: np.random.Generator) -> Scene:
    things = list(scene.things)
    which = int(rng.integers(2))
    thing = things[which]
    if kind == "colour":
        colour = [c for c in COLOURS if c != thing.colour][rng.integers(5)]
        things[which] = Thing(colour, thing.shape, thing.x, thing.y, thing.size)
    elif kind == "shape":
        shape = [s for s in SHAPES if s != thing.shape][rng.integers(2)]
        things[which] = Thing(thing.colour, shape, thing.x, thing.y, thing.size)
    elif kind == "relation":
        a, b = things
        things = [Thing(a.colour, a.shape, b.x, b.y, a.size), Thing(b.colour, b.shape, a.x, a.y, b.size)]
    else:
        del things[which]
    return Scene(tuple(things))


def test_a_third_thing_is_one_too_many():
    spec = Spec((Noun("red", "circle"), Noun("blue", "square")), (RELATIONS[0],))
    scene = Scene(
        (Thing("red", "circle", 14, 20, 9), Thing("blue", "square", 48, 20, 9), Thing("cyan", "circle", 30, 50, 7))
    )
    verdict = check(render_batch([scene])[0], spec)
    assert not verdict.count
    assert verdict.colour
    assert verdict.shape
    assert verdict.relation
