"""The command itself, on a small tree of the embedded model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from ttsnap.live.session import load_sampler
from ttsnap.recordings import Recording
from ttsnap.recordings.image_tree import ImageTree
from ttsnap.recordings.recorder import plan_tree, record_images, record_rewards, seeds_of
from ttsnap.rewards import load

PROMPTS = ["a red circle", "a blue square left of a green circle", "a cyan triangle"]
SEEDS = seeds_of(range(3), 4)


@pytest.fixture(scope="module")
def sampler():
    return load_sampler("shapes", num_inference_steps=6)


@pytest.fixture(scope="module")
def made(sampler, tmp_path_factory):
    """A folder with a tree."""
    folder = tmp_path_factory.mktemp("label")
    record_images(sampler, plan_tree(sampler, folder / "tree", PROMPTS, SEEDS), range(2))
    return folder


def test_labels_agree_with_the_direct_route_within_the_rounding(ttsnap, sampler, made, tmp_path):
    code, out, err = ttsnap("label", made / "tree", tmp_path / "out", "--reward", "shapes", "--json")
    report = json.loads(out)
    assert code == 0, err
    assert (report["prompts"], report["prompts_not_recorded"], report["bad_images"]) == (2, 1, [])
    found = Recording.open(tmp_path / "out")
    direct = record_rewards(sampler, load("shapes"), PROMPTS[:2], SEEDS[:2], tmp_path / "direct")
    difference = np.abs(found.clean[:2] - direct.clean)
    assert difference.mean() < 0.03
    assert difference.max() < 0.5  # where the reward is steep
    assert found.provenance["cost_model"] == direct.provenance["cost_model"]
    _, out, _ = ttsnap("label", made / "tree", tmp_path / "out", "--reward", "shapes")
    assert "nothing was judged again" in out


def test_bad_images_are_named_and_counted_and_strict_stops(ttsnap, made, tmp_path):
    tree = ImageTree.open(made / "tree")
    path = tree.path(1, 2, 5)
    good = path.read_bytes()
    path.write_bytes(good[:-7])
    try:
        code, out, err = ttsnap("label", tree.root, tmp_path / "out", "--reward", "shapes", "--json")
        assert code == 3  # all is done but for some prompts
        assert json.loads((tmp_path / "out.failures.json").read_text())["failures"] == json.loads(out)["failures"]
        assert json.loads(out)["bad_images"] == [{"path": str(path), "fault": "is truncated"}]
        assert json.loads(out)["prompts_left_out"] == [1]
        assert f"warning: image {path} is truncated" in err
        assert "1 bad images; 1 prompts are left out" in err
        code, _, err = ttsnap("label", tree.root, tmp_path / "strict", "--reward", "shapes", "--strict")
        assert code == 2
        assert f"error: image {path} is truncated" in err
        assert ttsnap("label", tree.root, tmp_path / "last", "--reward", "shapes", "--final-only")[0] == 0
    finally:
        path.write_bytes(good)


def test_published_labels(ttsnap, made, tmp_path):
    rows = {f"p{p:04d}": {f"id{c:03d}": float(p + c) for c in range(4)} for p in range(3)}
    (tmp_path / "imr_gt.yaml").write_text(yaml.safe_dump(rows))
    code, out, _ = ttsnap(
        "label", made / "tree", tmp_path / "out", "--ground-truth", tmp_path / "imr_gt.yaml", "--json"
    )
    assert code == 0
    assert json.loads(out)["rewards"] == ["imagereward"]
    assert Recording.open(tmp_path / "out").seeds.tolist() == SEEDS.tolist()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    code, out, _ = ttsnap(
        "label", tmp_path / "prompts.txt", tmp_path / "more", "--ground-truth", f"mine={tmp_path / 'imr_gt.yaml'}"
    )
    assert "mine of 3 prompts x 4 finished images" in out


BAD = {
    "nothing asked": ([], "give --reward"),
    "both": (["--reward", "shapes", "--ground-truth", "x=y"], "give --reward"),
    "unknown reward": (["--reward", "magic"], "unknown reward 'magic'"),
    "batch": (["--reward", "shapes", "--max-batch", "0"], "--max-batch must be at least 1"),
    "device": (["--reward", "shapes", "--device", "abacus"], "device 'abacus' is not there"),
    "no name": (["--ground-truth", "labels.yaml"], "which reward is labels.yaml of"),
    "no file": (["--ground-truth", "hps=nowhere.yaml"], "cannot read labels from nowhere.yaml"),
    "other prompts": (["--reward", "shapes", "--prompts", "other.txt"], "are not those of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, ttsnap, made, tmp_path, monkeypatch):
    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("a\nb\nc\n")
    code, _, err = ttsnap("label", made / "tree", tmp_path / "out", *arguments)
    assert code == 2
    lines = [line for line in err.strip().splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_what_is_no_tree_is_one_sentence(ttsnap, tmp_path):
    for source, message in ((tmp_path / "nowhere", "there is no image tree"), (tmp_path, "is not an image tree")):
        code, _, err = ttsnap("label", source, tmp_path / "out", "--reward", "shapes")
        assert code == 2
        assert message in err


def test_labels_are_gone_on_with_only_by_the_same_code_of_ones_own(ttsnap, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = tmp_path / "my_judge_of_labels.py"
    code.write_text("def bright(images, prompts):\n    return images.mean((1, 2, 3))\n")
    command = ["label", made / "tree", tmp_path / "out", "--reward", "my_judge_of_labels:bright"]
    assert ttsnap(*command)[0] == 0
    assert "nothing was judged again" in ttsnap(*command)[1]
    code.write_text("def bright(images, prompts):\n    return 1 - images.mean((1, 2, 3))\n")
    status, _, err = ttsnap(*command)
    assert status == 2
    assert "the content of reward my_judge_of_labels:bright" in err
