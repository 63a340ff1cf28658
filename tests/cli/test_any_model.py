"""`generate` on models of a directory that no adapter serves, and with pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.samplers import tiny_any

REWARD = ["--reward", "tests.samplers.tiny_any:redness"]
FEW = [*REWARD, "--candidates", "3", "--steps", "4", "--rungs", "1", "--keep", ".6", "--json"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_any.stable_diffusion("UniPCMultistepScheduler").save_pretrained(folder / "sd")
    tiny_any.ltx().save_pretrained(folder / "ltx")
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray((np.random.default_rng(0).random((48, 48, 3)) * 255).astype(np.uint8)).save(path)
    return path


def test_a_scheduler_that_no_adapter_takes_gives_a_notice_and_a_winner_that_reproduces(models, tmp_path, ttsnap):
    from diffusers import StableDiffusionPipeline

    code, out, err = ttsnap(
        "generate", "a red circle", "--model", models / "sd", "--size", 32, "--out", tmp_path / "o", *FEW
    )
    assert code == 0, err
    record = json.loads(out)
    assert "the pipeline runs with its own call" in err
    assert any("UniPCMultistepScheduler" in note for note in record["notes"])
    assert record["cost"]["nfe"] == 3 + 2 * 3
    pipe = StableDiffusionPipeline.from_pretrained(models / "sd", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    made = eval(record["reproduce"], {"pipe": pipe, "torch": torch}).images[0]
    np.testing.assert_array_equal(np.asarray(made), np.asarray(Image.open(tmp_path / "o" / "best.png")))


@pytest.mark.slow
def test_image_to_image(models, tmp_path, picture, ttsnap):
    code, out, err = ttsnap(
        "generate", "a red circle", "--model", models / "sd", "--image", picture, "--strength", .75, "--size", 32,
        "--out", tmp_path / "o", *FEW,
    )  # fmt: skip
    assert code == 0, err
    record = json.loads(out)
    assert record["num_steps"] == 3
    assert Image.open(record["files"]["images"][0]).size == (32, 32)
    other = tmp_path / "other.png"
    Image.new("RGB", (32, 32)).save(other)
    code, _, err = ttsnap(
        "generate", "a red circle", "--model", models / "sd", "--image", other, "--strength", .75, "--size", 32,
        "--out", tmp_path / "o", *FEW,
    )  # fmt: skip
    assert code == 2
    assert "other settings (image differ)" in err


def test_a_video_keeps_its_frames_and_shows_the_middle_one(models, tmp_path, ttsnap):
    code, out, err = ttsnap(
        "generate", "a red circle", "--model", models / "ltx", "--size", 32, "--look-frames", "first,last",
        "--out", tmp_path / "o", *FEW,
    )  # fmt: skip
    assert code == 0, err
    record = json.loads(out)
    with Image.open(record["files"]["videos"][0]) as film:
        assert film.n_frames > 2
        film.seek(film.n_frames // 2)
        middle = np.asarray(film.convert("RGB"))
    np.testing.assert_array_equal(middle, np.asarray(Image.open(tmp_path / "o" / "best.png")))


def test_wrong_pictures_are_one_sentence(models, tmp_path, picture, ttsnap):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (20000, 10)).save(tmp_path / "long.png")
    for options, message in (
        (["--image", tmp_path / "none.png"], "cannot read"),
        (["--image", tmp_path / "text.png"], "is not a picture that can be read"),
        (["--image", tmp_path / "long.png"], "at most 64 million are taken"),
        (["--image", picture, "--strength", "1.5"], "strength must be above 0 and at most 1, got 1.5"),
        (["--strength", "0.5"], "strength needs an image to start from"),
        (["--look-frames", "end"], "look frames are first, middle, last or indices"),
        (["--sampler", "magic"], "a sampler is one of auto, adapter, fallback, got 'magic'"),
        (["--control-image", picture], "StableDiffusionPipeline takes no control image; load a ControlNet pipeline"),
    ):
        code, _, err = ttsnap(
            "generate", "x", "--model", models / "sd", "--size", 32, "--out", tmp_path / "o", *FEW, *options
        )
        errors = [line for line in err.strip().splitlines() if line.startswith("error")]
        assert code == 2
        assert len(errors) == 1
        assert message in errors[0]
