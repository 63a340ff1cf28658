"""Recording, on a toy sampler: what is made, what is made again, and what is not."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.pipelines.toy import ToyReward, toy_sampler

from ttsnap.core.grid import Query
from ttsnap.live.engine import Engine
from ttsnap.pipelines.outputs import to_uint8
from ttsnap.recordings import Recording
from ttsnap.recordings.recorder import (
    ImageWriter,
    chosen_calls,
    groups,
    plan_tree,
    record_images,
    record_rewards,
    seeds_of,
)

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]
SEEDS = seeds_of(range(5), 3)


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def tree_at(root, sampler=None, **options):
    return plan_tree(sampler or toy_sampler(), root, PROMPTS, SEEDS, **options)


def test_no_two_candidates_share_a_seed():
    seeds = seeds_of(range(100), 8, seed=1000)
    assert len(np.unique(seeds)) == 800
    assert seeds.min() == 1000
    np.testing.assert_array_equal(seeds_of(range(40, 43), 8, seed=1000), seeds[40:43])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        seeds_of([0], 0)


def test_groups_cover_every_candidate_once():
    for prompts, per_prompt, batch in ((5, 3, 8), (5, 3, 2), (1, 64, 32), (7, 1, 3)):
        rows = [row for block, _ in groups(prompts, per_prompt, batch) for row in block]
        assert rows == list(range(prompts))
        for block, parts in groups(prompts, per_prompt, batch):
            assert sum(part.stop - part.start for part in parts) == len(block) * per_prompt
            assert max(part.stop - part.start for part in parts) <= batch


def test_calls_always_hold_the_last():
    assert chosen_calls(None, 4) == (1, 2, 3, 4)
    assert chosen_calls([3, 1, 3], 4) == (1, 3, 4)
    with pytest.raises(ValueError, match=r"calls must be in 1\.\.4, got 5"):
        chosen_calls([1, 5], 4)


def test_rewards_are_those_of_a_live_search(tmp_path):
    recording = record_rewards(toy_sampler(), {"bright": ToyReward()}, PROMPTS, SEEDS, tmp_path / "r")
    live = Engine(toy_sampler(), {"bright": ToyReward()}).grid(PROMPTS, SEEDS)
    for step in range(1, 5):
        expected = live.observe(Query(np.ones(SEEDS.shape, dtype=bool), step))
        np.testing.assert_allclose(recording.clean[:, :, step - 1], expected, atol=1e-6)
    np.testing.assert_array_equal(recording.seeds, SEEDS)
    np.testing.assert_array_equal(recording.sigmas, toy_sampler().sigmas)
    assert recording.provenance["versions"]["ttsnap"]


def test_rewards_are_told_the_noise_level_and_zero_at_the_end(tmp_path):
    reward, sampler = ToyReward(), toy_sampler()
    record_rewards(sampler, {"bright": reward}, PROMPTS[:1], SEEDS[:1], tmp_path / "r", calls=[2])
    assert reward.asked[-2:] == [(3, sampler.sigmas[1]), (3, 0.0)]  # before that one image was counted
    found = Recording.open(tmp_path / "r").clean[0, 0, :, 0]
    assert np.isfinite(found).tolist() == [False, True, False, True]


def test_interrupted_rewards_go_on_and_end_the_same(tmp_path):
    class Interrupted(ToyReward):
        def __call__(self, images, prompts, *, sigma):
            if len(self.asked) == 8:  # two looks were counted, six are taken
                raise KeyboardInterrupt
            return super().__call__(images, prompts, sigma=sigma)

    with pytest.raises(KeyboardInterrupt):
        record_rewards(toy_sampler(), {"bright": Interrupted()}, PROMPTS, SEEDS, tmp_path / "r")
    assert Recording.open(tmp_path / "r").done.tolist() == [True, True, False, False, False]
    left = []
    record_rewards(toy_sampler(), {"bright": ToyReward()}, PROMPTS, SEEDS, tmp_path / "r", on_start=left.append)
    assert left == [3 * 3 * 4]
    whole = record_rewards(toy_sampler(), {"bright": ToyReward()}, PROMPTS, SEEDS, tmp_path / "whole")
    np.testing.assert_array_equal(Recording.open(tmp_path / "r").clean, whole.clean)


def test_another_recording_is_refused(tmp_path):
    options = {"settings": {"model": "toy"}}
    record_rewards(toy_sampler(), {"bright": ToyReward()}, PROMPTS, SEEDS, tmp_path / "r", **options)
    with pytest.raises(ValueError, match=r"other settings \(model differ\)"):
        record_rewards(toy_sampler(), {"bright": ToyReward()}, PROMPTS, SEEDS, tmp_path / "r", settings={"model": "x"})
    with pytest.raises(ValueError, match="other seeds"):
        record_rewards(toy_sampler(), {"bright": ToyReward()}, PROMPTS, SEEDS + 1, tmp_path / "r", **options)


def test_nan_names_prompt_seed_and_step(tmp_path):
    sampler = toy_sampler()

    def broken(images, prompts, *, sigma):
        values = images.mean((1, 2, 3))
        return torch.where(torch.arange(len(values)) == (1 if sigma == sampler.sigmas[2] else -1), torch.nan, values)

    with pytest.raises(ValueError, match="'broken' returned nan for prompt 'a', seed 1 at step 3"):
        record_rewards(sampler, {"broken": broken}, PROMPTS, SEEDS, tmp_path / "r")


def test_images_are_those_of_the_sampler(tmp_path):
    sampler = toy_sampler()
    tree = tree_at(tmp_path / "tree")
    assert record_images(sampler, tree) == 5 * 3 * 4
    state = sampler.start(["dddd"], [int(SEEDS[3, 1])])
    for call in range(1, 5):
        state = sampler.advance(state, call)
        np.testing.assert_array_equal(tree.read(3, 1, call), to_uint8(sampler.decode(state.x0))[0])


def test_chosen_calls_a_part_of_the_prompts_then_the_rest(tmp_path):
    tree = tree_at(tmp_path / "tree", calls=[2])
    assert record_images(toy_sampler(), tree, range(1, 3)) == 2 * 3 * 2
    assert [tree.begun(p) for p in range(5)] == [False, True, True, False, False]
    found = []
    assert record_images(toy_sampler(), tree, on_found=found.append) == 3 * 3 * 2
    assert sum(found) == 2 * 3 * 2
    record_images(toy_sampler(), tree_at(tmp_path / "other", calls=[2]))
    assert files(tmp_path / "tree") == files(tmp_path / "other")


def test_only_what_is_bad_is_made_again(tmp_path):
    tree = tree_at(tmp_path / "tree")
    record_images(toy_sampler(), tree)
    before = files(tree.root)
    tree.path(0, 1, 2).write_bytes(b"half")
    tree.path(4, 2, 4).unlink()
    kept = tree.path(0, 1, 3).stat().st_mtime_ns
    sampler = toy_sampler()
    assert record_images(sampler, tree) == 2
    assert sampler.pipe.vae.decoded == [6, 3]  # the two groups of candidates, each at one call
    assert files(tree.root) == before
    assert tree.path(0, 1, 3).stat().st_mtime_ns == kept
    quiet = toy_sampler()
    assert record_images(quiet, tree) == 0
    assert quiet.pipe.vae.decoded == []


def test_store_size(tmp_path):
    tree = tree_at(tmp_path / "tree", store_size=2)
    record_images(toy_sampler(), tree)
    assert tree.read(0, 0, 1).shape == (2, 2, 3)
    with pytest.raises(ValueError, match="can be stored at 1 to 4, got 5"):
        tree_at(tmp_path / "tree", store_size=5)


def test_a_full_disk_stops_it_and_the_tree_goes_on(tmp_path, monkeypatch):
    tree = tree_at(tmp_path / "tree")
    tree.save()
    write, written = Path.write_bytes, []

    def full(self, data):
        if len(written) >= 20:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        write(self, data)
        written.append(self)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        record_images(toy_sampler(), tree, workers=1)
    assert len(files(tree.root)) == 20 + 1
    monkeypatch.undo()
    assert record_images(toy_sampler(), tree) == 40
    record_images(toy_sampler(), tree_at(tmp_path / "whole"))
    assert files(tree.root) == files(tmp_path / "whole")


def test_the_writer_holds_back_who_is_too_fast():
    gate, written, handed = threading.Event(), [], []

    def write(path, image):
        gate.wait(10)
        written.append(path)

    def produce():
        with ImageWriter(write, workers=1, backlog=2) as writer:
            for number in range(6):
                writer.put([(Path(str(number)), np.zeros(1))])
                handed.append(number)

    thread = threading.Thread(target=produce)
    thread.start()
    time.sleep(0.2)
    assert handed == [0, 1]
    gate.set()
    thread.join(10)
    assert written == [Path(str(number)) for number in range(6)]


def test_the_writer_says_what_went_wrong_at_the_latest_at_the_end():
    def write(path, image):
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"), ImageWriter(write, workers=1) as writer:
        writer.put([(Path("a"), np.zeros(1))])
