"""The loop that hands out blocks, with this process as the worker: results, resuming, and what fails by itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.cluster import toys
from ttsnap.cluster.scheduling import Observer, ThisProcess, execute
from ttsnap.recordings import Recording
from ttsnap.recordings.image_tree import ImageTree
from ttsnap.recordings.recorder import record_images, record_rewards, seeds_of


def here(job, observer=None):
    return execute(job, ThisProcess(), observer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every job, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    here(toys.images(folder / "tree"))
    here(toys.values(folder / "values"))
    here(toys.labels(folder / "tree", folder / "labels"))
    (folder / "found").mkdir()
    here(toys.search(folder / "found"))
    return folder


def test_a_job_stores_what_the_library_stores(whole, tmp_path):
    tree = ImageTree.open(whole / "tree")
    again = ImageTree(
        tmp_path / "tree",
        *(getattr(tree, name) for name in ("prompts", "seeds", "num_steps", "calls")),
        tree.sigmas,
        tree.size,
        tree.format,
        tree.settings,
        tree.versions,
        tree.cost_model,
    )
    record_images(toys.sampler_of(), again)
    assert toys.files(again.root) == toys.files(whole / "tree")
    direct = record_rewards(
        toys.sampler_of(), toys.rewards(None, "cpu"), toys.PROMPTS, seeds_of(range(24), 4), tmp_path / "values"
    )
    np.testing.assert_array_equal(direct.clean, toys.clean(whole / "values"))
    np.testing.assert_allclose(toys.clean(whole / "labels"), direct.clean, atol=0.01)
    record = json.loads((whole / "found" / "p0003" / "result.json").read_text())
    assert (record["prompt"], record["candidates"]) == ("prompt 3", {"started": 4, "finished": 1})


def test_a_second_run_does_nothing_again(whole):
    for job in (
        toys.images(whole / "tree"),
        toys.values(whole / "values"),
        toys.labels(whole / "tree", whole / "labels"),
        toys.search(whole / "found"),
    ):
        before = toys.files(whole)
        assert here(job).images == 0
        assert toys.files(whole) == before


class StopAfter(Observer):
    def __init__(self, events):
        self.left = events

    def event(self, worker, event, outcome):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("events", [1, 9])
def test_interrupted_it_goes_on_and_ends_the_same(whole, tmp_path, events):
    (tmp_path / "found").mkdir()
    for make, name in ((toys.images, "tree"), (toys.values, "values"), (toys.search, "found")):
        with pytest.raises(KeyboardInterrupt):
            here(make(tmp_path / name), StopAfter(events))
        here(make(tmp_path / name))
        if name == "values":
            np.testing.assert_array_equal(toys.clean(tmp_path / name), toys.clean(whole / name))
        else:
            assert toys.files(tmp_path / name) == toys.files(whole / name)


@pytest.mark.parametrize(("how", "why"), [("raises", "RuntimeError: I do not like this one"), ("nan", "nan")])
def test_a_reward_that_fails_for_one_prompt_costs_that_one_only(whole, tmp_path, how, why):
    (tmp_path / "found").mkdir()
    for job in (
        toys.values(tmp_path / "values", how),
        toys.labels(whole / "tree", tmp_path / "labels", how),
        toys.search(tmp_path / "found", how),
    ):
        outcome = here(job)
        assert set(outcome.failures) == {5}
        assert why in outcome.failures[5]
        assert outcome.stored == set(range(24)) - {5}
    assert np.flatnonzero(~Recording(tmp_path / "values").done).tolist() == [5]
    assert here(toys.values(tmp_path / "values")).stored >= {5}  # the reward is mended: only its block is done again
    np.testing.assert_allclose(toys.clean(tmp_path / "values"), toys.clean(whole / "values"), atol=1e-6)


def test_a_prompt_that_cannot_be_encoded_costs_that_one_only(whole, tmp_path):
    outcome = here(toys.images(tmp_path / "tree", refuses=toys.PROMPTS[7]))
    assert outcome.failures == {7: "RuntimeError: ToyPipeline, prompt 'prompt 7', seed 28: I cannot read this"}
    found, expected = toys.files(tmp_path / "tree"), toys.files(whole / "tree")
    assert set(expected) - set(found) == {name for name in expected if name.startswith("p0007")}


def test_a_batch_that_runs_out_of_memory_is_done_in_halves_and_the_next_block_is_whole_again(whole, tmp_path):
    outcome = here(toys.images(tmp_path / "tree", full_once=str(tmp_path / "once")))
    assert outcome.failures == {}
    assert any("out of memory: going on with at most 4" in note for note in outcome.notes)
    assert toys.files(tmp_path / "tree") == toys.files(whole / "tree")


def test_a_poisoned_image_costs_its_prompt_only(whole, tmp_path):
    tree = ImageTree.open(whole / "tree")
    path = tree.path(3, 1, 2)
    good = path.read_bytes()
    path.write_bytes(good[:40] + b"poison" + good[46:])
    try:
        outcome = here(toys.labels(whole / "tree", tmp_path / "labels"))
    finally:
        path.write_bytes(good)
    assert set(outcome.failures) == {3}
    assert outcome.bad[0][0] == str(path)
    assert "is damaged" in outcome.failures[3]
    here(toys.labels(whole / "tree", tmp_path / "labels"))
    np.testing.assert_array_equal(toys.clean(tmp_path / "labels"), toys.clean(whole / "labels"))
