"""The command itself, on tiny data."""

from __future__ import annotations

import json

import pytest
import yaml

pytest.importorskip("accelerate")
from tests.training.tiny import make_data, options
from ttsnap.recordings import Recording


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def test_train_then_record_with_it(ttsnap, data, tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump({"epochs_per_level": 5, "preference": 1, "learning_rate": 1e-4}))
    more = ("--config", file, "--epochs-per-level", "1", "--held-out", "1", "--out", tmp_path / "run")
    code, out, err = ttsnap(*options(data, *more), "--json")
    assert code == 0, err
    report = json.loads(out)
    assert [level["call"] for level in report["levels"]] == [3, 2]
    assert report["evaluation"]["after"]["1"]["mse"] > 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["epochs_per_level"], saved["preference"], saved["learning_rate"]) == (1, 1.0, 1e-3)
    code, out, _ = ttsnap(*options(data, *more))
    assert "nothing was trained again" in out
    assert "Kendall tau" in out
    name = f"shapes+{tmp_path / 'run'}"
    code, _, err = ttsnap(
        "record", "a red circle", "--per-prompt", "2", "--steps", "4", "--reward", name, "--out", tmp_path / "r"
    )
    assert code == 0, err
    found = Recording.open(tmp_path / "r")
    assert found.rewards == ("shapes",)
    assert (found.clean[0, :, 0] != found.aware[0, :, 0]).all()
    code, _, err = ttsnap(*options(data, *more, "--seed", "1"))
    assert code == 2
    assert "begun with other settings (seed differ)" in err


BAD = {
    "setting": (["--set", "speed=1"], "unknown setting 'speed'"),
    "no value": (["--set", "speed"], "--set takes NAME=VALUE"),
    "levels": (["--levels", "all"], "--levels takes calls such as 15:1"),
    "range": (["--levels", "4:x"], "--levels takes calls such as 15:1"),
    "not there": (["--levels", "9"], "no x0 estimates after call 9"),
    "reward": (["--reward", "magic"], "unknown reward 'magic'"),
    "config": (["--config", "nowhere.yaml"], "cannot read the config nowhere.yaml"),
    "held out": (["--held-out", "9"], "cannot be held out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, ttsnap, data, tmp_path):
    arguments, message = BAD[case]
    code, _, err = ttsnap(*options(data, "--out", tmp_path / "out", *arguments))
    assert code == 2
    assert message in err
    assert err.count("error") == 1
    assert not (tmp_path / "out").exists()


def test_a_directory_with_something_else_is_left_alone(ttsnap, data, tmp_path):
    (tmp_path / "mine.txt").touch()
    code, _, err = ttsnap(*options(data, "--out", tmp_path))
    assert code == 2
    assert "is not empty and not a training run" in err
    code, _, err = ttsnap("train", data / "nowhere", data / "labels", "--out", tmp_path / "out")
    assert (code, "there is no image tree" in err) == (2, True)


def test_a_missing_image_is_named(ttsnap, data, tmp_path):
    make_data(tmp_path)
    (tmp_path / "tree" / "p0001" / "id002" / "s02.png").unlink()
    code, _, err = ttsnap(*options(tmp_path, "--out", tmp_path / "out"))
    assert code == 2
    assert "p0001/id002/s02.png is missing" in err


def test_two_commands_to_a_judge_of_features_in_use(ttsnap, tmp_path):
    prompts = ["shapes:train", "--prompt-range", "0:10", "--per-prompt", "3", "--steps", "4"]
    recording, head = tmp_path / "rec.zarr", tmp_path / "head"
    code, _, err = ttsnap("record", "--prompts", *prompts, "--reward", "shapes", "--features", "--out", recording)
    assert code == 0, err
    train = ("train", "--judge", "features", recording, "--out", head, "--set", "updates=16", "--batch", "32", "--cpu")
    code, out, err = ttsnap(*train)
    assert code == 0, err
    assert "Kendall tau with the finished images' shapes on 2 held-out prompts" in out
    assert f"--reward shapes+{head}" in out
    code, out, err = ttsnap(
        "generate", "a red circle", "--reward", f"shapes+{head}", "--steps", "4", "--candidates", "4",
        "--rungs", "1", "--keep", ".5", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0, err
    cost = json.loads(out)["cost"]
    assert cost["looks"] == 6  # 4 early ones at features, 2 finished images
    assert cost["decodes"] == 2
    code, _, err = ttsnap(*train)
    assert code == 2
    assert "holds a head already" in err
    for wrong, told in (
        (("--judge", "features", "--levels", "2"), "unknown setting 'levels'"),
        (("--judge", "magic"), "--judge is pictures or features"),
    ):
        code, _, err = ttsnap("train", recording, *wrong, "--out", tmp_path / "new")
        assert code == 2
        assert told in err
    code, _, err = ttsnap("record", "a red circle", "--features", "--out", tmp_path / "tree")
    assert code == 2
    assert "add --reward" in err
