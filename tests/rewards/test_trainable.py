"""What all trainable rewards share: gradients, adapters, checkpointing, levels, and a run of `ttsnap train`."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("accelerate")
import torch
from torch.nn.utils import parameters_to_vector

from tests.rewards import reference as ref
from ttsnap import rewards
from ttsnap.rewards.noise_aware import NoiseAwareReward
from ttsnap.rewards.trainable import TrainableReward, adapt

PROMPTS = ["a red circle", "a blue square"]
IMAGES = torch.rand(2, 3, 40, 40, generator=ref.generator(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name in ("imagereward", "pickscore", "hpsv2", "aesthetic"):
        (folder / name).mkdir()
    state = ref.open_clip_state(len(ref.clip_tokenizer()))
    ref.save_imagereward(folder / "imagereward", "ImageReward.pt", ref.imagereward_state(len(ref.bert_tokenizer())))
    ref.save_clip(folder / "pickscore", "model.safetensors", ref.to_transformers(state))
    ref.save_clip(folder / "hpsv2", "HPS_v2_compressed.pt", state)
    (folder / "aesthetic" / "clip").mkdir()
    ref.save_clip(folder / "aesthetic" / "clip", "model.safetensors", ref.to_transformers(state), act="quick_gelu")
    ref.save(folder / "aesthetic" / "aesthetic-model.pth", ref.head_state(ref.EMBED))
    return folder


ALL = ["imagereward", "pickscore", "hpsv2", "aesthetic"]


def load(folder, name):
    return rewards.load(f"{name}={folder / name}")[name]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", ALL)
def test_every_trained_parameter_gets_a_gradient(folder, name, method):
    reward = load(folder, name)
    assert isinstance(reward, TrainableReward)
    with torch.no_grad():
        before = reward(IMAGES, PROMPTS, sigma=0.5)
    parameters = adapt(reward, method, 2, 2.0)
    torch.testing.assert_close(reward(IMAGES, PROMPTS, sigma=0.5), before)
    reward.train()
    reward(IMAGES, PROMPTS, sigma=0.5).square().sum().backward()
    touched = {n: p.grad.abs().sum() > 0 for n, p in parameters.items() if p.grad is not None}
    assert touched.keys() == parameters.keys()
    # The second factor of a new adapter is 0, so the first gets a gradient of 0; softmax forgets the keys' bias.
    expected = [n for n in parameters if "lora_A" not in n and not n.endswith(("k_proj.bias", "key.bias"))]
    assert all(touched[n] for n in expected), [n for n in expected if not touched[n]]
    if method == "lora":
        kinds = {re.split(r"\.lora_", n)[0].split(".")[-1] for n in parameters}
        clip = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
        blip = {"qkv", "projection", "fc1", "fc2", "query", "key", "value", "dense"}
        assert kinds == (blip if name == "imagereward" else clip)


@pytest.mark.parametrize("name", ALL)
def test_gradient_checkpointing_changes_nothing(folder, name):
    gradients = []
    for checkpointing in (False, True):
        reward = load(folder, name)
        for module in reward.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        parameters = adapt(reward, "full", 1, 1.0)
        if checkpointing:
            reward.gradient_checkpointing_enable()
        reward.train()
        reward(IMAGES, PROMPTS, sigma=0.5).square().sum().backward()
        gradients.append(parameters_to_vector([p.grad for p in parameters.values()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["imagereward", "pickscore", "hpsv2"])
def test_levels_serve_by_sigma(folder, name):
    clean, reward = load(folder, name), load(folder, name)
    parameters = adapt(reward, "full", 1, 1.0)
    levels = {s: {n: p.detach() * (1 + 0.1 * s) for n, p in parameters.items()} for s in (0.5, 1.0)}
    aware = NoiseAwareReward(reward, parameters, levels, name)
    with torch.no_grad():
        finished, half, full = (aware(IMAGES, PROMPTS, sigma=s) for s in (0.0, 0.5, 1.0))
        assert torch.equal(finished, clean(IMAGES, PROMPTS, sigma=0.0))
        assert not torch.equal(half, full)
        assert torch.equal(aware(IMAGES, PROMPTS, sigma=0.0), finished)


@pytest.mark.parametrize(("name", "method"), [("imagereward", "lora"), ("pickscore", "full"), ("hpsv2", "lora")])
def test_a_run_of_train_and_a_search_with_it(folder, tmp_path, name, method):
    from tests.training.tiny import config, make_data
    from ttsnap.training import train

    make_data(tmp_path, prompts=2, candidates=2, reward=name)
    spec = f"{name}={folder / name}"
    report = train(
        config(tmp_path, reward=spec, method=method, rank=2, levels=[3], checkpointing=True), tmp_path / "run", cpu=True
    )
    assert report.method == method
    (served,) = rewards.load(f"{spec}+{tmp_path / 'run'}").values()
    assert rewards.names_of(f"{spec}+{tmp_path / 'run'}") == [f"{name}+{tmp_path / 'run'}"]
    with torch.no_grad():
        clean = load(folder, name)(IMAGES, PROMPTS, sigma=0.0)
        torch.testing.assert_close(served(IMAGES, PROMPTS, sigma=0.0), clean)
        assert not torch.allclose(served(IMAGES, PROMPTS, sigma=0.5), clean)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["reward"] == spec
    other = "pickscore" if name != "pickscore" else "hpsv2"
    with pytest.raises(ValueError, match=f"was trained from the reward {name}, not from {other}"):
        rewards.load(f"{other}+{tmp_path / 'run'}")
