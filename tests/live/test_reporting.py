"""A held-out reward beside the optimised one: what it says, when it warns, what it costs; and weighted rewards."""

from __future__ import annotations

import json
import warnings
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

import ttsnap
from ttsnap.core.driver import run
from ttsnap.core.grid import Query
from ttsnap.core.ranking import WeightedSum, read_rule
from ttsnap.live.reporting import HeldOut, report, second_reward, warning
from ttsnap.policies import BestOfN, Branching, SuccessiveHalving
from ttsnap.replay.environment import ReplayEnvironment
from ttsnap.rewards.sources import CLIPSCORE, HPSV2, HPSV21, IMAGEREWARD, PICKSCORE, local_only

PROMPT = "a red circle"


def brightness(images, prompts, *, sigma):
    return images.mean(dim=(1, 2, 3))


def darkness(images, prompts, *, sigma):
    return -images.mean(dim=(1, 2, 3))


@lru_cache
def pipeline():
    from ttsnap.shapes.pipeline import load_pipeline

    return load_pipeline()


def search(**options):
    return ttsnap.search(pipeline(), PROMPT, candidates=4, num_inference_steps=4, policy=BestOfN(), **options)


def test_a_child_in_the_place_of_a_candidate_that_best_of_n_finishes_is_judged_itself():
    """Both have one seed, and are two pictures."""
    policy = Branching((0.25, 0.5), keep=(0.1, 0.1), grow=(1.0, 1.0), angle=90.0)
    options = {"candidates": 4, "num_inference_steps": 4, "policy": policy, "compare": True}
    shared = 0
    for seed in range(0, 16, 4):
        result = ttsnap.search(
            pipeline(), PROMPT, reward={"dark": darkness}, report={"bright": brightness}, seed=seed, **options
        )
        (held_out,) = result.held_out
        assert held_out.reward == pytest.approx(np.asarray(result.image, dtype=float).mean() / 255, abs=1e-6)
        best = np.asarray(result.best_of_n.best.image, dtype=float).mean() / 255
        assert held_out.best_of_n == pytest.approx(best, abs=1e-6)
        shared += result.seed in result.lineage and result.seed < seed + result.best_of_n.candidates
    assert shared


def test_it_judges_the_finished_images_and_steers_nothing():
    plain = search(reward={"bright": brightness}, report="none")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the winner")  # it agrees: nothing to warn of
        result = search(
            reward={"bright": brightness}, report={"also": lambda i, p, *, sigma: 2 * i.mean(dim=(1, 2, 3))}
        )
    assert (result.seed, result.reward, result.cost.looks) == (plain.seed, plain.reward, plain.cost.looks)
    assert result.cost.tflop == plain.cost.tflop
    (held_out,) = result.held_out
    assert held_out.name == "also"
    assert held_out.images == 4
    exact = np.asarray(result.image, dtype=float).mean() / 255
    assert held_out.reward == pytest.approx(2 * exact, rel=1e-5)
    assert held_out.reward > held_out.median
    assert held_out.parted is False
    assert result.to_dict()["held_out"][0]["parted"] is False
    assert plain.to_dict()["held_out"] == []


def test_it_warns_when_they_part():
    with pytest.warns(UserWarning, match=r"worse than the median finished image by the held-out reward dark"):
        result = search(reward={"bright": brightness}, report={"dark": darkness}, compare=True)
    assert result.held_out[0].parted is True
    assert result.held_out[0].best_of_n is not None
    assert any("reward hacking" in note for note in result.notes)
    assert result.board().size[1] > 100


def test_what_it_took_is_told_apart():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = search(reward={"bright": brightness}, report="shapes")
    counted = search(reward="shapes")
    without = search(reward={"bright": brightness})
    assert counted.cost.text_tflop > without.cost.text_tflop
    assert result.held_out[0].tflop == pytest.approx(counted.cost.tflop - without.cost.tflop)  # of four looks, too


def test_what_is_at_hand_is_held_out_unless_that_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given, refused = search(reward="shapes"), search(reward="shapes", report="none")
    (held_out,) = given.held_out
    assert (held_out.name, held_out.images, held_out.tflop) == ("shapes-checker", 4, 0)
    assert held_out.reward == check_share(given.image)
    assert (given.seed, given.cost.tflop, given.cost.looks) == (refused.seed, refused.cost.tflop, refused.cost.looks)
    assert refused.held_out == []
    assert second_reward("shapes", ["shapes-checker"]) is None


def check_share(image):
    from ttsnap.shapes.checker import check

    verdict = check(np.asarray(image), PROMPT)
    return (verdict.count + verdict.colour + verdict.shape + verdict.relation) / 4


def test_one_that_is_at_hand_never_fails_a_search(monkeypatch):
    from ttsnap.rewards import REWARDS

    def fails(device="cpu"):
        raise MemoryError

    result = ttsnap.search(pipeline(), "a corgi", candidates=2, num_inference_steps=2, policy=BestOfN())
    assert result.held_out == []
    assert any("there is no held-out reward" in note and "nan" in note for note in result.notes)
    monkeypatch.setitem(REWARDS, "shapes-checker", fails)
    result = search(reward="shapes")
    assert result.held_out == []
    assert any("there is no held-out reward: memory ran out" in note for note in result.notes)


def test_a_published_one_is_at_hand_where_its_files_are_in_the_cache(tmp_path, monkeypatch):
    """Empty files in the layout of the hub's cache; nothing is asked of a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert second_reward("some/model", ["mine"]) is None
    for source in (PICKSCORE, CLIPSCORE, HPSV2, HPSV21):
        for repo, name in ((source.repo, source.files[0]), (source.tokenizer, "vocab.json")):
            folder = tmp_path / f"models--{repo.replace('/', '--')}"
            (folder / "snapshots" / "abc").mkdir(parents=True, exist_ok=True)
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / "main").write_text("abc")
            (folder / "snapshots" / "abc" / name).touch()
    assert second_reward("some/model", ["mine"]) == "clipscore"
    assert second_reward("some/model", ["imagereward+run", "clipscore"]) == "pickscore"
    assert second_reward("some/model", ["clipscore", "pickscore", "hpsv2.1"]) is None  # hpsv2 is nearly the same
    with local_only(), pytest.raises(ValueError, match=r"not on this machine and could not be downloaded .*the cache"):
        IMAGEREWARD.weights()


def test_one_image_has_nothing_to_be_compared_with():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    (one,) = report({"dark": darkness}, {"dark": (0.5, 0.25)}, PROMPT, {(7, False): image}, (7, False), None)
    assert (one.reward, one.parted, one.tflop) == (0.0, None, 0.75)
    assert warning([[one]], ["bright"]) is None
    with pytest.raises(ValueError, match=f"reward bad returned nan for prompt '{PROMPT}', seed 7"):
        report(
            {"bad": lambda i, p, *, sigma: i.sum(dim=(1, 2, 3)) * torch.nan},
            {"bad": (0, 0)},
            PROMPT,
            {(7, False): image},
            (7, False),
            None,
        )


def test_the_warning_counts_prompts():
    def held_out(reward, images=3):
        return [HeldOut("h", reward, 0.5, images, None, 0.0)]

    said = warning([held_out(0.4), held_out(0.6), held_out(0.1, images=1)], ["x", "y"])
    assert said is not None
    assert said.startswith("the winner by x, y is worse")
    assert "h (on 1 of 2 prompts)" in said
    assert warning([held_out(0.5), held_out(0.6)], ["x"]) is None


def test_several_rewards_are_combined_by_the_sum_of_their_ranks():
    from scipy.stats import rankdata

    def left(images, prompts, *, sigma):
        return images[..., :32].mean(dim=(1, 2, 3)) * 1000  # a reward of another scale counts as much

    result = search(reward={"bright": brightness, "left": left}, top=4)
    assert len(result.images) == 4
    values = [[image.rewards[name] for image in result.images] for name in ("bright", "left")]
    expected = sum(rankdata(row) for row in values)
    assert [image.reward for image in result.images] == expected.tolist()
    assert expected.tolist() == sorted(expected, reverse=True)
    assert result.to_dict()["weights"] is None


def test_weighted_rewards_end_to_end():
    both = {"bright": brightness, "dark": darkness}
    for weights, wanted in (((1, 0), "bright"), ((0, 1), "dark"), ((1, 3), "dark")):
        result = search(reward=both, combine=WeightedSum(weights))
        alone = search(reward={wanted: both[wanted]})
        assert result.seed == alone.seed
        assert result.to_dict()["weights"] == list(weights)
        expected = sum(w * v for w, v in zip(weights, result.images[0].rewards.values(), strict=True))
        assert result.reward == pytest.approx(expected)
    with pytest.raises(ValueError, match="2 rewards need as many weights, got 3"):
        search(reward=both, combine=WeightedSum((1, 2, 3)))
    with pytest.raises(ValueError, match="the reward bright cannot be both optimised and held out"):
        search(reward=both, report={"bright": brightness})


def test_a_bound_and_a_minimum_end_to_end():
    both = {"bright": brightness, "dark": darkness}
    everything = search(reward=both, top=4, combine="minimum")
    shown = {image.seed: image.rewards for image in everything.images}
    assert everything.to_dict()["combine"] == "minimum"
    level = sorted(values["dark"] for values in shown.values())[1]  # three of four are as dark as that
    result = search(reward=both, top=4, combine=f"bright where dark>={level}")
    kept = {seed: values["bright"] for seed, values in shown.items() if values["dark"] >= level}
    assert [image.seed for image in result.images][:3] == sorted(kept, key=kept.get, reverse=True)
    assert result.reward == max(kept.values())
    assert result.images[3].rewards["bright"] > result.reward  # the brightest does not keep the bound
    assert result.to_dict()["combine"] == f"bright where dark>={level:g}"
    assert result.to_dict()["weights"] is None
    assert not any("no finished image keeps" in note for note in result.notes)
    with pytest.warns(UserWarning, match="no finished image keeps dark>=1; the winner has dark -0"):
        hopeless = search(reward=both, combine="bright where dark>=1")
    assert hopeless.best.rewards["dark"] == max(values["dark"] for values in shown.values())
    assert f"no finished image keeps dark>=1; the winner has dark {hopeless.best.rewards['dark']:.4g}" in hopeless.notes
    with pytest.raises(ValueError, match="combine names the reward 'left'; there is bright, dark"):
        search(reward=both, combine="left where dark>=0")
    with pytest.raises(ValueError, match="give weights, or a callable that combines the rewards, not both"):
        search(reward=both, combine=WeightedSum((1, 2)), weights=(1, 2))


def test_live_and_replay_choose_alike_by_a_bound():
    rule = "bright where dark>=-.4"
    policy = SuccessiveHalving((1, 2), (0.5, 0.5))
    both = {"bright": brightness, "dark": darkness}
    options = {"candidates": 8, "num_inference_steps": 4, "combine": rule, "reward": both}
    values = np.zeros((1, 8, 4, 2))

    session = ttsnap.prepare(pipeline(), policy=policy, **options)
    grid = session.engine().grid([PROMPT], np.arange(8)[None])
    for step in range(1, 5):
        values[:, :, step - 1] = grid.observe(Query(np.ones((1, 8), dtype=bool), step))
    replayed = run(policy, ReplayEnvironment(values, [PROMPT], np.arange(8)[None]), read_rule(rule, list(both)))
    live = ttsnap.search(pipeline(), PROMPT, policy=policy, **options)
    assert live.seed == int(replayed.chosen[0])


def test_on_the_command_line(tmp_path, monkeypatch, ttsnap):
    (tmp_path / "paints.py").write_text(
        "def bright(images, prompts, *, sigma):\n    return images.mean(dim=(1, 2, 3))\n"
        "def dark(images, prompts, *, sigma):\n    return -images.mean(dim=(1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["generate", PROMPT, "--candidates", "4", "--steps", "4", "--policy", "best-of-n", "--out", "out"]
    command += ["--reward", "paints:bright,shapes", "--weights", "1,.0", "--report-reward", "paints:dark"]
    code, out, err = ttsnap(*command, "--json")
    assert code == 0
    record = json.loads(out)
    assert record["weights"] == [1.0, 0.0]
    assert record["held_out"][0]["name"] == "paints:dark"
    assert record["held_out"][0]["parted"] is True
    assert "worse than the median" in err
    _, shown, _ = ttsnap(*command)
    assert "held out, paints:dark: -0." in shown
    assert "median of 4 finished -0." in shown
    assert "worse than the median on 1 of 1 prompts" in shown
    assert "they may part (reward hacking)" in shown
    assert Image.open(tmp_path / "out" / "board.png").size[0] > 100
    bound = ["--combine", "paints:bright where shapes>=-100", "--reward-device", "cpu:0"]
    small = [
        "generate",
        PROMPT,
        "--candidates",
        "2",
        "--steps",
        "2",
        "--reward",
        "paints:bright,shapes",
        "--out",
        "small",
    ]
    code, out, err = ttsnap(*small, *bound, "--json")
    assert code == 0, err
    assert json.loads(out)["combine"] == "paints:bright where shapes>=-100"
    for wrong, message in (
        (["--weights", "1"], "2 rewards (paints:bright, shapes) need as many weights, got 1"),
        (["--combine", "paints:bright where hps>=1"], "combine names the reward 'hps'"),
        (["--weights", "1,x"], "numbers separated by commas"),
        (["--report-reward", "magic"], "unknown reward 'magic'"),
    ):
        code, _, err = ttsnap(*command[:-6], "--reward", "paints:bright,shapes", *wrong)
        assert code == 2
        assert message in err
