"""`generate` and `record` on tiny random models of the Stable Diffusion families, as diffusers directories."""

from __future__ import annotations

import ast
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pipelines import tiny_sd
from ttsnap.recordings import Recording
from ttsnap.recordings.image_tree import ImageTree

PROMPT = "a blue square left of a green circle"
SD_1_5 = {"skip_prk_steps": True, "set_alpha_to_one": False}  # its own scheduler, PNDM, is no pure function


def sd():
    return tiny_sd.stable_diffusion(tiny_sd.scheduler("PNDMScheduler", **SD_1_5))


CASES = {
    "sd": (sd, ["--scheduler", "euler-karras", "--negative-prompt", "a cyan square"]),
    "sdxl": (tiny_sd.sdxl, ["--guidance", "4"]),
    "sd3": (tiny_sd.sd3, []),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "sd3" else n for n in CASES])
def test_generated_reproduced_and_recorded(name, ttsnap, tmp_path):
    build, options = CASES[name]
    folder = tmp_path / "model"
    build().save_pretrained(folder)
    options = [PROMPT, "--model", folder, "--steps", 4, "--size", "48x32", *options]
    judge = ["--reward", "tests.pipelines.tiny:redness"]
    search = ["--candidates", 4, "--rungs", "1,2", "--keep", ".5,.5"]
    code, out, err = ttsnap("generate", *options, *judge, *search, "--json", "--out", tmp_path / "out")
    assert code == 0, err
    record = json.loads(out)
    assert record["cost"]["nfe"] == 4 + 2 + 2
    best = np.asarray(Image.open(tmp_path / "out" / "best.png")).astype(int)
    assert best.shape == (32, 48, 3)
    assert np.abs(best - reproduced(folder, record["reproduce"])).max() <= 1

    code, _, err = ttsnap("record", *options, *judge, "--per-prompt", 4, "--out", tmp_path / "rewards")
    assert code == 0, err
    recording = Recording.open(tmp_path / "rewards")
    assert recording.clean.shape == (1, 4, 4, 1)
    assert recording.clean[0, record["seed"], -1, 0] == pytest.approx(record["reward"], abs=1e-5)
    assert (np.diff(recording.sigmas) < 0).all()

    code, _, err = ttsnap("record", *options, "--per-prompt", 1, "--calls", "1,4", "--out", tmp_path / "tree")
    assert code == 0, err
    assert ImageTree.open(tmp_path / "tree").read(0, 0, 4).shape == (32, 48, 3)


def reproduced(folder, code):
    """What the stock pipeline makes with the lines that a result carries."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    body = ast.parse(code).body
    names = {"pipe": pipe, "torch": torch, "diffusers": diffusers}
    exec(compile(ast.Module(body[:-1], []), "reproduce", "exec"), names)
    return np.asarray(eval(compile(ast.Expression(body[-1].value), "reproduce", "eval"), names).images[0]).astype(int)
