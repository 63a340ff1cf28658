"""Recordings: written prompt by prompt, readable whatever interrupts the writer, checked when opened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ttsnap.recordings import Recording

SIZES = {"num_candidates": 6, "num_steps": 5, "rewards": ["one", "two"]}


def _rewards(prompt: int) -> np.ndarray:
    return np.random.default_rng(prompt).normal(size=(6, 5, 2)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recording of 4 prompts, of which 0 and 2 are written."""
    recording = Recording.create(tmp_path / "rec", prompts=list("abcd"), sigmas=[1, 0.8, 0.6, 0.4, 0.2], **SIZES)
    for prompt in (0, 2):
        aware = _rewards(prompt + 100)
        aware[:, 3:] = np.nan
        recording.write_prompt(prompt, _rewards(prompt), aware, np.arange(6) + 10 * prompt)
    return tmp_path / "rec"


def test_what_was_written_is_read(path: Path) -> None:
    recording = Recording.open(path)
    assert recording.done.tolist() == [True, False, True, False]
    assert recording.recorded().tolist() == [0, 2]
    np.testing.assert_array_equal(recording.clean[2], _rewards(2))
    assert recording.seeds[2].tolist() == [20, 21, 22, 23, 24, 25]
    assert recording.sigmas.tolist() == [1, 0.8, 0.6, 0.4, 0.2]
    assert recording.has_aware
    guide = recording.guide()
    np.testing.assert_array_equal(guide[1, :, :3], _rewards(102)[:, :3])
    np.testing.assert_array_equal(guide[1, :, 3:], _rewards(2)[:, 3:])


def test_it_is_an_xarray_dataset_with_the_dims_of_the_design(path: Path) -> None:
    xr = pytest.importorskip("xarray")
    dataset = Recording.open(path).dataset
    assert dict(dataset.sizes) == {"prompt": 2, "candidate": 6, "step": 5, "reward": 2}
    assert dataset.prompt.values.tolist() == ["a", "c"]
    assert dataset.step.values.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(dataset.clean.sel(prompt="c", reward="two"), _rewards(2)[..., 1])
    by_others = xr.open_zarr(path, consolidated=False)  # readable without ttsnap
    assert by_others.clean.dims == ("prompt", "candidate", "step", "reward")


def test_a_writer_resumes(path: Path) -> None:
    recording = Recording.create(path, prompts=list("abcd"), resume=True, **SIZES)
    for prompt in np.flatnonzero(~recording.done):
        recording.write_prompt(int(prompt), _rewards(int(prompt)))
    assert recording.done.all()
    assert Recording.open(path).done.all()
    with pytest.raises(ValueError, match="holds another recording"):
        Recording.create(path, prompts=list("abce"), resume=True, **SIZES)
    with pytest.raises(ValueError, match="exists already"):
        Recording.create(path, prompts=list("abcd"), **SIZES)


def test_the_guide_of_a_finished_image_is_its_clean_reward(path: Path) -> None:
    recording = Recording.create(path, prompts=list("abcd"), resume=True, **SIZES)
    recording.write_prompt(1, _rewards(1), _rewards(50))
    np.testing.assert_array_equal(recording.guide()[1, :, -1], _rewards(1)[:, -1])


def test_wrong_rewards_are_not_written(path: Path) -> None:
    recording = Recording.create(path, prompts=list("abcd"), resume=True, **SIZES)
    with pytest.raises(ValueError, match=r"must have shape \(1, 6, 5, 2\)"):
        recording.write_prompt(1, _rewards(1)[:5])
    wrong = _rewards(1)
    wrong[3, -1, 0] = np.nan
    with pytest.raises(ValueError, match="finished image of candidate 3 of prompt 'b'"):
        recording.write_prompt(1, wrong)
    assert not Recording.open(path).done[1]


def _edit(path: Path, **changes: object) -> None:
    file = path / "zarr.json"
    data = json.loads(file.read_text())
    data["attributes"].update(changes)
    file.write_text(json.dumps(data))


def _edit_array(path: Path, name: str, **changes: object) -> None:
    file = path / name / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _nan_in_final_column(path: Path) -> None:
    import zarr

    zarr.open_group(path, mode="r+")["clean"][2, 4, -1, 1] = np.nan


def _garble(path: Path) -> None:
    chunk = next(p for p in (path / "clean" / "c").rglob("*") if p.is_file())
    chunk.write_bytes(b"garbage" + chunk.read_bytes()[7:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: shutil.rmtree(p), "there is no recording at"),
        (lambda p: (p / "zarr.json").unlink(), "not a ttsnap recording"),
        (lambda p: (p / "zarr.json").write_text("{"), "cannot be opened"),
        (lambda p: _edit(p, format="other"), "not a ttsnap recording"),
        (lambda p: _edit(p, version=99), "has version 99; this ttsnap reads 1"),
        (lambda p: _edit(p, prompts="none"), "no list of prompts"),
        (lambda p: _edit(p, prompts=["a"]), "names 1 prompts but holds 4"),
        (lambda p: _edit(p, rewards=["one"]), "names 1 rewards but holds 2"),
        (lambda p: shutil.rmtree(p / "aware"), "lacks its array `aware`"),
        (lambda p: _edit_array(p, "seed", shape=[4, 5]), r"`seed` .* must have shape \(4, 6\)"),
        (lambda p: _edit_array(p, "clean", dimension_names=["a", "b", "c", "d"]), "must have dims"),
        (_nan_in_final_column, "has two nan for the finished image of candidate 4 of prompt 'c'"),
        (_garble, "`clean` of recording .* is damaged"),
    ],
)
def test_a_damaged_recording_is_refused_in_one_sentence(path: Path, damage: object, message: str) -> None:
    damage(path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message) as caught:
        Recording.open(path)
    assert "\n" not in str(caught.value)


def test_an_empty_recording_says_so(tmp_path: Path) -> None:
    Recording.create(tmp_path / "rec", prompts=["a"], **SIZES)
    with pytest.raises(ValueError, match="holds no prompt yet"):
        Recording.open(tmp_path / "rec").recorded()


WRITER = """
import sys, numpy as np
from ttsnap.recordings import Recording
r = Recording.create(sys.argv[1], prompts=[str(i) for i in range(2000)], num_candidates=6, num_steps=5,
                     rewards=["one"], resume=True)
print("ready", flush=True)
for p in np.flatnonzero(~r.done):
    r.write_prompt(int(p), np.full((6, 5, 1), p, "f4"), np.full((6, 5, 1), p, "f4"), np.full(6, p))
"""


def test_a_killed_writer_leaves_a_readable_recording(tmp_path: Path) -> None:
    written = 0
    for enough in (5, 61):  # a written prompt is 4 entries: 3 folders and a file
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "rec")], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        while sum(1 for _ in (tmp_path / "rec" / "clean" / "c").rglob("[0-9]*")) < enough:
            time.sleep(0.003)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        recording = Recording.open(tmp_path / "rec")
        done = np.flatnonzero(recording.done)
        assert (recording.clean[done] == done[:, None, None, None]).all()
        assert (recording.aware[done] == done[:, None, None, None]).all()
        assert (recording.seeds[done] == done[:, None]).all()
        assert len(done) >= written
        written = len(done)
    assert 10 < written < 2000
