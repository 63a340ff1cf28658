"""`ttsnap show`, and `ttsnap generate --from`, on the embedded model."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
from pathlib import Path

import pytest
from PIL import Image

from ttsnap.cli import from_picture
from ttsnap.files import metadata
from ttsnap.live.settings import ModelSettings
from ttsnap.pipelines.conditions import Pictures
from ttsnap.shapes.pipeline import WEIGHTS

PROMPT = "a red circle left of a blue square"
COUNT = ["--candidates", 2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with a policy that draws and forks, from a prompt that is not the first."""
    from tests import commands

    out = tmp_path_factory.mktemp("made")
    (out / "prompts.txt").write_text(f"a blue square\n{PROMPT}")
    options = ["--policy", "steering", "--candidates", 4, "--steps", 6, "--guidance", 4, "--seed", 3, "--no-board"]
    done = commands.ttsnap("generate", "--prompts", out / "prompts.txt", *options, "--out", out / "run")
    assert done.returncode == 0, done.stderr
    return out / "run" / "p0001" / "best.png"


def test_a_picture_makes_itself_again_byte_by_byte(made, ttsnap, tmp_path):
    code, _, err = ttsnap("generate", "--from", made, "--out", tmp_path / "again", "--no-board")
    assert code == 0, err
    assert (tmp_path / "again" / "best.png").read_bytes() == made.read_bytes()
    record, again = (json.loads((path.parent / "result.json").read_text()) for path in (made, tmp_path / "again" / "x"))
    assert record["lineage"] == again["lineage"]


def test_options_that_are_given_take_the_place_of_the_picture_s(made, ttsnap, tmp_path, monkeypatch):
    from ttsnap.cli import generate

    jobs = []
    monkeypatch.setattr(generate, "_one", lambda job, as_json: jobs.append(job))
    monkeypatch.setattr(generate, "_report", lambda *a, **k: None)
    given = ["--budget", "20NFE", "--seed", 0, "--rungs", 2, "--keep", ".5", "--no-metadata"]
    (tmp_path / "mine.toml").write_text("[generate]\nsteps = 9\nnegative_prompt = 'blurry'")
    toml = ["--settings", tmp_path / "mine.toml"]
    for options in ([], ["a blue square", *given]):
        code, _, err = ttsnap(*toml, "generate", *options, "--from", made, "--out", tmp_path / f"{len(options)}")
        assert code == 0, err
    same, other = jobs
    assert (same.prompts, same.place, same.metadata) == ([PROMPT], 1, True)
    assert (other.prompts, other.metadata) == (["a blue square"], False)
    changed = {
        name for name in {*same.settings, *other.settings} if same.settings.get(name) != other.settings.get(name)
    }
    assert changed == {"prompts", "budget", "candidates", "seed", "policy", "metadata"}
    assert other.settings["policy"] == {"policy": "halving", "rungs": [2], "keep": [0.5]}
    assert "negative_prompt" not in other.settings  # with a picture, the settings file is not read


def test_show_tells_what_a_picture_says(made, ttsnap):
    code, out, _ = ttsnap("show", made, "--json")
    record = json.loads((made.parent / "result.json").read_text())
    says = json.loads(out)
    assert code == 0
    assert says["parameters"] | {"Model hash": "?"} == {
        "prompt": PROMPT,
        "negative_prompt": "",
        "Steps": "6",
        "Sampler": "Euler",
        "CFG scale": "1",
        "Distilled CFG Scale": "4",
        "Seed": str(record["seed"]),
        "Size": "64x64",
        "Model hash": "?",
        "Model": "shapes",
        "RNG": "CPU",
        "Version": says["parameters"]["Version"],
    }
    own = says["ttsnap"]
    assert own["reward"] == record["reward"]
    assert own["cost"] == {name: value for name, value in record["cost"].items() if name != "seconds"}
    assert (own["started"], own["finished"], own["rank"]) == (4, record["candidates"]["finished"], 1)
    code, out, _ = ttsnap("show", made)
    assert PROMPT in " ".join(out.split())
    assert f"{record['cost']['nfe']} NFE" in out


def test_nothing_of_the_machine_is_inside(ttsnap, tmp_path, capsys):
    """A model in a folder, with a reward from a file beside it."""
    home = tmp_path / "home-of-somebody"
    shutil.copytree(WEIGHTS, home / "flux-mine")
    options = [
        "--call",
        "max_sequence_length=12",
        "--size",
        64,
        "--steps",
        4,
        "--reward",
        "shapes",
        *COUNT,
        "--no-board",
    ]
    code, _, err = ttsnap("generate", PROMPT, "--model", home / "flux-mine", *options, "--out", home / "out")
    assert code == 0, err
    picture = home / "out" / "best.png"
    data = picture.read_bytes()
    for secret in (str(tmp_path), "home-of-somebody", str(Path.home()), getpass.getuser() + "@", socket.gethostname()):
        assert secret.encode() not in data
    own = metadata.read(picture).own
    assert own["settings"]["model"] == "flux-mine"
    assert own["local"] == ["model"]
    code, _, err = ttsnap("generate", "--from", picture, "--out", home / "again")
    assert code == 2
    assert "say where they are with --model" in err
    assert from_picture.recipe(picture, ModelSettings(model=str(home / "flux-mine")), Pictures()) == own
    (home / "flux-mine" / "transformer" / "config.json").write_text("{}")
    from_picture.recipe(picture, ModelSettings(model=str(home / "flux-mine")), Pictures())
    assert "was made with other model files" in capsys.readouterr().err


def test_pictures_that_do_not_say_are_refused_in_one_sentence(ttsnap, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    for verb in (["show"], ["generate", "--from"]):
        code, _, err = ttsnap(*verb, tmp_path / "plain.png")
        assert code == 2
        assert "does not say how it was made" in err
        assert len(err.strip().splitlines()) == 1
