"""`--dry-run` of every verb that computes: what would run and cost; nothing is written."""

from __future__ import annotations

import json

import pytest
from PIL import Image

pytestmark = pytest.mark.slow
KEYS = {"what", "calls", "looks", "tflop", "seconds", "weights", "disk"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small tree of images, its recording, and pictures."""
    from tests import commands

    folder = tmp_path_factory.mktemp("dry")
    size = ("--steps", "3", "--size", "64")
    tree = ("record", "a red circle", "a blue square", "--per-prompt", "2", *size, "--out", str(folder / "tree"))
    label = ("label", str(folder / "tree"), str(folder / "tree.zarr"), "--reward", "shapes")
    for command in (tree, label):
        done = commands.ttsnap(*command)
        assert done.returncode == 0, done.stderr
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    return folder


def planned(ttsnap, folder, *arguments):
    """What a verb says of work that it does not do."""
    before = sorted(folder.rglob("*"))
    code, out, err = ttsnap(*arguments, "--dry-run", "--json")
    assert code == 0, err
    assert sorted(folder.rglob("*")) == before
    told = json.loads(out)
    assert set(told) == KEYS
    return told


def test_a_recording_costs_what_its_candidates_and_looks_cost(ttsnap, made):
    what = ("a red circle", "a blue square", "--per-prompt", "3", "--steps", "4", "--out", str(made / "other"))
    images = planned(ttsnap, made, "record", *what)
    assert (images["calls"], images["looks"]) == (2 * 3 * 4, 2 * 3 * 4)
    assert images["disk"] == 24 * 2 * 64 * 64
    judged = planned(ttsnap, made, "record", *what, "--reward", "shapes", "--calls", "2")
    assert (judged["calls"], judged["looks"]) == (24, 12)
    assert judged["tflop"] > 0
    assert judged["seconds"] > 0


def test_labels_scores_and_training_count_pictures(ttsnap, made):
    tree, labels = str(made / "tree"), str(made / "tree.zarr")
    told = planned(ttsnap, made, "label", tree, str(made / "new.zarr"), "--reward", "shapes")
    assert (told["calls"], told["looks"]) == (0, 2 * 2 * 3)
    assert told["weights"] > 10_000
    scored = planned(ttsnap, made, "score", str(made / "red.png"), "--reward", "shapes", "--prompt", "a red circle")
    assert scored["looks"] == 1
    assert scored["tflop"] == pytest.approx(told["tflop"] / 12)
    train = ("train", tree, labels, "--reward", "shapes", "--out", str(made / "run"), "--levels", "2,1", "--batch", "2")
    trained = planned(ttsnap, made, *train, "--held-out", "1")
    assert "2 noise levels, 2 updates of 2 images" in trained["what"]
    assert trained["looks"] >= 3 * 2 * 2


def test_replays_say_how_many_searches(ttsnap, made):
    labels = str(made / "tree.zarr")
    asked = ("simulate", labels, "--rungs", "1", "--keep", ".5", "--budgets", "3NFE,6NFE", "--trials", "7")
    told = planned(ttsnap, made, *asked)
    assert "28 searches" in told["what"]
    assert told["seconds"] > 0
    tuned = planned(ttsnap, made, "tune", labels, "--trials", "9", "--seconds", "5")
    assert ("9 schedules" in tuned["what"], tuned["seconds"]) == (True, 5)


def test_searches_of_other_verbs(ttsnap, made):
    bench = planned(ttsnap, made, "bench", "a red circle", "--candidates", "4", "--steps", "5", "--calls", "2")
    assert bench["calls"] == 4 * 5
    compared = ("--policies", "halving,best-of-n", "--budget", "20NFE", "--pool", "4", "--steps", "5")
    policies = planned(ttsnap, made, "bench", "a red circle", *compared)
    assert 4 * 5 < policies["calls"] <= 4 * 5 + 2 * 20
    live = ("tune", "--policy", "svdd", "--budget", "40NFE", "--trials", "3", "--steps", "5")
    tuned = planned(ttsnap, made, *live, "--prompts", "shapes:held-out", "--prompt-range", ":4")
    assert 0 < tuned["calls"] <= 40 * (3 * 2 + 3 * 2)
    served = planned(ttsnap, made, "serve", "--steps", "5", "--candidates", "4")
    assert "a server; of each picture shapes" in served["what"]
    assert served["calls"] <= 4 * 5
    page = planned(ttsnap, made, "app", "--out", str(made / "page"))
    assert "a page; of a search as its form begins shapes: halving, 16 candidates" in page["what"]
    assert page["calls"] < 16 * 20


def test_published_values_that_would_be_read_are_counted(ttsnap, tmp_path):
    (folder := tmp_path / "flux_hps_val_base").mkdir()
    for step in range(3):
        (folder / f"p2_i4_s0{step}.yaml").write_text("")
    told = planned(ttsnap, tmp_path, "import-values", str(tmp_path), str(tmp_path / "new.zarr"))
    assert told["what"] == "3 files of flux become a recording: 2 prompts x 4 candidates x 3 steps (hps)"
    assert told["disk"] == 8 * 3 * 2 * 4
    _, out, _ = ttsnap("import-values", str(tmp_path), str(tmp_path / "new.zarr"), "--dry-run")
    assert out.splitlines()[1:] == ["seconds not known", "weights 0 bytes; about 192 bytes on the disk"]
