"""The shipped weights: they load in the stock pipeline, and they do what the docs say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tools.shapes.evaluate import opposite

import ttsnap
from ttsnap.live.session import prepare
from ttsnap.shapes.checker import check
from ttsnap.shapes.pipeline import OPTIONS, load_pipeline
from ttsnap.shapes.reward import WEIGHTS, load_reward
from ttsnap.shapes.scenes import held_out_prompts, parse, render_batch, sample_scene

CALL = {"height": 64, "width": 64, "num_inference_steps": 20, "max_sequence_length": 12}


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


def test_the_weights_are_small():
    total = sum(path.stat().st_size for path in WEIGHTS.parent.rglob("*") if path.is_file())
    assert total <= 25e6


def test_search_returns_what_the_stock_pipeline_makes_of_the_winning_seed(pipe, tmp_path):
    prompt = held_out_prompts()[0]
    result = ttsnap.search(pipe, prompt, candidates=6, seed=3)
    stock = pipe(prompt, generator=torch.Generator("cpu").manual_seed(result.seed), **CALL).images[0]
    difference = np.abs(np.asarray(stock, dtype=int) - np.asarray(result.image, dtype=int))
    assert difference.max() <= 1
    assert result.cost.tflop > 0
    assert f"manual_seed({result.seed})" in result.reproduce
    record = result.save(tmp_path)
    assert (tmp_path / record["files"]["board"]).exists()


def test_held_out_prompts_are_met_more_often_by_best_of_8_than_by_one_sample(pipe):
    prompts = held_out_prompts()[:6]
    searcher = prepare(pipe, candidates=8, policy="best-of-n")
    results = searcher.block(prompts, previews=True)
    best = np.mean([check(np.asarray(r.image), r.prompt).all for r in results])
    one = np.mean([check(looks[-1].picture, r.prompt).all for r in results for looks in r.history.values()])
    assert 0.2 <= one <= 0.85
    assert best >= one + 0.1


def test_a_look_costs_at_most_a_call(pipe):
    model = prepare(pipe).cost_model
    assert model.decode_tflop + model.look_tflop <= model.call_tflop


def test_the_reward_tells_clean_renders_from_their_opposites():
    reward, rng = load_reward(), np.random.default_rng(0)
    prompts = held_out_prompts()[:64]
    images = render_batch([sample_scene(parse(p), rng) for p in prompts])
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    right = reward(tensor, prompts, sigma=0.0)
    wrong = reward(tensor, [opposite(p) for p in prompts], sigma=0.0)
    assert (right > wrong).float().mean() >= 0.97
    alone = torch.cat([reward(tensor[i : i + 1], [prompts[i]], sigma=0.0) for i in range(8)])
    torch.testing.assert_close(alone, right[:8], atol=1e-4, rtol=1e-4)
    large = torch.nn.functional.interpolate(tensor[:8], (256, 256), mode="bilinear")
    assert (reward(large, prompts[:8], sigma=0.0) - right[:8]).abs().max() < 3
    assert torch.isfinite(reward(tensor[:1], ["an astronaut, riding a horse"], sigma=0.0)).all()
    assert OPTIONS["num_inference_steps"] == 20
