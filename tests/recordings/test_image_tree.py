"""The tree on disk: round trips, what is wrong with an image, manifests and their faults."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ttsnap.recordings.image_tree import FORMATS, MANIFEST, BadImageError, ImageTree, _png

PROMPTS = ("a red circle", "a blue square")


def tree_at(root, **changes):
    tree = ImageTree(
        root,
        PROMPTS,
        np.arange(6).reshape(2, 3),
        num_steps=4,
        calls=(1, 3, 4),
        sigmas=(1.0, 0.75, 0.5, 0.25),
        size=(8, 6),
        settings={"model": "toy", "seed": 0},
        versions={"ttsnap": "0"},
    )
    return replace(tree, **changes)


def picture(seed=0, width=8, height=6):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_manifest_round_trip(tmp_path):
    tree = tree_at(tmp_path / "tree")
    tree.save()
    tree.save()
    again = ImageTree.open(tree.root)
    np.testing.assert_array_equal(again.seeds, tree.seeds)
    assert replace(again, seeds=tree.seeds) == tree
    assert ImageTree.open(tree.root, [*PROMPTS, "more"]).prompts == PROMPTS


@pytest.mark.parametrize("kind", FORMATS)
def test_images_come_back_as_they_were_under_the_published_names(tmp_path, kind):
    tree = tree_at(tmp_path, format=kind)
    path = tree.path(1, 2, 3)
    assert path == tmp_path / "p0001" / "id002" / f"s02.{kind}"
    assert not tree.begun(1)
    tree.write(path, picture())
    assert tree.begun(1)
    assert tree.fault(1, 2, 3) is None
    np.testing.assert_array_equal(tree.read(1, 2, 3), picture())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_png_of_any_size(width, height, seed):
    image = picture(seed, width, height)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(_png(image)))), image)


def test_images_are_scaled_to_the_stored_size(tmp_path):
    tree = tree_at(tmp_path)
    image = picture(width=16, height=12)
    tree.write(tree.path(0, 0, 1), image)
    expected = Image.fromarray(image).resize((8, 6), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(tree.read(0, 0, 1), np.asarray(expected))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_cut_of_an_image_is_found(tmp_path, kind):
    tree = tree_at(tmp_path, format=kind)
    path = tree.path(0, 0, 1)
    tree.write(path, picture())
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert tree.fault(0, 0, 1), length
        with pytest.raises(BadImageError):
            tree.read(0, 0, 1)


def test_faults_have_names(tmp_path):
    tree = tree_at(tmp_path)
    path = tree.path(0, 0, 1)
    assert tree.fault(0, 0, 1) == "is missing"
    tree.write(path, picture())
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert tree.fault(0, 0, 1) == "is truncated"
    path.write_bytes(b"")
    assert tree.fault(0, 0, 1) == "is empty"
    path.write_bytes(b"certainly not an image")
    assert tree.fault(0, 0, 1) == "is not a png image"
    Image.new("RGB", (6, 8)).save(path)
    with pytest.raises(BadImageError, match=r"p0000/id000/s00\.png is 6 x 8 instead of 8 x 6"):
        tree.read(0, 0, 1)
    spoilt = bytearray(data)
    spoilt[len(data) // 2] ^= 255
    path.write_bytes(spoilt)
    assert tree.fault(0, 0, 1) is None  # its ends are in order
    with pytest.raises(BadImageError, match="is damaged"):
        tree.read(0, 0, 1)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    tree = tree_at(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        tree.write(tree.path(0, 0, 1), picture())
    assert list(tree.path(0, 0, 1).parent.iterdir()) == []


def test_only_the_same_tree_is_gone_on_with(tmp_path):
    tree = tree_at(tmp_path / "tree")
    tree.save()
    replace(tree, versions={"ttsnap": "1"}).save()
    for changes, named in (
        ({"calls": (1, 4)}, "calls"),
        ({"seeds": tree.seeds + 1}, "seeds"),
        ({"settings": {"model": "toy", "seed": 1}}, "seed"),
        ({"prompts": PROMPTS[::-1], "format": "webp"}, "prompts, image_format"),
    ):
        with pytest.raises(ValueError, match=rf"other settings \({named} differ\)"):
            replace(tree, **changes).save()
    (tree.root / MANIFEST).unlink()
    tree.write(tree.path(0, 0, 1), picture())
    with pytest.raises(ValueError, match=r"holds images but no manifest\.json"):
        tree.save()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; give a directory"):
        tree_at(tmp_path / "file").save()


def test_a_tree_without_a_manifest_is_read_by_its_files(tmp_path):
    tree = tree_at(tmp_path)
    for p, c, call in ((0, 0, 1), (0, 0, 4), (1, 2, 4)):
        tree.write(tree.path(p, c, call), picture())
    with pytest.raises(ValueError, match=r"has no manifest\.json; give the prompts"):
        ImageTree.open(tmp_path)
    found = ImageTree.open(tmp_path, [*PROMPTS, "third"])
    assert (found.num_candidates, found.num_steps, found.calls, found.size) == (3, 4, (1, 4), (8, 6))
    assert found.prompts == (*PROMPTS, "third")
    assert (found.seeds == -1).all()
    assert np.isnan(found.sigmas).all()
    with pytest.raises(ValueError, match="p0001 has no prompt; 1 prompts were given"):
        ImageTree.open(tmp_path, ["one"])


MANIFESTS = {
    "not JSON": ("{", "cannot be read"),
    "a list": ("[]", "is not the manifest of an image tree"),
    "of something else": ('{"format": "other"}', "is not the manifest of an image tree"),
    "a later version": ({"version": 2}, "has version 2; this ttsnap reads 1"),
    "no calls": ({"calls": None}, "is not valid"),
    "calls without the last": ({"calls": [1, 3]}, "do not fit 4 steps"),
    "too few sigmas": ({"sigmas": [1.0]}, "do not fit 4 steps"),
    "ragged seeds": ({"seeds": [[1], [1, 2]]}, "is not valid"),
    "too few seeds": ({"seeds": [[1, 2]]}, "list of candidates for each prompt"),
    "unknown format": ({"image_format": "gif"}, "image format 'gif'"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_broken_manifest_is_one_sentence(tmp_path, case):
    tree_at(tmp_path).save()
    content, message = MANIFESTS[case]
    path = tmp_path / MANIFEST
    path.write_text(content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content))
    with pytest.raises(ValueError, match=message) as caught:
        ImageTree.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_tree_is_said(tmp_path):
    with pytest.raises(ValueError, match="there is no image tree at"):
        ImageTree.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not an image tree"):
        ImageTree.open(tmp_path)
    (tmp_path / "p0000").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        ImageTree.open(tmp_path, PROMPTS)
