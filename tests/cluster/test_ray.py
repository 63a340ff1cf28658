"""Workers as real processes on two cores, and what they do to them. One Ray serves all of these tests."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.cluster import toys
from ttsnap.cluster.scheduling import Observer, ThisProcess, execute
from ttsnap.files.storage import location
from ttsnap.policies import Branching
from ttsnap.recordings import Recording

pytestmark = pytest.mark.usefixtures("two_cores")
ROOT = Path(__file__).parents[2]


def there(job, workers=2, observer=None):
    from ttsnap.cluster.ray_pool import RayPool

    pool = RayPool(workers)
    if observer is not None:
        observer.pool = pool
    return execute(job, pool, observer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every job, undisturbed, in this process."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "found").mkdir()
    for job in (toys.images(folder / "tree"), toys.values(folder / "values"), toys.search(folder / "found")):
        execute(job, ThisProcess())
    execute(toys.labels(folder / "tree", folder / "labels"), ThisProcess())
    return folder


class Killer(Observer):
    """Kills a worker that is at work after each of so many events."""

    def __init__(self, after, seed=0):
        self.after, self.events, self.killed, self.rng = set(after), 0, 0, random.Random(seed)

    def event(self, worker, event, outcome):
        self.events += 1
        if self.killed < len(self.after) and self.events >= sorted(self.after)[self.killed]:
            os.kill(self.rng.choice(self.pool.busy()), signal.SIGKILL)
            self.killed += 1


def test_two_workers_find_the_same_images_as_one_process(whole, tmp_path):
    (tmp_path / "found").mkdir()
    there(toys.search(tmp_path / "found"))
    assert toys.files(tmp_path / "found") == toys.files(whole / "found")


@pytest.mark.slow
def test_a_policy_that_forks_chooses_the_same_on_two_workers_as_in_one_process(tmp_path):
    prompts, chosen = toys.PROMPTS[:6], {}
    for name, run in (("here", lambda job: execute(job, ThisProcess())), ("there", there)):
        out = tmp_path / name
        out.mkdir()
        run(toys.search(out, prompts=prompts, policy=Branching((1, 2), keep=(0.5, 0.5), grow=(1.0, 1.0), angle=40.0)))
        chosen[name] = toys.files(out)
    assert chosen["there"] == chosen["here"]
    forked = [json.loads(path.read_text()) for path in sorted((tmp_path / "there").glob("p*/tree.json"))]
    assert len(forked) == len(prompts)
    assert all(len(look["way"]) > 1 for look in forked[0]["looks"][-1:])


@pytest.mark.slow
def test_two_workers_record_and_label_the_same_bytes_as_one_process(whole, tmp_path):
    there(toys.images(tmp_path / "tree"))
    there(toys.values(tmp_path / "values"))
    there(toys.labels(whole / "tree", tmp_path / "labels"))
    assert toys.files(tmp_path / "tree") == toys.files(whole / "tree")
    for name in ("values", "labels"):
        assert toys.clean(tmp_path / name).tobytes() == toys.clean(whole / name).tobytes()


@pytest.mark.slow
def test_workers_killed_in_the_middle_cost_nothing(whole, tmp_path):
    """Killed -9 in mid-prompt; what was stored stays, the rest is done by others."""
    killer = Killer([3, 30, 60])
    outcome = there(toys.images(tmp_path / "tree", pause=0.01), observer=killer)
    assert outcome.failures == {}
    assert (killer.killed, outcome.deaths) == (3, 3)
    assert toys.files(tmp_path / "tree") == toys.files(whole / "tree")
    assert not list((tmp_path / "tree").rglob(".*.tmp"))


@pytest.mark.slow
def test_a_prompt_that_kills_its_worker_is_found_and_the_rest_completes(whole, tmp_path, monkeypatch):
    from ttsnap.cluster import scheduling

    monkeypatch.setattr(scheduling, "DEATHS", 1)
    prompts = toys.PROMPTS[:8]
    outcome = there(toys.values(tmp_path / "values", "kills", prompts))
    assert set(outcome.failures) == {5}
    assert "its worker died" in outcome.failures[5]
    assert np.flatnonzero(~Recording(tmp_path / "values").done).tolist() == [5]


@pytest.mark.slow
def test_a_reward_that_raises_a_full_memory_and_a_poisoned_image_cost_no_more_on_two_workers(whole, tmp_path):
    outcome = there(toys.values(tmp_path / "values", "raises"))
    assert outcome.failures == {5: "RuntimeError: I do not like this one"}
    assert np.flatnonzero(~Recording(tmp_path / "values").done).tolist() == [5]
    outcome = there(toys.images(tmp_path / "tree", full_once=str(tmp_path / "once")))
    assert (outcome.failures, outcome.deaths) == ({}, 0)
    assert any("out of memory: going on with at most 4" in note for note in outcome.notes)
    assert toys.files(tmp_path / "tree") == toys.files(whole / "tree")
    path = tmp_path / "tree" / "p0003" / "id001" / "s01.png"
    good = path.read_bytes()
    path.write_bytes(good[:40] + b"poison" + good[46:])
    outcome = there(toys.labels(tmp_path / "tree", tmp_path / "labels"))
    assert (set(outcome.failures), outcome.bad[0][0]) == ({3}, str(path))
    assert np.flatnonzero(~Recording(tmp_path / "labels").done).tolist() == [3]


@pytest.mark.slow
def test_what_a_worker_raises_is_told_as_it_is(tmp_path):
    there(toys.values(tmp_path / "values", prompts=toys.PROMPTS[:2]))
    with pytest.raises(ValueError, match="holds another recording: sizes"):
        there(toys.values(tmp_path / "values", prompts=toys.PROMPTS[:4]))


DRIVER = """
import sys
sys.path.insert(0, {root!r})
import ray
ray.init(address={address!r}, log_to_driver=False, logging_level="ERROR")
from tests.cluster import toys
from tests.cluster.test_ray import there
from ttsnap.files.storage import location
there(toys.images(location({out!r}), pause=0.05))
"""


@pytest.mark.slow
def test_the_driver_killed_and_started_again_with_another_number_of_workers(whole, tmp_path, two_cores):
    code = DRIVER.format(root=str(ROOT), address=two_cores, out=str(tmp_path / "tree"))
    driver = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(list((tmp_path / "tree").glob("p*/id*/s03.png"))) < 12 and time.time() < deadline:
        assert driver.poll() is None
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    made = len(list((tmp_path / "tree").rglob("*.png")))
    assert 12 <= made < 24 * 4 * 4
    outcome = there(toys.images(tmp_path / "tree"), workers=1)
    assert outcome.found >= made - 2 * 16  # what the orphans still wrote comes on top
    assert toys.files(tmp_path / "tree") == toys.files(whole / "tree")


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_with_more_room_it_goes_on(whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(OSError, match="No space left"):
            there(toys.images(disk / "tree"))
        assert 0 < len(list(disk.rglob("*.png"))) < 24 * 4 * 4
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        there(toys.images(disk / "tree"))
        assert toys.files(disk / "tree") == toys.files(whole / "tree")
    finally:
        subprocess.run(["umount", disk], check=True)


class Outage(Observer):
    def __init__(self, store):
        self.store = store

    def event(self, worker, event, outcome):
        if self.store and outcome.images + outcome.found > 20:
            self.store.fail_for(3.0)
            self.store = None


@pytest.mark.slow
def test_an_object_store_that_answers_503_for_a_while(whole, tmp_path, store):
    prompts = toys.PROMPTS[:4]
    out = location(store.bucket() + "/run")
    refused = store.refused
    assert there(toys.images(out / "tree", prompts), observer=Outage(store)).failures == {}
    assert store.refused > refused
    names = [name for name in toys.files(whole / "tree") if name.startswith(("p0000", "p0001", "p0002", "p0003"))]
    assert len(names) == 4 * 4 * 4
    for name in names:
        assert (out / "tree" / name).read_bytes() == (whole / "tree" / name).read_bytes()


@pytest.mark.slow
def test_searches_and_rewards_in_an_object_store(whole, store):
    prompts = toys.PROMPTS[:4]
    out = location(store.bucket() + "/run")
    there(toys.search(out / "found", prompts=prompts))
    assert (out / "found" / "p0003" / "result.json").is_file()
    there(toys.values(out / "values", prompts=prompts))
    assert toys.clean(out / "values").tobytes() == toys.clean(whole / "values")[:4].tobytes()


@pytest.mark.slow
def test_twenty_random_kills_end_in_the_same_files(whole, tmp_path):
    killer = Killer(random.Random(1).sample(range(2, 70), 20), seed=2)
    outcome = there(toys.images(tmp_path / "tree", pause=0.02), observer=killer)
    assert outcome.failures == {}
    assert (killer.killed, outcome.deaths) == (20, 20)
    assert toys.files(tmp_path / "tree") == toys.files(whole / "tree")
