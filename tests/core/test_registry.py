"""Things by name, from installed packages too."""

from __future__ import annotations

import sys

import pytest

from ttsnap.core.registry import Registry
from ttsnap.pipelines.models import MODELS


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that offers a reward."""
    about = tmp_path / "tidy-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tidy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ttsnap.rewards]\ntidy = tidy_rewards:load\nshapes2 = nowhere:load\n")
    (tmp_path / "tidy_rewards.py").write_text("def load(device):\n    return 'tidy on ' + device\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("tidy_rewards", None)


def test_what_an_installed_package_offers_is_known_and_loaded_when_it_is_asked_for(package):
    rewards = Registry("ttsnap.rewards", plain=len)
    shapes = {f"shapes{kind}" for kind in ("", "-aware", "-checker", "-hard", "-hard-aware", "-hard-checker")}
    assert {"tidy", "shapes2", "plain"} | shapes == set(rewards)
    assert "tidy_rewards" not in sys.modules
    assert rewards["tidy"]("cpu") == "tidy on cpu"
    assert rewards["plain"] is len
    with pytest.raises(KeyError):
        rewards["nobody"]


def test_what_needs_no_entry_point_wins(package):
    assert Registry("ttsnap.rewards", tidy=len)["tidy"] is len


def test_the_embedded_model_is_one_of_them():
    model = MODELS["shapes"]
    assert (model.reward, model.candidates) == ("shapes-aware", 8)
    assert len(model.prompts["held-out"]()) > 200
