"""From images and from published labels to recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.pipelines.toy import ToyReward, toy_sampler

from ttsnap.recordings import Recording
from ttsnap.recordings.image_tree import BadImageError
from ttsnap.recordings.labelling import ground_truth_name, import_ground_truth, label_tree, read_ground_truth
from ttsnap.recordings.recorder import plan_tree, record_images, record_rewards, seeds_of

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]
SEEDS = seeds_of(range(5), 3)
PUBLISHED = Path(__file__).parents[3] / "shared" / "prompts"


@pytest.fixture
def tree(tmp_path):
    tree = plan_tree(toy_sampler(), tmp_path / "tree", PROMPTS, SEEDS)
    record_images(toy_sampler(), tree)
    return tree


def bright(**options):
    return {"bright": ToyReward(**options)}


@pytest.mark.parametrize("batch", [2, 8, 32])
def test_labels_are_the_rewards_of_the_direct_route_but_for_the_8_bits(tmp_path, tree, batch):
    direct = record_rewards(toy_sampler(), bright(), PROMPTS, SEEDS, tmp_path / "direct")
    labels = label_tree(tree, bright(), tmp_path / "labelled", batch=batch)
    np.testing.assert_allclose(labels.recording.clean, direct.clean, atol=0.5 / 255)
    np.testing.assert_array_equal(labels.recording.seeds, SEEDS)
    np.testing.assert_array_equal(labels.recording.sigmas, direct.sigmas)
    assert not labels.bad
    assert labels.recording.provenance["cost_model"] == direct.provenance["cost_model"]


def test_rewards_are_told_the_noise_level_and_asked_in_batches(tmp_path, tree):
    reward = ToyReward()
    label_tree(tree, {"bright": reward}, tmp_path / "out", batch=6)
    levels = [*toy_sampler().sigmas[:3], 0.0]
    assert reward.asked[3:] == [(n, sigma) for n in (6, 6, 3) for sigma in levels]  # three were counted


def test_finished_images_only(tmp_path, tree):
    reward = ToyReward()
    recording = label_tree(tree, {"bright": reward}, tmp_path / "out", final_only=True).recording
    assert reward.asked[3:] == [(15, 0.0)]
    assert np.isfinite(recording.clean[..., 0]).all(axis=(0, 1)).tolist() == [False, False, False, True]


def test_prompts_with_bad_images_are_left_out_and_taken_up_later(tmp_path, tree):
    good = tree.path(1, 0, 2).read_bytes()
    tree.path(1, 0, 2).write_bytes(good[:40])
    tree.path(3, 2, 4).unlink()
    labels = label_tree(tree, bright(), tmp_path / "out")
    assert [(str(bad.path.relative_to(tree.root)), bad.fault) for bad in labels.bad] == [
        ("p0001/id000/s01.png", "is truncated"),
        ("p0003/id002/s03.png", "is missing"),
    ]
    assert labels.left_out == [1, 3]
    assert Recording.open(tmp_path / "out").done.tolist() == [True, False, True, False, True]
    with pytest.raises(BadImageError, match=r"p0001/id000/s01\.png is truncated"):
        label_tree(tree, bright(), tmp_path / "strict", strict=True)
    record_images(toy_sampler(), tree)
    assert not label_tree(tree, bright(), tmp_path / "out").bad
    whole = label_tree(tree, bright(), tmp_path / "whole").recording
    np.testing.assert_array_equal(Recording.open(tmp_path / "out").clean, whole.clean)


def test_a_tree_that_grows_is_labelled_as_it_grows(tmp_path):
    tree = plan_tree(toy_sampler(), tmp_path / "tree", PROMPTS, SEEDS)
    record_images(toy_sampler(), tree, range(2))
    assert label_tree(tree, bright(), tmp_path / "out").not_begun == 3
    record_images(toy_sampler(), tree)
    left = []
    assert label_tree(tree, bright(), tmp_path / "out", batch=3, on_start=left.append).not_begun == 0
    assert left == [3 * 3 * 4]


def test_interrupted_it_goes_on_prompt_by_prompt(tmp_path, tree):
    class Interrupted(ToyReward):
        def __call__(self, images, prompts, *, sigma):
            if len(self.asked) == 8:  # two looks were counted, six are taken
                raise KeyboardInterrupt
            return super().__call__(images, prompts, sigma=sigma)

    with pytest.raises(KeyboardInterrupt):
        label_tree(tree, {"bright": Interrupted()}, tmp_path / "out", batch=3)
    assert Recording.open(tmp_path / "out").done.sum() == 1
    again = label_tree(tree, bright(), tmp_path / "out", batch=3).recording
    np.testing.assert_array_equal(again.clean, label_tree(tree, bright(), tmp_path / "whole", batch=3).recording.clean)


def test_another_tree_is_refused(tmp_path, tree):
    label_tree(tree, bright(), tmp_path / "out")
    other = plan_tree(toy_sampler(), tmp_path / "other", PROMPTS, SEEDS + 1, store_size=2)
    with pytest.raises(ValueError, match=r"other settings \(image size differ\)"):
        label_tree(other, bright(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"other settings \(calls differ\)"):
        label_tree(tree, bright(), tmp_path / "out", final_only=True)


def truth(tmp_path, name="hps.yaml", prompts=(0, 1, 3), images=3, shift=0.0):
    rows = {f"p{p:04d}": {f"id{c:03d}": p + c / 8 + shift for c in range(images)} for p in prompts}
    path = tmp_path / name
    path.write_text(yaml.safe_dump(rows))
    return path


def test_published_labels_become_the_finished_images_rewards(tmp_path):
    files = {"hpsv2": truth(tmp_path), "imagereward": truth(tmp_path, "imr.yaml", shift=1.0)}
    recording = import_ground_truth(files, PROMPTS, tmp_path / "out", seeds=SEEDS)
    assert Recording.open(tmp_path / "out").done.tolist() == [True, True, False, True, False]
    assert recording.clean[3, 1, -1].tolist() == [3.125, 4.125]
    assert np.isnan(recording.clean[:, :, :-1]).all()
    assert recording.shape == (5, 3, 20, 2)
    np.testing.assert_array_equal(recording.seeds[[0, 1, 3]], SEEDS[[0, 1, 3]])
    assert recording.scales["hpsv2"] == (0.0, 0.01)


def test_files_and_prompts_must_fit(tmp_path):
    one, other = truth(tmp_path), truth(tmp_path, "imr.yaml", images=2)
    with pytest.raises(ValueError, match="differ in their prompts or images"):
        import_ground_truth({"a": one, "b": other}, PROMPTS, tmp_path / "out")
    with pytest.raises(ValueError, match="labels prompt 3, but there are only 2 prompts"):
        import_ground_truth({"a": one}, PROMPTS[:2], tmp_path / "out")
    with pytest.raises(ValueError, match="labels 2 images of a prompt, the tree has 3"):
        import_ground_truth({"a": other}, PROMPTS, tmp_path / "out", seeds=SEEDS)
    assert not (tmp_path / "out").exists()


BAD = {
    "empty": ("", "line 1: expected labels such as"),
    "a list": ("- 1\n", "line 1: expected labels such as"),
    "not YAML": ("p0000: {id000: 1\n", "not valid YAML"),
    "other keys": ("p0000:\n  id000: 1\n0:\n  id000: 1\n", "line 3: expected a key such as p000, got '0'"),
    "prompt twice": ("p0000:\n  id000: 1\np0000:\n  id000: 1\n", "line 3: p0000 appears twice"),
    "image lacks": ("p0000:\n  id000: 1\n  id002: 1\n", "line 1: prompt p0000 lacks id001"),
    "fewer images": (
        "p0000: {id000: 1, id001: 1}\np0001: {id000: 1}\n",
        "line 2: prompt p0001 has 1 images, the first has 2",
    ),
    "text": ("p0000:\n  id000: much\n", "line 2: expected a finite number, got 'much'"),
    "not finite": ("p0000:\n  id000: .nan\n", "line 2: expected a finite number, got '.nan'"),
    "a nested list": ("p0000:\n  id000: [1, 2]\n", "line 2: expected a finite number"),
    "an object": ("p0000:\n  id000: !!python/object/apply:os.system [echo]\n", "line 2: expected a finite number"),
    "a tagged number": ("p0000:\n  id000: !!python/float 1\n", "line 2: expected a finite number"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_labels_name_file_and_line(tmp_path, case):
    text, message = BAD[case]
    (tmp_path / "gt.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"gt\.yaml") as caught:
        read_ground_truth(tmp_path / "gt.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_published_files():
    assert ground_truth_name("x/hps_gt_flux_train_5k.yaml") == "hpsv2"
    assert ground_truth_name("imr_gt_flux_5k.yaml") == "imagereward"
    assert ground_truth_name("pick_gt_flux_train_5k.yaml") == "pickscore"
    with pytest.raises(ValueError, match="which reward is"):
        ground_truth_name("labels.yaml")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"the published labels are not at {PUBLISHED}")
def test_the_published_labels(tmp_path):
    path = PUBLISHED / "hps_gt_flux_train_5k.yaml"
    prompts = [f"prompt {p}" for p in range(5000)]
    recording = import_ground_truth({"hpsv2": path}, prompts, tmp_path / "out")
    assert recording.shape == (5000, 8, 20, 1)
    assert recording.done.all()
    assert recording.clean[0, 0, -1, 0] == pytest.approx(0.26587027311325073, abs=1e-7)
