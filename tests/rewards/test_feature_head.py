"""A head on the denoiser's features: what it reads, what it answers, how it is stored."""

from __future__ import annotations

import json

import pytest
import torch

from tests.pipelines import tiny
from ttsnap import rewards
from ttsnap.pipelines.features import Features, Place, attach
from ttsnap.pipelines.sampler import Sampler
from ttsnap.rewards.feature_head import FeatureHead, FeatureReward, HeadConfig, load_head, save_head

PLACE = Place("single_transformer_blocks.0", grid=4)
CONFIG = HeadConfig(channels=32, word_width=128, grid=4, words=12, width=16, depth=1, heads=2, mean=3.0, std=2.0)
PROMPTS = ["a red circle", "a blue square left of a green circle"]


def make(config=CONFIG, sigma=0.5):
    torch.manual_seed(0)
    return FeatureReward(tiny.Redness(), FeatureHead(config).eval(), [PLACE], sigma, "red")


@pytest.fixture
def features():
    sampler = Sampler(tiny.flux(), num_inference_steps=4, height=32, width=32, max_sequence_length=12)
    attach(sampler, {"it": make()})
    return sampler.features(sampler.advance(sampler.start(PROMPTS * 3, list(range(6))), 2))


def test_a_candidates_reward_does_not_depend_on_its_batch(features):
    reward = make()
    together = reward.early(features, PROMPTS * 3, sigma=0.5)
    alone = [
        reward.early(Features(features.cells[i : i + 1], features.words[i : i + 1]), [""], sigma=0.5) for i in range(6)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    assert together.shape == (6,)
    assert together.std() > 1e-3


def test_it_reads_cells_words_and_noise_level(features):
    reward = make()
    usual = reward.early(features, PROMPTS * 3, sigma=0.75)
    swapped = features._replace(words=features.words[::-1])
    for other in (reward.early(features, PROMPTS * 3, sigma=0.5), reward.early(swapped, PROMPTS * 3, sigma=0.75)):
        assert (other - usual).abs().min() > 1e-5
    longer = features._replace(words=[torch.cat([states, states]) for states in features.words])
    torch.testing.assert_close(reward.early(longer, PROMPTS * 3, sigma=0.75), usual)  # reads the first 12 words only
    blind = make(HeadConfig(**{**CONFIG.__dict__, "word_width": 0}))
    same = [blind.early(some, PROMPTS * 3, sigma=0.75) for some in (features, swapped)]
    torch.testing.assert_close(*same)


def test_prompts_of_different_lengths_do_not_see_each_others_padding(features):
    reward = make()
    short = features._replace(words=[features.words[0][:3], *features.words[1:]])
    alone = Features(features.cells[:1], [features.words[0][:3]])
    answers = (reward.early(short, PROMPTS * 3, sigma=0.75)[:1], reward.early(alone, PROMPTS[:1], sigma=0.75))
    torch.testing.assert_close(*answers)


def test_below_its_last_noise_level_and_for_finished_images_the_clean_reward_serves():
    reward, images = make(sigma=0.5), torch.rand(2, 3, 8, 8)
    assert [reward.level(sigma) for sigma in (1.0, 0.5, 0.49, 0.0)] == [1.0, 0.5, None, None]
    torch.testing.assert_close(reward(images, PROMPTS, sigma=0.0), tiny.Redness()(images, PROMPTS, sigma=0.0))


def test_what_is_saved_is_loaded(features, tmp_path, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "red", lambda device: tiny.Redness())
    reward = make()
    for parameter in reward.head.parameters():
        parameter.data = parameter.data.half().float()
    save_head(reward.head, tmp_path / "head", reward="red", places=[PLACE], sigma=0.5, trained_on="nothing")
    for name in (str(tmp_path / "head"), f"red+{tmp_path / 'head'}"):
        (loaded,) = rewards.load(name).values()
        assert (loaded.places, loaded.sigma, loaded.clean_name) == ((PLACE,), 0.5, "red")
        answers = (r.early(features, PROMPTS * 3, sigma=0.75) for r in (loaded, reward))
        torch.testing.assert_close(*answers)
    with pytest.raises(ValueError, match="was trained from the reward red, not from shapes"):
        load_head(tmp_path / "head", clean="shapes")


def test_what_is_wrong_with_a_head_is_one_sentence(features, tmp_path, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "red", lambda device: tiny.Redness())
    with pytest.raises(ValueError, match="is not a feature head"):
        load_head(tmp_path)
    save_head(make().head, tmp_path, reward="red", places=[PLACE], sigma=0.5)
    description = json.loads((tmp_path / "head.json").read_text())
    changes = ({"version": 9}, {"format": "other"}, {"config": {}}, {"config": {**CONFIG.__dict__, "width": 32}})
    for change in changes:
        (tmp_path / "head.json").write_text(json.dumps(description | change))
        with pytest.raises(ValueError, match="is not a feature head") as caught:
            load_head(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="reads 16 cells of 8 channels, the model gives 16 of 32"):
        make(HeadConfig(**{**CONFIG.__dict__, "channels": 8})).early(features, PROMPTS * 3, sigma=0.5)
