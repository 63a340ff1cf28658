"""Storage: local files and a real object store, atomic writes, and patience."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest

from tests.object_store import serve
from ttsnap.core.errors import explain
from ttsnap.files.storage import Remote, atomically, check_writable, location, new_folder, patiently, write, write_json
from ttsnap.recordings import Recording
from ttsnap.recordings.image_tree import BadImageError, ImageTree


@pytest.fixture(scope="module")
def store():
    with serve() as server:
        yield server


def test_places():
    assert str(location("a/b")) == "a/b"
    assert str(location("file:///a/b")) == "/a/b"
    with pytest.raises(ValueError, match="names no folder; give one such as s3://bucket/folder"):
        location("s3://")
    with pytest.raises(ValueError, match=r"known are s3://"):
        location("nonsense://bucket/x")


def test_files_and_folders_of_an_object_store(store):
    root = location(store.bucket() + "/a run/")
    assert isinstance(root, Remote)
    assert not root.exists()
    check_writable(root)
    path = root / "p0000" / "x.json"
    write(path, b"{}")
    assert (path.name, path.suffix, path.parent.name) == ("x.json", ".json", "p0000")
    assert path.is_file()
    assert path.parent.is_dir()
    assert not path.is_dir()
    assert [one.name for one in root.iterdir()] == ["p0000"]
    assert [one.name for one in path.parent.glob("*.json")] == ["x.json"]
    assert (path.read_text(), path.open().read()) == ("{}", b"{}")
    with pytest.raises(ValueError, match="is a file; give a directory"):
        check_writable(path)
    path.unlink()
    path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        path.read_bytes()


def test_a_store_that_answers_503_for_a_while_is_asked_again(store, monkeypatch):
    path = location(store.bucket()) / "x"
    store.fail_for(3.0)
    path.write_bytes(b"data")
    assert path.read_bytes() == b"data"
    assert store.refused > 1
    monkeypatch.setenv("TTSNAP_PATIENCE", "0.5")
    store.fail_for(8.0)
    with pytest.raises(OSError, match=r"/x failed for [0-9]+ s: "):
        path.read_bytes()
    store.fail_for(0)


def test_patience_doubles_its_pauses_and_ends():
    pauses = []

    def fails():
        raise OSError("busy")

    def missing():
        raise FileNotFoundError("it")

    with pytest.raises(OSError, match=r"the store failed for [0-9]+ s: busy"):
        patiently(fails, "the store", 60.0, pauses.append, lambda: sum(pauses))
    assert sum(pauses) >= 60
    assert max(pauses) <= 15
    assert pauses[2] > pauses[0]
    with pytest.raises(FileNotFoundError):
        patiently(missing, "it", 60.0, pauses.append)


def test_an_image_tree_in_an_object_store(store):
    tree = ImageTree(
        location(store.bucket() + "/tree"), ("a", "b"), np.arange(4).reshape(2, 2), 2, (1, 2), (1.0, 0.5), (8, 6)
    )
    tree.save()
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    assert not tree.begun(0)
    tree.write(tree.path(0, 1, 2), image)
    again = ImageTree.open(str(tree.root))
    assert again.begun(0)
    assert again.fault(0, 1, 2) is None
    np.testing.assert_array_equal(again.read(0, 1, 2), image)
    with pytest.raises(BadImageError, match="is missing"):
        again.read(0, 0, 1)
    tree.path(0, 0, 1).write_bytes(b"certainly not an image")
    assert again.fault(0, 0, 1) == "is not a png image"
    with pytest.raises(ValueError, match="there is no image tree at s3://"):
        ImageTree.open(store.bucket() + "/nothing")


def test_a_recording_in_an_object_store_is_there_as_a_whole(store):
    place = store.bucket() + "/r.zarr"
    options = {"prompts": ["a", "b"], "num_candidates": 2, "num_steps": 2, "rewards": ["r"]}
    recording = Recording.create(place, **options)
    assert [path.rsplit("/", 1)[-1] for path in store.puts if "/r.zarr/" in path][-1] == "zarr.json"
    assert recording.done.tolist() == [False, False]
    store.fail_for(2.0)
    recording.write_prompt(1, np.ones((2, 2, 1)), seeds=np.array([3, 4]))
    again = Recording.create(place, **options, resume=True)
    assert again.done.tolist() == [False, True]
    assert Recording.open(place).seeds[1].tolist() == [3, 4]
    with pytest.raises(ValueError, match="exists already"):
        Recording.create(place, **options)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    write_json({"seed": 1}, path)
    with path.open() as reader:  # who has begun to read the old one reads all of it
        write_json({"seed": 2}, path)
        assert json.load(reader) == {"seed": 1}
    assert json.loads(path.read_text()) == {"seed": 2}

    def fails(temporary):
        temporary.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        atomically(path, fails)
    assert json.loads(path.read_text()) == {"seed": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    path, folder = tmp_path / "result.json", tmp_path / "rec.zarr"
    left, other = tmp_path / ".result.json.abc.tmp", tmp_path / ".result.jsonx.abc.tmp"
    left.write_text("half")
    other.write_text("of another file")
    (tmp_path / ".rec.zarr.abc.tmp").mkdir()
    (tmp_path / ".rec.zarr.abc.tmp" / "part").write_text("half")

    def meanwhile(temporary):
        write_json({"seed": 2}, path)  # another process: what is held stays
        temporary.write_text("{}")

    atomically(path, meanwhile)
    with new_folder(folder, "last") as made:
        made.mkdir()
        (made / "last").write_text("whole")
    assert sorted(found.name for found in tmp_path.iterdir()) == [other.name, "rec.zarr", "result.json"]
    assert json.loads(path.read_text()) == {}
    assert (folder / "last").read_text() == "whole"

    def stopped():
        with new_folder(tmp_path / "new", "last") as made:
            made.mkdir()
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stopped()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_is_told_with_the_path_and_what_is_kept(tmp_path):
    def full(temporary):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        atomically(tmp_path / "best.png", full)
    said = explain(caught.value)
    assert str(tmp_path / "best.png") in said
    assert "what is stored is whole" in said
