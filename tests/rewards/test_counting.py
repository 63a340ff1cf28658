"""TFLOP of looks: counted without weights, without the text that is kept, equal to what runs."""

from __future__ import annotations

import pytest
import torch

from tests.rewards import reference as ref
from tests.rewards.test_trainable import folder, load  # noqa: F401  (a fixture)
from ttsnap.rewards.noise_aware import NoiseAwareReward
from ttsnap.samplers import flops
from ttsnap.training.trainable import adapt


@pytest.mark.parametrize("name", ["imagereward", "pickscore", "hpsv2", "aesthetic"])
def test_counted_on_copies_without_data(folder, monkeypatch, name):  # noqa: F811
    reward = load(folder, name)
    images = torch.rand(1, 3, 64, 48, generator=ref.generator())
    reward(images, ["a"])  # what is kept of a prompt is not counted
    real = flops.count_tflop(lambda: reward(images, ["a"]))
    called = []
    forward = type(reward).forward
    monkeypatch.setattr(type(reward), "forward", lambda self, *a, **k: called.append(self) or forward(self, *a, **k))
    assert flops.count_look(reward, "cpu", 64, 48, "a new prompt") == pytest.approx(real)
    assert called
    assert reward not in called
    assert not any(name == "a new prompt" for name in getattr(reward, "texts", {}))


def test_a_noise_aware_reward_is_counted_as_its_clean_one(folder):  # noqa: F811
    reward = load(folder, "hpsv2")
    alone = flops.count_look(reward, "cpu", 64, 48)
    parameters = adapt(reward, "full", 1, 1.0)
    aware = NoiseAwareReward(reward, parameters, {0.5: {n: p.detach() for n, p in parameters.items()}})
    assert flops.count_look(aware, "cpu", 64, 48) == pytest.approx(alone)


def test_any_callable_is_run_and_one_that_tells_is_not():
    def mean(images, prompts, *, sigma):
        return (images.flatten(1) @ torch.ones(images[0].numel(), 1))[:, 0]

    assert flops.count_look(mean, "cpu", 4, 4) == pytest.approx(2 * 3 * 16 / 1e12)
    mean.tflop = 7
    assert flops.count_look(mean, "cpu", 4, 4) == 7
    assert flops.count_looks({"a": mean, "b": mean}, torch.rand(1, 3, 4, 4), "a") == 14
