"""The experiments that ship: each can be read, names a known reward, and trains in the way it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from ttsnap import rewards
from ttsnap.training.config import Config, read_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_there_is_one_for_each_model_and_reward():
    names = {f"{model}-{reward}" for model in ("flux", "sdxl") for reward in ("imagereward", "pickscore", "hpsv2")}
    assert {path.stem for path in CONFIGS} == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_whole(path):
    values = read_config(path)
    config = Config.of(values)
    assert config.settings() | values == config.settings()  # nothing is read as something else
    model, reward = path.stem.split("-", 1)
    assert rewards.names_of(config.reward) == [reward]
    assert (config.tree, config.labels) == (f"data/{model}", f"data/{path.stem}.zarr")
    assert config.method == "lora"
