"""`ttsnap.search` on a tiny random FLUX: the result, what it says about itself, and what is refused."""

from __future__ import annotations

import json
import warnings
from functools import partial

import numpy as np
import pytest
import torch

import ttsnap
from tests.pipelines import tiny
from ttsnap.core.observers import Observer
from ttsnap.files.metadata import read
from ttsnap.live.session import prepare
from ttsnap.policies import BestOfN, SuccessiveHalving

PROMPT = "a red circle"
OPTIONS = {"num_inference_steps": 5, "height": 32, "width": 32, "max_sequence_length": 12, "max_batch": 8}
HALVING = SuccessiveHalving((2,), keep=(0.4,))


@pytest.fixture(scope="module")
def pipe():
    return tiny.flux(guidance_embeds=True)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def find(pipe, **options):
    return ttsnap.search(pipe, PROMPT, **({"reward": tiny.Redness(), "policy": HALVING} | OPTIONS | options))


class Steps(Observer):
    """Notes the step of each look."""

    def __init__(self, steps):
        self.steps = steps

    def looked(self, look, ledger):
        self.steps.append(look.step)


def brightness(images, prompts, *, sigma):
    return images.mean((1, 2, 3))


def test_the_result_tells_the_whole_story(pipe):
    looks = []
    result = find(pipe, candidates=10, top=3, seed=40, observer=Steps(looks))
    assert looks == [2, 5]
    assert (result.started, result.finished) == (10, 4)
    assert (result.cost.nfe, result.cost.looks) == (10 * 2 + 4 * 3, 14)
    assert result.cost.seconds > 0
    assert list(result.history) == list(range(40, 50))
    assert [seen.step for seen in result.history[result.seed]] == [2, 5]
    assert [seen.kept for seen in result.history[result.seed]] == [True, True]
    assert sum(looks[0].kept for looks in result.history.values()) == 4
    rewards = [finished.reward for finished in result.images]
    assert rewards == sorted(rewards, reverse=True)
    assert len(rewards) == 3
    assert result.reward == max(looks[-1].reward for looks in result.history.values() if looks[-1].step == 5)


def test_the_line_that_reproduces_the_winner_does(pipe):
    result = find(pipe, candidates=6, negative_prompt="a blue square", true_cfg_scale=2.0, guidance_scale=2.0)
    stock = eval(result.reproduce, {"pipe": pipe, "torch": torch}).images[0]
    difference = np.abs(np.asarray(stock, dtype=int) - np.asarray(result.image, dtype=int))
    assert difference.max() <= 1  # of 255: the batch was another, which rounds differently


def test_compare_is_best_of_n_at_the_same_cost_on_the_same_draws(pipe):
    result = find(pipe, candidates=10, seed=3, compare=True)
    n = result.best_of_n.candidates
    assert result.best_of_n.cost.tflop <= result.cost.tflop
    alone = find(pipe, candidates=n, seed=3, policy=BestOfN())
    assert result.best_of_n.best.seed == alone.seed
    assert result.best_of_n.best.reward == pytest.approx(alone.reward, abs=1e-5)
    assert result.best_of_n.cost.nfe == alone.cost.nfe == 5 * n
    assert result.best_of_n.cost.tflop == pytest.approx(alone.cost.tflop)


def test_compare_shows_best_of_n_with_other_numbers_of_steps_too(tmp_path):
    session = prepare("shapes", budget="1.2GFLOP", report="none")
    assert session.sampler.num_steps == 4
    assert session.compare_steps == (4, 20)  # where best-of-N is best, and the model's own
    result = session.search("a red circle", compare=True)
    assert [(one.num_steps, one.candidates) for one in result.best_of_n_at] == [(20, 1)]
    stock = prepare("shapes", policy="best-of-n", candidates=1, num_inference_steps=20, report="none").search(
        "a red circle"
    )
    assert result.best_of_n_at[0].best.reward == pytest.approx(stock.reward)
    named = session.search("a red circle", compare=[2, 4])
    (other,) = named.best_of_n_at
    assert other.num_steps == 2
    assert other.cost.tflop <= named.cost.tflop
    assert other.candidates > named.best_of_n.candidates
    assert not prepare(
        "shapes", candidates=2, report="none", num_inference_steps=4, sigmas=[1.0, 0.6, 0.3]
    ).compare_steps
    record = named.save(tmp_path)
    assert record["best_of_n_at_other_steps"][0]["num_steps"] == 2
    assert read(tmp_path / "best_of_n_2.png").own["settings"]["steps"] == 2


def test_a_nan_in_the_comparison_is_an_error_too(pipe):
    def broken(images, prompts, *, sigma):
        values = images.mean((1, 2, 3))
        return values if broken.calls == 0 else values * float("nan")

    broken.calls = 0
    searcher = prepare(pipe, reward=broken, policy=HALVING, candidates=10, **OPTIONS)

    class Count(Observer):
        def looked(self, look, ledger):
            broken.calls += look.step == 5

    with pytest.raises(ValueError, match=f"nan for prompt '{PROMPT}', seed"):
        searcher.block([PROMPT], compare=True, observer=Count())


def test_several_rewards_are_each_reported(pipe):
    rewards = {"red": tiny.Redness(), "bright": brightness}
    result = find(pipe, reward=rewards, candidates=6, compare=True)
    record = result.to_dict()
    assert record["rewards"] == ["red", "bright"]
    assert set(record["reward_by_name"]) == set(record["best_of_n_at_this_cost"]["reward_by_name"]) == set(rewards)


def test_a_block_equals_a_loop(pipe):
    prompts = [PROMPT, "a blue square", "a green circle"]
    searcher = prepare(pipe, reward=tiny.Redness(), policy=HALVING, candidates=5, **OPTIONS)
    block = searcher.block(prompts)
    for prompt, one in zip(prompts, block, strict=True):
        alone = searcher.block([prompt])[0]
        assert alone.seed == one.seed
        assert alone.reward == pytest.approx(one.reward, abs=1e-5)
        assert (alone.cost.nfe, alone.cost.looks, alone.cost.tflop) == (one.cost.nfe, one.cost.looks, one.cost.tflop)
    assert not any(memo._known for memo in searcher.sampler.memos)  # nothing piles up over thousands of prompts


def test_a_budget_is_kept_to(pipe):
    for budget, unit in (("60NFE", "nfe"), ("0.5GFLOP", "tflop")):
        result = find(pipe, budget=budget)
        assert result.cost.to_dict()[unit] <= {"nfe": 60, "tflop": 0.5e-3}[unit]
        assert result.budget
        assert result.started > 1


def test_what_a_reward_costs_is_its_own(pipe):
    """Two callables of one name are two rewards: what one of them costs is not remembered for the other."""
    weights = torch.ones(3 * 32 * 32, 100)

    def reward(images, prompts, *, sigma):
        return (images.flatten(1) @ weights).mean(1)

    cheap = prepare(pipe, reward={"mine": brightness}, candidates=2, **OPTIONS).cost_model
    dear = prepare(pipe, reward={"mine": reward}, candidates=2, **OPTIONS).cost_model
    assert cheap.look_tflop == 0
    assert dear.look_tflop == pytest.approx(2 * 3 * 32 * 32 * 100 / 1e12)
    assert cheap.call_tflop == dear.call_tflop


@pytest.mark.parametrize("amount", [{"candidates": 2}, {"budget": "1h"}], ids=str)
def test_a_cut_prompt_is_told_once_with_any_budget(pipe, amount):
    long = "a red circle left of a blue square above a green circle below a cyan square"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        searcher = prepare(pipe, reward=tiny.Redness(), prompt=long, **(OPTIONS | amount))
        searcher.candidates = 2
        result = searcher.block([long])[0]
    assert len([w for w in caught if "(text encoder 2) reads 12 tokens" in str(w.message)]) == 1
    assert any("(text encoder 2) reads 12 tokens" in note for note in result.notes)


def test_it_is_saved_whole(pipe, tmp_path):
    result = find(pipe, candidates=6, top=2, compare=True)
    record = result.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == json.loads(json.dumps(record))
    files = {*record["files"]["images"], record["files"]["board"], record["files"]["best_of_n"], "result.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    needed = "prompt model rewards policy seed reward candidates cost history files reproduce best_of_n_at_this_cost"
    assert set(needed.split()) <= set(record)
    assert {"nfe", "tflop", "seconds", "looks"} <= set(record["cost"])


BAD = {
    "no reward": ({"reward": None}, "name a reward; known are shapes"),
    "unknown reward": ({"reward": "magic"}, "unknown reward 'magic'; known are shapes"),
    "both": ({"budget": "9NFE", "candidates": 2}, "not both"),
    "no candidate": ({"candidates": 0}, "at least 1, got 0"),
    "small budget": ({"budget": "4NFE"}, "the smallest that works is 5NFE"),
    "rungs": ({"policy": SuccessiveHalving((5,), keep=(0.5,))}, "must lie below the 5 steps"),
    "top": ({"candidates": 2, "top": 0}, "top must be at least 1"),
    "argument": ({"num_steps": 5}, "takes no num_steps; did you mean num_inference_steps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case, pipe):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        find(pipe, **options)


def test_an_empty_prompt_is_refused(pipe):
    with pytest.raises(ValueError, match="prompt is empty"):
        ttsnap.search(pipe, " ", reward=tiny.Redness(), candidates=2, **OPTIONS)


class Nothing:
    """An object that can be called."""

    def __call__(self, images, prompts, sigma):
        return None

    judge = __call__


OWN = {
    "an object": (Nothing(), "must return one number per image, shape .2., got NoneType"),
    "a method": (Nothing().judge, "must return one number per image, shape .2., got NoneType"),
    "a partial": (partial(Nothing().judge, sigma=1), "must return one number per image, shape .2., got NoneType"),
    "nothing": (lambda images, prompts, *, sigma: None, "must return one number per image, shape .2., got NoneType"),
    "one for all": (lambda images, prompts, *, sigma: images.mean(), r"shape \[2\], got \[\]"),
    "too few": (lambda images, prompts, *, sigma: [1.0], r"shape \[2\], got \[1\]"),
    "texts": (lambda images, prompts, *, sigma: ["good", "bad"], "got list"),
    "no prompts": (lambda images: images.mean((1, 2, 3)), "it is called as reward.images, prompts, sigma="),
    "raises": (lambda images, prompts, *, sigma: 1 / 0, "fails on two pictures .ZeroDivisionError"),
}


@pytest.mark.parametrize("case", OWN)
def test_a_reward_that_cannot_judge_is_told_before_a_model_is_loaded(case, monkeypatch):
    from ttsnap.live import session

    monkeypatch.setattr(session, "load_sampler", lambda *_, **__: pytest.fail("a model was loaded"))
    reward, message = OWN[case]
    with pytest.raises(ValueError, match=message):
        ttsnap.search("shapes", "a red circle", reward={"mine": reward})


def test_a_reward_may_do_without_the_noise_level(pipe):
    def told(images, prompts, *, sigma):
        return images.mean((1, 2, 3))

    def plain(images, prompts):
        return images.mean((1, 2, 3))

    found = [find(pipe, reward={"bright": judge}) for judge in (told, plain)]
    assert found[0].seed == found[1].seed
    assert found[0].reward == found[1].reward


def test_a_list_of_prompts_gives_a_list_of_what_each_gives_alone(pipe):
    prompts = ["a red circle", "a blue square"]
    both = ttsnap.search("shapes", prompts, candidates=2, policy="best-of-n", num_inference_steps=3)
    for prompt, result in zip(prompts, both, strict=True):
        alone = ttsnap.search("shapes", prompt, candidates=2, policy="best-of-n", num_inference_steps=3)
        assert (result.prompt, result.best.seed) == (prompt, alone.best.seed)
        assert result.reward == pytest.approx(alone.reward, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 100}, "a budget is a text such as '200NFE'"),
        ({"candidates": "8"}, "candidates must be a whole number of at least 1, got '8'"),
        ({"policy": "hand-picked"}, "needs a person at each look: open the page"),
    ],
)
def test_wrong_settings_are_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        ttsnap.search("shapes", "a red circle", **arguments)


def test_prompts_are_texts():
    with pytest.raises(ValueError, match="a prompt is a text, got int 3"):
        ttsnap.search("shapes", ["a red circle", 3])


def test_torchs_own_generator_is_as_it_was():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ttsnap.search(
        "shapes",
        "a red circle",
        reward={"mine": lambda images, prompts, *, sigma: images.mean((1, 2, 3))},
        candidates=2,
        preview="tiny",
        num_inference_steps=4,
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_rewards_run_on_a_device_of_their_own(monkeypatch):
    """There is one device here; what is asked for by name of another reaches whoever loads the rewards."""
    from ttsnap import rewards
    from ttsnap.live.settings import ModelSettings
    from ttsnap.shapes.pipeline import load_pipeline

    placed, load = [], rewards.load
    monkeypatch.setattr(
        rewards, "load", lambda named, device, *rest: placed.append((named, device)) or load(named, device, *rest)
    )
    pipe, options = load_pipeline(), {"candidates": 2, "num_inference_steps": 2, "policy": BestOfN()}
    ours = ttsnap.search(pipe, PROMPT, reward="shapes", report="shapes-hard", reward_device="cpu:0", **options)
    assert placed == [("shapes", torch.device("cpu:0")), ("shapes-hard", torch.device("cpu:0"))]
    placed.clear()
    assert ttsnap.search(pipe, PROMPT, reward="shapes", report="none", **options).reward == ours.reward
    assert placed == [("shapes", torch.device("cpu"))]
    ModelSettings(reward_device="cpu:0").load_rewards("shapes", torch.device("cpu"))
    ModelSettings().load_rewards("shapes", torch.device("cpu"))
    assert [device for _, device in placed[1:]] == [torch.device("cpu:0"), torch.device("cpu")]
    with pytest.raises(ValueError, match="device 'cuda:7' is not there; this machine has cpu"):
        prepare("a-model-that-is-not-loaded/x", reward="shapes", reward_device="cuda:7")
