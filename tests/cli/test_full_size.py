"""The whole way with the configs that ship, on tiny random models of the real classes."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("peft")
from tests.pipelines import tiny, tiny_sd
from tests.rewards import reference as ref
from tests.training.test_configs import CONFIGS
from ttsnap.rewards.noise_aware import read_run

PROMPTS = ["a red circle", "a blue square", "a green triangle left of a red circle", "a purple square"]
MODELS = {"flux": (tiny.flux, ["--size", "32"]), "sdxl": (tiny_sd.sdxl, ["--size", "32", "--guidance", "4"])}


def weights(reward, folder):
    """A random checkpoint in the published layout; returns its file."""
    folder.mkdir()
    if reward == "imagereward":
        return ref.save_imagereward(folder, "ImageReward.pt", ref.imagereward_state(len(ref.bert_tokenizer())))
    state = ref.open_clip_state(len(ref.clip_tokenizer()))
    if reward == "pickscore":
        return ref.save_clip(folder, "model.safetensors", ref.to_transformers(state))
    return ref.save_clip(folder, "HPS_v2_compressed.pt", state)


@pytest.mark.parametrize(
    "config",
    [pytest.param(c, marks=pytest.mark.slow, id=c.stem) for c in CONFIGS],
)
def test_from_images_to_a_search_with_the_noise_aware_reward(config, ttsnap, tmp_path):
    model, reward = config.stem.split("-", 1)
    build, options = MODELS[model]
    build().save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--steps", "4", *options]
    named = f"{reward}={weights(reward, tmp_path / 'weights')}"
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))

    def run(*arguments):
        code, out, err = ttsnap(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    tree, labels, out = tmp_path / "tree", tmp_path / "labels.zarr", tmp_path / "run"
    prompts = ["--prompts", tmp_path / "prompts.json"]
    run("record", *options, *prompts, "--per-prompt", "4", "--store-size", "16", "--out", tree)
    run("label", tree, labels, "--reward", named, "--final-only")
    changes = ["--held-out", "1", "--batch", "8", "--set", "precision=no", "--set", "rank=2", "--cpu"]
    trained = run("train", tree, labels, "--config", config, "--reward", named, *changes, "--out", out)
    assert [level["call"] for level in trained["levels"]] == [3, 2, 1]
    assert trained["method"] == "lora"
    assert set(trained["evaluation"]["after"]) == {"1", "2", "3", "4"}
    assert len(read_run(out)["levels"]) == 3
    search = ["--candidates", "4", "--rungs", "1,2", "--keep", ".5,.5"]
    found = run("generate", PROMPTS[0], *options, "--reward", out, *search, "--out", tmp_path / "found")
    clean = run("generate", PROMPTS[0], *options, "--reward", named, *search, "--out", tmp_path / "clean")
    assert found["cost"]["nfe"] == clean["cost"]["nfe"] == 4 + 2 + 2
    looks = [[h["looks"][0]["reward"] for h in result["history"]] for result in (found, clean)]
    assert looks[0] != looks[1]  # the first look is served by the weights of its level
