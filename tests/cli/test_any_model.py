"""`generate` on models of a directory, and with pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pipelines import tiny_any

REWARD = ["--reward", "tests.pipelines.tiny:redness"]
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


def test_a_winner_of_a_multistep_scheduler_reproduces(models, tmp_path, ttsnap):
    from diffusers import StableDiffusionPipeline

    code, out, err = ttsnap(
        "generate", "a red circle", "--model", models / "sd", "--size", 32, "--out", tmp_path / "o", *FEW
    )
    assert code == 0, err
    record = json.loads(out)
    assert record["cost"]["nfe"] == 3 + 2 * 3
    pipe = StableDiffusionPipeline.from_pretrained(models / "sd", safety_checker=None)
    best = np.asarray(Image.open(tmp_path / "o" / "best.png"))
    assert difference(record, pipe, best) <= 1  # a batch rounds otherwise than one alone


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


def difference(record, pipe, made):
    """Of 255, between a picture and what the stock pipeline makes by the line in the record, alone."""
    import PIL.Image

    pipe.set_progress_bar_config(disable=True)
    stock = eval(record["reproduce"], {"pipe": pipe, "torch": torch, "PIL": PIL}).images[0]
    return np.abs(np.asarray(stock).astype(int) - made).max()


def test_a_mask_is_painted_over(tmp_path, picture, ttsnap):
    pipe = tiny_any.stable_diffusion("DDIMScheduler", "StableDiffusionInpaintPipeline")
    pipe.save_pretrained(tmp_path / "inpaint")
    Image.fromarray(np.pad(np.full((24, 24), 255, np.uint8), 12)).save(tmp_path / "mask.png")
    made = {}
    for name, mask in (("some", tmp_path / "mask.png"), ("all", None)):
        if mask is None:
            mask = tmp_path / "white.png"
            Image.new("L", (48, 48), 255).save(mask)
        code, out, err = ttsnap(
            "generate", "a red circle", "--model", tmp_path / "inpaint", "--image", picture, "--mask", mask,
            "--size", 32, "--out", tmp_path / name, *FEW,
        )  # fmt: skip
        assert code == 0, err
        record = json.loads(out)
        assert ".resize((32, 32)), mask_image=" in record["reproduce"]
        made[name] = np.asarray(Image.open(record["files"]["images"][0]))
        assert difference(record, pipe, made[name]) <= 1
    assert (made["some"] != made["all"]).any()


def test_a_control_image_leads(tmp_path, picture, ttsnap):
    pipe = tiny_any.stable_diffusion("UniPCMultistepScheduler", "StableDiffusionControlNetPipeline")
    pipe.save_pretrained(tmp_path / "control")
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    made = []
    for number, control in enumerate((picture, tmp_path / "black.png")):
        code, out, err = ttsnap(
            "generate", "a red circle", "--model", tmp_path / "control", "--control-image", control,
            "--size", 32, "--out", tmp_path / str(number), *FEW,
        )  # fmt: skip
        assert code == 0, err
        record = json.loads(out)
        made.append(np.asarray(Image.open(record["files"]["images"][0])))
        assert difference(record, pipe, made[-1]) <= 1
    assert (made[0] != made[1]).any()


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


RECORD = ["a red circle", "--per-prompt", "2", "--steps", "3", "--calls", "1,3", "--size", 32, "--json"]


@pytest.mark.slow
def test_record_stores_the_chosen_frame_of_videos_or_asks_for_one(models, tmp_path, ttsnap):
    video = ["record", *RECORD, "--model", models / "ltx"]
    code, _, err = ttsnap(*video, "--out", tmp_path / "many")
    assert code == 2
    assert "LTXPipeline makes videos, and a tree keeps one image of each look: choose one frame" in err
    assert not (tmp_path / "many").exists()
    made = {}
    for frame in ("first", "last"):
        code, out, err = ttsnap(*video, "--out", tmp_path / frame, "--look-frames", frame)
        assert code == 0, err
        assert json.loads(out)["images"] == 4
        made[frame] = np.asarray(Image.open(tmp_path / frame / "p0000" / "id000" / "s02.png"))
    pipe = tiny_any.ltx()
    film = pipe(
        "a red circle",
        height=32,
        width=32,
        num_inference_steps=3,
        output_type="np",
        generator=torch.Generator("cpu").manual_seed(0),
    ).frames[0]
    for frame, index in (("first", 0), ("last", -1)):
        assert np.abs((film[index] * 255).round() - made[frame]).max() <= 1
    code, _, err = ttsnap(*video, "--out", tmp_path / "last", "--look-frames", "first")
    assert code == 2
    assert "look_frames" in err


def test_record_judges_several_frames_of_videos(models, tmp_path, ttsnap):
    from ttsnap.recordings import Recording

    code, _, err = ttsnap("record", *RECORD, "--model", models / "ltx", "--out", tmp_path / "r.zarr", *REWARD)
    assert code == 0, err
    assert np.isfinite(Recording(tmp_path / "r.zarr").clean[0][:, [0, 2]]).all()


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
        (["--call", "magic=1"], "StableDiffusionPipeline takes no magic; it takes"),
        (["--control-image", picture], "StableDiffusionPipeline takes no control image; load a ControlNet pipeline"),
    ):
        code, _, err = ttsnap(
            "generate", "x", "--model", models / "sd", "--size", 32, "--out", tmp_path / "o", *FEW, *options
        )
        errors = [line for line in err.strip().splitlines() if line.startswith("error")]
        assert code == 2
        assert len(errors) == 1
        assert message in errors[0]
