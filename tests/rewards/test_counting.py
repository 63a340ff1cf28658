"""TFLOP of looks: counted without weights, without the text that is kept, equal to what runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.rewards import reference as ref
from tests.rewards.test_trainable import folder, load  # noqa: F401  (a fixture)
from ttsnap import rewards
from ttsnap.core.cost import CostModel
from ttsnap.live.session import prepare
from ttsnap.pipelines import flops
from ttsnap.policies import BestOfN, SuccessiveHalving
from ttsnap.rewards.noise_aware import NoiseAwareReward
from ttsnap.rewards.trainable import adapt


@pytest.mark.parametrize("name", ["imagereward", "pickscore", "hpsv2", "aesthetic"])
def test_counted_on_copies_without_data(folder, monkeypatch, name):  # noqa: F811
    reward = load(folder, name)
    images = torch.rand(1, 3, 64, 48, generator=ref.generator())
    first = flops.count_tflop(lambda: reward(images, ["a"]))
    real = flops.count_tflop(lambda: reward(images, ["a"]))  # what is kept of a prompt is no part of a look
    assert (first > real) == (name in ("pickscore", "hpsv2"))
    called = []
    forward = type(reward).forward
    monkeypatch.setattr(type(reward), "forward", lambda self, *a, **k: called.append(self) or forward(self, *a, **k))
    assert flops.count_look(reward, "cpu", 64, 48, "a new prompt") == pytest.approx((real, first - real))
    assert called
    assert reward not in called
    assert not any(name.startswith("a new prompt") for name in getattr(reward, "texts", {}))


def test_a_noise_aware_reward_is_counted_as_its_clean_one(folder):  # noqa: F811
    reward = load(folder, "hpsv2")
    alone = flops.count_look(reward, "cpu", 64, 48)
    parameters = adapt(reward, "full", 1, 1.0)
    aware = NoiseAwareReward(reward, parameters, {0.5: {n: p.detach() for n, p in parameters.items()}})
    assert flops.count_look(aware, "cpu", 64, 48) == pytest.approx(alone)


def test_any_callable_is_run_and_one_that_tells_is_not():
    def mean(images, prompts, *, sigma):
        return (images.flatten(1) @ torch.ones(images[0].numel(), 1))[:, 0]

    assert flops.count_look(mean, "cpu", 4, 4) == pytest.approx((2 * 3 * 16 / 1e12, 0))
    mean.tflop = 7
    assert flops.count_look(mean, "cpu", 4, 4) == (7, 0)
    mean.text_tflop = 1
    assert flops.count_looks({"a": mean, "b": mean}, torch.rand(1, 3, 4, 4), "a") == (14, 2)


def test_a_callable_that_keeps_text_and_one_that_knows_certain_prompts_only():
    def keeps(images, prompts, *, sigma):
        for prompt in prompts:
            if prompt not in kept:
                kept[prompt] = torch.ones(5, 7) @ torch.ones(7, 1)
        return images.sum(dim=(1, 2, 3)) + kept[prompts[0]].sum()

    kept = {}
    for _ in range(2):  # the second time, too, though the prompt has been seen
        assert flops.count_look(keeps, "cpu", 4, 4, "a") == pytest.approx((0, 2 * 5 * 7 / 1e12))
    known = {"a": 1.0}
    picky = flops.count_look(lambda images, prompts, *, sigma: images[:, 0, 0, 0] * known[prompts[0]], "cpu", 4, 4, "a")
    assert picky == (0, 0)


PROMPTS = ["a red circle", "a blue square left of a green triangle"]
HALVING = SuccessiveHalving((2, 4), (0.5, 0.5))


def everything_that_runs(searcher, prompts):
    """Results of a search, and the TFLOP that torch's counter saw in it."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        results = searcher.block(prompts, previews=False)
    return results, counter.get_total_flops() / 1e12


def check_the_ledger(searcher, texts):
    """What ran is what was charged, in one prompt, in a block and in a plan; `texts` TFLOP of it read a prompt."""
    alone, ran = everything_that_runs(searcher, PROMPTS[:1])
    assert alone[0].cost.tflop == pytest.approx(ran, rel=1e-9)
    for reward in searcher.judges.values():
        forget(reward)
    block, ran = everything_that_runs(searcher, PROMPTS)
    assert sum(result.cost.tflop for result in block) == pytest.approx(ran, rel=1e-9)
    plan = searcher.cost_model.of_plan(HALVING.plan(4, searcher.sampler.num_steps))
    for result in (*alone, *block):
        assert result.to_dict()["cost"]["tflop"] == pytest.approx(plan.tflop)
        model = result.cost.text_tflop - texts
        assert model == pytest.approx(searcher.sampler.counted_text)
        assert result.to_dict()["cost"]["text_tflop"] == pytest.approx(plan.text_tflop)


def forget(reward):
    for part in (reward, *(getattr(reward, name, None) for name in ("reward", "clean", "head"))):
        if hasattr(part, "texts"):
            part.texts.clear()
    for texts in (getattr(reward, "_texts", None) or {}).values():
        texts.clear()


def searcher_with(judges):
    searcher = prepare("shapes", reward=judges, candidates=4, num_inference_steps=6, policy=HALVING)
    searcher.sampler.counted_text = flops.cost_model(searcher.sampler, {}).prompt_tflop
    return searcher


def test_a_search_is_charged_for_all_that_runs_and_a_prompt_is_read_once(folder):  # noqa: F811
    clip, shapes = load(folder, "hpsv2"), rewards.load("shapes")["shapes"]
    text = sum(flops.count_look(reward, "cpu", 64, 64).text for reward in (clip, shapes))
    assert text > 0
    check_the_ledger(searcher_with({"hpsv2": clip, "shapes": shapes}), text)


def test_shapes_aware_reads_a_prompt_once_for_head_and_clean_reward():
    searcher = searcher_with(rewards.load("shapes-aware"))
    assert searcher.cost_model.texts == ()
    check_the_ledger(searcher, flops.count_look(rewards.load("shapes")["shapes"], "cpu", 64, 64).text)


def test_levels_with_text_weights_of_their_own_read_a_prompt_again(folder):  # noqa: F811
    reward = load(folder, "hpsv2")
    parameters = dict(reward.named_parameters())
    searcher = searcher_with({"shapes": rewards.load("shapes")["shapes"]})
    levels = {s: {n: p.detach() * 1.01 for n, p in parameters.items()} for s in searcher.sampler.sigmas[1:5:2]}
    aware = NoiseAwareReward(reward, parameters, levels, "hpsv2")
    searcher = searcher_with({"hpsv2": aware})
    text = flops.count_look(reward, "cpu", 64, 64).text
    model = searcher.cost_model
    assert [(one.since, one.until, one.tflop) for one in model.texts] == [(1, 3, text), (4, 4, text)]
    check_the_ledger(searcher, 3 * text)  # two rungs, each with a level of its own, and finished images
    assert CostModel.read(json.loads(json.dumps(model.tflops()))) == CostModel.read(model.tflops())
    best = BestOfN().plan(4, 6)  # never reads by the levels
    assert model.of_plan(best).text_tflop == pytest.approx(model.prompt_tflop)
    assert model.under("clean").of_plan(HALVING.plan(4, 6)).text_tflop == pytest.approx(model.prompt_tflop)
    looks = np.array([[0, 4, 0, 2, 0, 1], [0, 0, 0, 0, 0, 4]])
    np.testing.assert_allclose(model.text_tflop(looks) - model.prompt_tflop, [2 * text, 0])
