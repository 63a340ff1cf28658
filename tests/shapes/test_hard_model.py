"""The harder level's shipped weights: they load in the stock pipeline, and leave a search something to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ttsnap
from ttsnap.live.session import prepare
from ttsnap.shapes import hard
from ttsnap.shapes.scenes import render_batch

PROMPTS = hard.held_out_prompts()


@pytest.fixture(scope="module")
def pipe():
    return hard.load_pipeline()


def test_a_search_gives_what_the_stock_pipeline_makes_of_the_winning_seed(pipe):
    result = ttsnap.search(pipe, PROMPTS[0], candidates=4, seed=3, policy="halving")
    stock = pipe(PROMPTS[0], generator=torch.Generator("cpu").manual_seed(result.seed), **hard.OPTIONS).images[0]
    difference = np.abs(np.asarray(stock, dtype=int) - np.asarray(result.image, dtype=int))
    assert stock.size == (96, 96)
    assert difference.max() <= 1
    assert result.guides == {"shapes-hard": "shapes-hard-aware"}
    assert result.cost.decodes < result.cost.looks  # early looks read features


@pytest.mark.slow
def test_one_sample_is_seldom_right_and_the_best_of_eight_often(pipe):
    session = prepare(pipe, reward="shapes-hard", candidates=8, policy="best-of-n")
    results = session.block(PROMPTS[:8], previews=True)
    best = np.mean([hard.check(np.asarray(r.image), r.prompt).all for r in results])
    one = np.mean([hard.check(looks[-1].picture, r.prompt).all for r in results for looks in r.history.values()])
    assert 0.02 <= one <= 0.35
    assert best >= 2 * one


def test_the_reward_tells_clean_renders_from_those_of_other_prompts():
    rng = np.random.default_rng(0)
    specs = [hard.parse(prompt) for prompt in PROMPTS[:64]]
    images = render_batch([hard.sample_scene(spec, rng) for spec in specs])
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    reward = hard.load_reward()
    right = reward(tensor, PROMPTS[:64], sigma=0.0)
    for change in ("colour", "shape", "hollow", "relation"):
        wrong = reward(tensor, [changed(spec, change).prompt for spec in specs], sigma=0.0)
        assert (right > wrong).float().mean() >= 0.9, change


def changed(spec, kind):
    """The Spec with another first noun, or another first relation."""
    noun = spec.things[0]
    others = {
        "colour": noun._replace(colour="red" if noun.colour != "red" else "blue"),
        "shape": noun._replace(shape="circle" if noun.shape != "circle" else "square"),
        "hollow": noun._replace(hollow=not noun.hollow),
    }
    if kind == "relation":
        other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        return hard.Spec(spec.things, (other[spec.relations[0]], *spec.relations[1:]))
    return hard.Spec((others[kind], *spec.things[1:]), spec.relations)


def test_the_noise_aware_reward_reads_this_size_only(pipe):
    with pytest.raises(ValueError, match="96 x 96 pixels only"):
        ttsnap.search(pipe, PROMPTS[0], candidates=4, height=64, width=64, policy="halving")
