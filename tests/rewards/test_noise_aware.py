"""Which level serves a look, what switching costs, names, and runs that are not in order."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("accelerate")
import torch
from safetensors.torch import load_file, save_file

from tests.training.tiny import PROMPTS, config, make_data
from ttsnap import rewards
from ttsnap.rewards.noise_aware import NoiseAwareReward, load_noise_aware
from ttsnap.rewards.trainable import adapt, load_trainable
from ttsnap.training import train

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_data(folder)
    train(config(folder), folder / "run", cpu=True)
    return folder / "run"


def look(reward, sigma):
    return reward(IMAGES, PROMPTS[:2], sigma=sigma)


def test_the_nearest_level_serves_and_below_the_last_the_clean_reward(run):
    aware, clean = load_noise_aware(run), rewards.load("shapes")["shapes"]
    assert aware.sigmas == (0.5, 0.75)
    expected = {0.0: None, 0.49: None, 0.5: 0.5, 0.62: 0.5, 0.63: 0.75, 0.75: 0.75, 1.0: 0.75}
    assert {sigma: aware.level(sigma) for sigma in expected} == expected
    by_level = {sigma: look(aware, sigma) for sigma in (0.5, 0.75)}
    assert not torch.equal(by_level[0.5], by_level[0.75])
    for sigma, level in expected.items():
        assert torch.equal(look(aware, sigma), look(clean, sigma) if level is None else by_level[level])


def test_a_recording_keeps_clean_and_noise_aware_values(run, tmp_path):
    from ttsnap.pipelines.sampler import Sampler
    from ttsnap.recordings.recorder import record_rewards
    from ttsnap.shapes.pipeline import OPTIONS, load_pipeline

    sampler, seeds = Sampler(load_pipeline(), **OPTIONS), np.arange(4).reshape(2, 2)
    both = record_rewards(sampler, rewards.load(f"shapes+{run}"), PROMPTS[:2], seeds, tmp_path / "both", calls=[4, 16])
    clean = record_rewards(sampler, rewards.load("shapes"), PROMPTS[:2], seeds, tmp_path / "clean", calls=[4, 16])
    assert both.rewards == clean.rewards == ("shapes",)
    np.testing.assert_array_equal(both.clean, clean.clean)
    served = [sigma >= 0.5 for sigma in sampler.sigmas]
    assert (served[3], served[15]) == (True, False)
    assert np.isfinite(both.aware[:, :, 3]).all()
    assert (both.aware[:, :, 3] != both.clean[:, :, 3]).any()
    assert np.isnan(both.aware[:, :, 4:]).all()
    assert both.has_aware
    assert not clean.has_aware
    with pytest.raises(ValueError, match="keeps each reward once"):
        record_rewards(sampler, rewards.load(f"shapes,{run}"), PROMPTS[:2], seeds, tmp_path / "twice")


def test_names(run, monkeypatch):
    for name in (str(run), f"shapes+{run}"):
        (loaded,) = rewards.load(name).values()
        assert torch.equal(look(loaded, 0.5), look(load_noise_aware(run), 0.5))
    assert rewards.names_of(f"shapes,shapes+{run}") == ["shapes", f"shapes+{run}"]
    with pytest.raises(ValueError, match="was trained from the reward shapes, not from other"):
        load_noise_aware(run, clean=rewards.Spec("other"))
    with pytest.raises(ValueError, match="nowhere is not a training run"):
        rewards.load("shapes+nowhere")


def test_what_is_wrong_with_a_run_is_one_sentence(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    description = json.loads((run / "run.json").read_text())

    def refused(message, **changes):
        (folder / "run.json").write_text(json.dumps(description | changes))
        with pytest.raises(ValueError, match=message) as caught:
            load_noise_aware(folder)
        assert "\n" not in str(caught.value)

    refused("cannot be read")
    refused("has no trained level yet", levels=[])
    refused("has version 9; this ttsnap reads 1", version=9)
    refused("does not describe a training run", format="other")
    for level in description["levels"]:
        tensors = load_file(run / level["file"])
        name, tensor = tensors.popitem()
        save_file(tensors, folder / level["file"])
    refused("is in one of them only")
    for level in description["levels"]:
        save_file({**tensors, name: tensor.repeat(2, *[1] * (tensor.ndim - 1))}, folder / level["file"])
    refused("has shape")
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        load_noise_aware(folder)


def test_what_can_be_trained(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "plain", lambda device: lambda images, prompts, *, sigma: images)
    with pytest.raises(ValueError, match="reward plain cannot be trained"):
        load_trainable("plain", "cpu")
    reward = load_trainable("shapes", "cpu")
    parameters = adapt(reward, "full", 1, 1.0)
    with pytest.raises(ValueError, match="at least one noise level"):
        NoiseAwareReward(reward, parameters, {})
    adapt(reward, "full", 1, 1.0)
    look(reward, 0.5).sum().backward()
    assert all(parameter.grad is not None for parameter in parameters.values())
