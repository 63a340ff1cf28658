"""The loop: the same course however a batch is divided, learning, and going on after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("accelerate")
from safetensors.torch import load_file

from tests import commands
from tests.training.tiny import PROMPTS, config, make_data, options
from ttsnap.rewards.noise_aware import load_noise_aware, read_run
from ttsnap.training import train
from ttsnap.training.runs import read_log


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def course(data, out, **changes):
    """Loss and gradient norm of every update."""
    train(config(data, **changes), out, cpu=True)
    return curve(out)


def curve(out):
    return np.array([(line["loss"], line["gradient_norm"]) for line in read_log(out / "log.jsonl")])


def weights(out):
    return [load_file(out / level["file"]) for level in read_run(out)["levels"]]


def assert_same_weights(one, other):
    for a, b in zip(weights(one), weights(other), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name].numpy(), b[name].numpy(), err_msg=name)


LOSSES = {
    "mse, and a part of a batch is left": {"batch": 6},
    "preference, normalised": {"preference": 1.0, "temperature": 0.5, "normalise": True},
}


@pytest.mark.parametrize("case", LOSSES)
def test_parts_of_a_batch_add_up_to_the_whole(data, tmp_path, case):
    whole = course(data, tmp_path / "whole", **LOSSES[case])
    parts = course(data, tmp_path / "parts", accumulate=2, **LOSSES[case])
    assert len(whole) == (6 if "batch" in LOSSES[case] else 4)
    np.testing.assert_allclose(parts, whole, rtol=2e-4)


@pytest.mark.slow
def test_two_processes_take_the_course_of_one(data, tmp_path):
    one = course(data, tmp_path / "one", preference=1.0)
    command = [sys.executable, "-m", "ttsnap", *options(data, "--out", tmp_path / "two", "--set", "preference=1")]
    workers = commands.in_ranks(command, timeout=120, ACCELERATE_USE_CPU="true")
    assert [worker.returncode for worker in workers] == [0, 0], workers
    assert "2 noise levels" in workers[0].stdout
    assert workers[1].stdout == ""
    np.testing.assert_allclose(curve(tmp_path / "two"), one, rtol=2e-4)


def test_one_level_learns_32_images_by_heart(tmp_path):
    make_data(tmp_path, prompts=4, candidates=8, side=64)
    losses = course(
        tmp_path, tmp_path / "run", levels=[2], epochs_per_level=60, batch=32, learning_rate=3e-3, schedule="cosine"
    )[:, 0]
    assert losses[0] > 1
    assert losses[-1] < 0.02


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.training.tiny import config
from ttsnap.training import train
def die(line):
    if (line["stage"], line["update"]) == (1, 4):
        os.kill(os.getpid(), signal.SIGKILL)
changes = {"epochs_per_level": 4, "checkpoint_every": 3, "method": sys.argv[4], "rank": 2}
train(config(Path(sys.argv[1]), **changes), sys.argv[2], cpu=True, on_update=die)
"""


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.slow
def test_killed_in_the_middle_of_a_level_it_ends_the_same(data, tmp_path, method):
    pytest.importorskip("peft")
    changes = {"epochs_per_level": 4, "checkpoint_every": 3, "method": method, "rank": 2}
    root = os.fspath(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    arguments = [sys.executable, "-c", KILLED, data, tmp_path / "killed", root, method]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(curve(tmp_path / "killed")) == 8 + 5
    report = train(config(data, **changes), tmp_path / "killed", cpu=True)
    assert report.found == 8 + 3
    np.testing.assert_array_equal(curve(tmp_path / "killed"), course(data, tmp_path / "whole", **changes))
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    again = train(config(data, **changes), tmp_path / "killed", cpu=True)
    assert again.found == again.updates


def test_adapters_are_small_and_new_ones_change_nothing(data, tmp_path):
    pytest.importorskip("peft")
    import torch

    from ttsnap.rewards import load

    full = train(config(data, method="full"), tmp_path / "full", cpu=True)
    lora = train(config(data, method="lora", rank=2), tmp_path / "lora", cpu=True)
    assert lora.parameters < full.parameters / 5
    assert all(".lora_" in name for level in weights(tmp_path / "lora") for name in level)
    images = torch.rand(3, 3, 64, 64)
    aware, clean = load_noise_aware(tmp_path / "lora"), load("shapes")["shapes"]
    torch.testing.assert_close(
        aware(images, PROMPTS[:3], sigma=0.0), clean(images, PROMPTS[:3], sigma=0.0), rtol=0, atol=0
    )
    assert (aware(images, PROMPTS[:3], sigma=0.5) != clean(images, PROMPTS[:3], sigma=0.5)).all()


def test_what_is_measured(data, tmp_path):
    report = train(config(data, held_out=1), tmp_path / "run", cpu=True)
    before, during, after = (report.evaluation[when] for when in ("before", "during", "after"))
    assert list(before) == list(after) == ["1", "2", "3", "4"]
    assert list(during) == ["3", "2"]
    assert report.prompts == 3
    for call, sigma in (("3", 0.5), ("2", 0.75)):
        assert during[call] == pytest.approx(after[call], abs=1e-5), sigma
    assert before["4"] == after["4"]
    assert before["2"] != after["2"]


def test_tensorboard_is_told_every_update_once_although_the_run_was_stopped(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Stop(Exception):
        pass

    def stop(line):
        if (line["stage"], line["update"]) == (1, 1):
            raise Stop

    changes = {"log_with": ["tensorboard"], "held_out": 1, "epochs_per_level": 2, "checkpoint_every": 3}
    with pytest.raises(Stop):
        train(config(data, **changes), tmp_path / "run", cpu=True, on_update=stop)
    train(config(data, **changes), tmp_path / "run", cpu=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    told = events.Scalars("train/loss")
    assert [event.step for event in told] == list(range(len(curve(tmp_path / "run"))))
    np.testing.assert_allclose([event.value for event in told], curve(tmp_path / "run")[:, 0], rtol=1e-6)
    assert {"before/kendall_tau/call 2", "during/mse/call 3", "after/top_gap_25/call 1"} <= set(
        events.Tags()["scalars"]
    )


@pytest.mark.slow
def test_pictures_are_drawn(data, tmp_path):
    from PIL import Image

    train(config(data, held_out=1), tmp_path / "held", cpu=True)
    train(config(data), tmp_path / "all", cpu=True)
    for path in ("held/evaluation.png", "held/losses.png", "all/losses.png"):
        with Image.open(tmp_path / path) as picture:
            assert np.ptp(np.asarray(picture.convert("L"))) > 200
    assert not (tmp_path / "all" / "evaluation.png").exists()


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr("ttsnap.training.tracking.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"log_with wandb: it is not installed; pip install wandb"):
        train(config(data, log_with=["wandb"]), tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()
