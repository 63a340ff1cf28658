"""`ttsnap score`: table, CSV, JSON, the best, the sheet, and what is said where it cannot be done."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

PROMPT = "a red circle"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tones.py").write_text(
        "import numpy as np\n"
        "def bright(images: np.ndarray, prompts):\n    return images.mean((1, 2, 3))\n"
        "def dark(images, prompts):\n    return -images[:, :1].mean((1, 2, 3))\n"
    )
    (tmp_path / "pics" / "more").mkdir(parents=True)
    for level, name in ((40, "a.png"), (200, "more/b.jpg"), (120, "c.webp")):
        Image.fromarray(np.full((20, 30, 3), level, dtype=np.uint8)).save(tmp_path / "pics" / name)
    return tmp_path


def test_a_folder_is_ranked_copied_and_kept(here, ttsnap):
    command = ["score", "pics", "--reward", "tones:bright", "--prompt", PROMPT, "--best", "2", "--copy-to", "best"]
    code, out, err = ttsnap(*command)
    assert code == 0, err
    assert out.index("more/b.jpg") < out.index("c.webp")
    assert "a.png" not in out
    assert "… and 1 more" in out
    assert "3 images in" in err
    best = sorted((here / "best").iterdir())
    assert [path.name for path in best] == ["001-b.jpg", "002-c.webp"]
    assert best[0].read_bytes() == (here / "pics/more/b.jpg").read_bytes()
    folder = here / "out" / "score-pics"
    rows = list(csv.DictReader((folder / "scores.csv").open()))
    assert [(row["rank"], row["file"].rsplit("/", 1)[-1], row["prompt"]) for row in rows] == [
        ("1", "b.jpg", PROMPT), ("2", "c.webp", PROMPT), ("3", "a.png", PROMPT)
    ]  # fmt: skip
    sheet = np.asarray(Image.open(folder / "contact.png"))
    assert [int(sheet[140, x, 0]) for x in (100, 250, 400)] == pytest.approx([200, 120, 40], abs=3)
    code, out, err = ttsnap(*command, "--json")
    record = json.loads(out)
    assert (code, record["found"], err) == (0, 3, "")
    assert [row["rank"] for row in record["pictures"]] == [1, 2, 3]
    assert len(record["files"]["best"]) == 2
    code, out, _ = ttsnap("score", "out/score-pics/scores.csv", "--reward", "tones:dark", "--json", "--no-sheet")
    again = json.loads(out)
    assert (code, again["pictures"][0]["prompt"]) == (0, PROMPT)
    assert again["pictures"][0]["file"].endswith("a.png")
    assert "contact sheet" not in again["files"]


def test_several_rewards_rank_by_the_sum_of_their_ranks_or_by_another_rule(here, ttsnap):
    Image.new("RGB", (20, 30), (0, 255, 255)).save(here / "pics" / "cyan.png")  # bright, and without red
    names = "tones:bright,tones:dark"
    code, out, _ = ttsnap("score", "pics/*.*", "pics/more", "--reward", names, "--prompt", PROMPT, "--json")
    pictures = json.loads(out)["pictures"]
    assert (code, len(pictures)) == (0, 4)
    assert pictures[0]["file"] == "pics/cyan.png"
    assert pictures[0]["rewards"].keys() == {"tones:bright", "tones:dark"}
    for options, best in (
        (["--weights", "0,1"], "pics/cyan.png"),
        (["--combine", "tones:bright where tones:dark<=-.2"], "pics/more/b.jpg"),
        (["--combine", "tones:dark where tones:bright<=100"], "pics/a.png"),
    ):
        code, out, err = ttsnap(
            "score", "pics", "--reward", names, "--prompt", PROMPT, "--json", "--no-sheet", *options
        )
        assert code == 0, err
        assert json.loads(out)["pictures"][0]["file"] == best
    code, _, err = ttsnap("score", "pics", "--reward", names, "--combine", "best")
    assert (code, "unknown combine 'best'" in err) == (2, True)


def test_what_cannot_be_scored_is_named_and_told_by_the_exit_code(here, ttsnap):
    (here / "pics" / "cut.png").write_bytes((here / "pics" / "a.png").read_bytes()[:60])
    (here / "pics" / "notes.txt").write_text("x")
    code, out, err = ttsnap("score", "pics", "--reward", "tones:bright", "--prompt", PROMPT)
    assert code == 3
    assert "warning: pics/cut.png is truncated" in err
    assert "left out, as they are no pictures: 1 (pics/notes.txt)" in err
    assert "a.png" in out
    code, _, err = ttsnap("score", "pics/cut.png", "--reward", "tones:bright", "--prompt", PROMPT)
    assert code == 2
    assert "error: no picture could be scored: pics/cut.png is truncated" in err


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ((), "give pictures, such as"),
        (("pics",), "name a reward"),
        (("pics", "--reward", "shapes", "--copy-to", "x"), "--copy-to needs --best"),
        (("pics", "--reward", "shapes", "--prompt", "a", "--prompts", "b.txt"), "give --prompt or --prompts, not both"),
        (("pics", "--reward", "shapes", "--best", "0"), "--best must be at least 1"),
        (("nowhere/*.png", "--reward", "shapes"), "there is no picture nowhere/*.png"),
        (("pics/tones.csv", "--reward", "shapes"), "there is no picture"),
        (("pics", "--reward", "tones:missing"), "no callable 'missing'"),
    ],
)
def test_what_is_asked_wrong_is_one_sentence(here, ttsnap, typed, message):
    code, _, err = ttsnap("score", *typed)
    assert (code, message in err) == (2, True), err
    assert err.count("\n") == 1
