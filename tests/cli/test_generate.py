"""The command itself, on the embedded model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests import commands

COMMAND = [sys.executable, "-c", "from ttsnap.cli import main; main()", "generate"]
PROMPT = "a red circle left of a blue square"


def ttsnap(*arguments, check=True):
    done = commands.ttsnap("generate", *arguments)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def test_one_prompt_gives_an_image_a_board_and_a_record(tmp_path):
    out = tmp_path / "run"
    done = ttsnap(PROMPT, "--budget", "60NFE", "--top", 2, "--compare", "--out", out, "--json")
    record = json.loads(done.stdout)
    assert {p.name for p in out.iterdir()} == {
        "best.png",
        "top2.png",
        "best_of_n.png",
        "best_of_n_20.png",  # the model's own number of steps; a budget chose fewer
        "board.png",
        "result.json",
        "settings.json",
    } - ({"top2.png"} if record["candidates"]["finished"] == 1 else set())
    assert record["prompt"] == PROMPT
    assert record["cost"]["nfe"] <= 60
    assert record["cost"]["looks"] == sum(len(c["looks"]) for c in record["history"])
    assert record["best_of_n_at_this_cost"]["cost"]["tflop"] <= record["cost"]["tflop"]
    assert record["best_of_n_at_this_cost"]["reward"] is not None
    winner = next(c for c in record["history"] if c["seed"] == record["seed"])
    assert winner["looks"][-1] == {"step": 4, "reward": record["reward"], "kept": True}
    assert Image.open(out / "best.png").size == (64, 64)
    assert Image.open(out / "board.png").width > 1000
    again = ttsnap(PROMPT, "--budget", "60NFE", "--top", 2, "--compare", "--out", out)
    assert "nothing was run again" in again.stdout
    other = ttsnap(PROMPT, "--budget", "80NFE", "--out", out, check=False)
    assert other.returncode == 2
    assert "other settings (budget, top, compare differ)" in other.stderr


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_files(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a {colour} circle above a green square" for colour in ("red", "blue", "cyan")))
    # Sixteen survivors fill half a batch, so that every prompt is a block of its own or shares one with another.
    options = ["--prompts", prompts, "--candidates", 32, "--rungs", "4", "--keep", ".9", "--no-board", "--out"]
    ttsnap(*options, tmp_path / "whole")
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [*COMMAND, *map(str, options), str(broken)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.time() + 300
    while not (broken / "p0000" / "result.json").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (broken / "p0000" / "result.json").exists()
    ttsnap(*options, broken)

    def files(folder: Path):
        found = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                data = json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()
                if path.name == "result.json":
                    data["cost"].pop("seconds")
                found[str(path.relative_to(folder))] = data
        return found

    assert files(broken) == files(tmp_path / "whole")


BAD = {
    "empty prompt": ([" "], "is empty"),
    "no prompt": ([], "give a prompt"),
    "unknown model": (["x", "--model", "nope"], "unknown model 'nope'"),
    "unknown reward": (["x", "--reward", "magic"], "unknown reward 'magic'; known are shapes"),
    "unknown policy": (["x", "--policy", "magic"], "unknown policy 'magic'; known are best-of-n"),
    "missing prompts": (["--prompts", "nowhere.txt"], "cannot read prompts from nowhere.txt"),
    "missing policy file": (["x", "--policy", "nowhere.json"], "cannot read policy file nowhere.json"),
    "rungs not ascending": (["x", "--rungs", "5,3"], "rungs must ascend"),
    "rungs beyond the steps": (["x", "--rungs", "3,20"], "below the 20 steps"),
    "rungs not numbers": (["x", "--rungs", "a,b"], "--rungs takes numbers"),
    "keep ratios": (["x", "--rungs", "3,7", "--keep", ".5"], "2 rungs need 2 keep ratios, got 1"),
    "keep ratio": (["x", "--rungs", "3", "--keep", "0"], "above 0 and at most 1"),
    "budget without unit": (["x", "--budget", "200"], "needs a number and a unit"),
    "budget too small": (["x", "--budget", "3NFE"], "the smallest that works is 4NFE"),
    "budget and candidates": (["x", "--budget", "99NFE", "--candidates", "3"], "not both"),
    "no device": (["x", "--device", "cuda:7"], "device 'cuda:7' is not there"),
    "no such device": (["x", "--device", "abacus"], "device 'abacus' is not there"),
    "dtype": (["x", "--dtype", "int3"], "unknown dtype 'int3'"),
    "size": (["x", "--size", "big"], "--size takes pixels"),
    "preview": (
        ["x", "--preview", "blurry"],
        "a preview is auto, full, tiny[=DIR], small[=PIXELS] or linear, got 'blurry'",
    ),
    "steps": (["x", "--steps", "0"], "steps must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, tmp_path, monkeypatch, capsys):
    from ttsnap import cli

    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ttsnap", "generate", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert message in lines[0]


def test_bad_files_are_one_sentence(tmp_path, monkeypatch, capsys):
    from ttsnap import cli

    (tmp_path / "bad.json").write_text("[1, 2")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["--prompts", "bad.json"], "is not valid JSON"),
        (["--prompts", "object.json"], "must hold a JSON list of strings"),
        (["x", "--out", "file"], "is a file; give a directory"),
        (["x", "--model", "empty"], "is not a diffusers directory"),
        (["x", "--policy", "bad.json"], "is not valid JSON"),
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ttsnap", "generate", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
