"""The command itself, on the embedded model."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ttsnap.recordings import Recording
from ttsnap.recordings.image_tree import ImageTree
from ttsnap.replay import cost_model_of

SOURCE = ["--prompts", "shapes:held-out", "--prompt-range", "2:6", "--per-prompt", 4, "--seed", 100, "--steps", 5]


def images(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.png"))}


def test_a_tree_comes_back_from_its_seeds(ttsnap, tmp_path):
    code, out, _ = ttsnap("record", *SOURCE, "--calls", "1,3,5", "--out", tmp_path / "tree", "--json")
    report = json.loads(out)
    assert (code, report["prompts"], report["candidates"], report["images"]) == (0, 4, 4, 48)
    assert report["calls"] == [1, 3, 5]
    tree = ImageTree.open(tmp_path / "tree")
    assert {path.name for path in tree.root.iterdir()} == {"manifest.json", "p0002", "p0003", "p0004", "p0005"}
    assert tree.seeds[2].tolist() == [108, 109, 110, 111]
    assert tree.settings["model"] == "shapes"

    again = ttsnap("record", *SOURCE, "--calls", "1,3,5", "--out", tmp_path / "again")
    assert "48 images in" in again[1]
    assert images(tmp_path / "again") == images(tree.root)

    from ttsnap.shapes.pipeline import load_pipeline

    made = load_pipeline()(
        tree.prompts[3],
        generator=torch.Generator("cpu").manual_seed(int(tree.seeds[3, 2])),
        num_inference_steps=5,
        height=64,
        width=64,
        max_sequence_length=12,
    ).images[0]
    difference = np.abs(np.asarray(made).astype(int) - tree.read(3, 2, 5))
    assert difference.max() <= 1


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_files(ttsnap, tmp_path):
    options = ["record", "--prompts", "shapes:train", "--prompt-range", "0:5", "--per-prompt", 2]
    options += ["--max-batch", 2, "--steps", 4, "--calls", "2,3,4"]
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, "-c", "from ttsnap.cli import main; main()", *map(str, options), "--out", str(broken)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while not (broken / "p0001").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = images(broken)
    assert 0 < len(found) < 5 * 2 * 3
    whole = next(iter(found))
    (broken / whole).write_bytes(found[whole][:1000])
    code, out, _ = ttsnap(*options, "--out", broken, "--json")
    assert code == 0
    assert json.loads(out)["images_found"] == len(found) - 1
    ttsnap(*options, "--out", tmp_path / "whole")
    assert images(broken) == images(tmp_path / "whole")
    assert not list(broken.rglob(".*"))
    assert "nothing was run again" in ttsnap(*options, "--out", broken)[1]


def test_rewards_without_images(ttsnap, tmp_path):
    code, out, _ = ttsnap("record", *SOURCE, "--reward", "shapes", "--out", tmp_path / "r", "--json")
    assert code == 0
    assert json.loads(out)["rewards"] == ["shapes"]
    recording = Recording.open(tmp_path / "r")
    assert recording.shape == (4, 4, 5, 1)
    assert recording.seeds[0].tolist() == [108, 109, 110, 111]
    assert "nothing was run again" in ttsnap("record", *SOURCE, "--reward", "shapes", "--out", tmp_path / "r")[1]
    code, _, err = ttsnap("record", *SOURCE, "--guidance", 2, "--reward", "shapes", "--out", tmp_path / "r")
    assert code == 2
    assert "other settings (guidance_scale differ)" in err


def test_stored_small_in_the_other_format(ttsnap, tmp_path):
    out = tmp_path / "tree"
    ttsnap(
        "record", "a red circle", "--per-prompt", 1, "--store-size", 32, "--format", "webp", "--steps", 3, "--out", out
    )
    with Image.open(out / "p0000" / "id000" / "s02.webp") as image:
        assert image.size == (32, 32)


def test_a_full_disk_is_one_sentence(ttsnap, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(self, data):
        if {"id002", "id003"} & set(self.parts):
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    options = ["record", "a red circle", "--per-prompt", 4, "--max-batch", 2, "--steps", 3, "--out", tmp_path / "tree"]
    code, _, err = ttsnap(*options)
    assert code == 2
    lines = [line for line in err.strip().splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert lines[0].startswith("error: No space left on device: ")
    assert lines[0].endswith("; what is stored is whole, and with more room the same command goes on from it")
    monkeypatch.setattr(Path, "write_bytes", write)
    assert "6 were there already" in ttsnap(*options)[1]


BAD = {
    "no prompt": ([], "give a prompt"),
    "unknown list": (["--prompts", "shapes:test"], "known are geneval, shapes:train, shapes:held-out"),
    "range": (["x", "--prompt-range", "3"], "--prompt-range takes first and end"),
    "empty range": (["x", "--prompt-range", "1:2"], "holds no prompt; there are 1"),
    "per prompt": (["x", "--per-prompt", "0"], "--per-prompt must be at least 1"),
    "calls": (["x", "--calls", "a"], "--calls takes numbers"),
    "half calls": (["x", "--calls", "1.5"], "--calls takes whole numbers"),
    "calls beyond": (["x", "--calls", "1,21"], "calls must be in 1..20, got 21"),
    "format": (["x", "--format", "gif"], "--format is png or webp, got 'gif'"),
    "store size": (["x", "--store-size", "65"], "can be stored at 1 to 64, got 65"),
    "store size of rewards": (["x", "--reward", "shapes", "--store-size", "32"], "no images are stored"),
    "unknown reward": (["x", "--reward", "magic"], "unknown reward 'magic'"),
    "unknown model": (["x", "--model", "nope"], "unknown model 'nope'"),
    "a file": (["x", "--out", "file"], "is a file; give a directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, ttsnap, tmp_path, monkeypatch):
    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, _, err = ttsnap("record", *(["--out", "new"] if "--out" not in arguments else []), *arguments)
    assert code == 2
    lines = [line for line in err.strip().splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert message in lines[0]


def test_previews_are_recorded_at_the_size_of_the_finished_images_with_their_cost(ttsnap, tmp_path):
    options = ["record", "a red circle", "--per-prompt", 2, "--steps", 6, "--calls", "3", "--preview", "small=32"]
    code, out, _ = ttsnap(*options, "--out", tmp_path / "tree", "--json")
    assert code == 0
    assert json.loads(out)["settings"]["preview"] == "small=32"
    early, last = (np.asarray(Image.open(tmp_path / f"tree/p0000/id001/s{s}.png")) for s in ("02", "05"))
    assert early.shape == last.shape == (64, 64, 3)
    assert ttsnap("label", tmp_path / "tree", tmp_path / "labels.zarr", "--reward", "shapes")[0] == 0
    assert ttsnap(*options, "--reward", "shapes", "--out", tmp_path / "straight.zarr")[0] == 0
    labelled, straight = (Recording.open(tmp_path / f"{name}.zarr") for name in ("labels", "straight"))
    np.testing.assert_allclose(labelled.clean[0, :, 5], straight.clean[0, :, 5], atol=0.1)
    for recording in (labelled, straight):
        model = cost_model_of(recording)
        assert model.look(5).source == "small"
        assert model.look(5).picture_tflop < model.decode_tflop / 3
        assert model.look(5).judge_tflop == pytest.approx(model.look_tflop)


def test_rewards_are_gone_on_with_only_by_the_same_code_of_ones_own(ttsnap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = tmp_path / "my_judge_of_records.py"
    code.write_text("def bright(images, prompts):\n    return images.mean((1, 2, 3))\n")
    command = ["record", "a red circle", "--per-prompt", 2, "--steps", 3, "--out", tmp_path / "out.zarr"]
    command += ["--reward", "my_judge_of_records:bright"]
    assert ttsnap(*command)[0] == 0
    assert "complete already" in ttsnap(*command)[1]
    code.write_text("def bright(images, prompts):\n    return 1 - images.mean((1, 2, 3))\n")
    status, _, err = ttsnap(*command)
    assert status == 2
    assert "the content of reward my_judge_of_records:bright" in err
