"""One search on several devices: the same result, to the last bit, and none of it lost when a device is."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings

import numpy as np
import pytest

from tests import commands
from ttsnap.live.session import prepare
from ttsnap.pipelines import replicas as module
from ttsnap.pipelines.loading import read_devices
from ttsnap.pipelines.replicas import Replicas, batch_size
from ttsnap.policies import BestOfN, Branching, SuccessiveHalving

PROMPT = "a red circle left of a blue square"
HALVING = SuccessiveHalving((2, 4), keep=(0.5, 0.5))


class Forked:
    """The process of a replica, forked from this one in place of begun anew, which takes many seconds."""

    def __init__(self, command, pass_fds, **options):
        assert re.search(r"serve\((\d+)\)", command[-1])[1] == str(pass_fds[0])
        self.code = None
        self.pid = os.fork()
        if not self.pid:
            try:
                os.closerange(3, pass_fds[0])  # sockets of the others among them
                module.serve(pass_fds[0])
            finally:
                os._exit(0)

    def kill(self):
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self):
        if self.code is None:
            self.code = os.waitpid(self.pid, 0)[1]


@pytest.fixture(scope="module")
def sessions():
    """One session without replicas, and with: the same sampler is used for both."""
    patch = pytest.MonkeyPatch()
    patch.setattr(module.subprocess, "Popen", Forked)
    session = prepare("shapes", candidates=10, num_inference_steps=6, max_batch=2, policy=HALVING, report="none")
    sampler = session.sampler
    replicas = Replicas(sampler, ["cpu", "cpu", "cpu"])

    def use(count):
        """The session with so many devices."""
        sampler.replicas = replicas if count > 1 else None
        while count > 1 and replicas.count > count:
            replicas.others.pop().close()
        return session

    yield use
    session.sampler.replicas = None
    replicas.close()
    patch.undo()


def told(result):
    """All that a search came to, but for times."""
    looks = {seed: [(look.step, look.reward, look.kept) for look in looks] for seed, looks in result.history.items()}
    return result.seed, result.reward, looks, result.cost.nfe, np.asarray(result.image).tobytes()


def test_any_number_of_devices_comes_to_the_same_bits_with_forks_features_and_previews(sessions):
    for policy in (HALVING, Branching()):
        results = {}
        for count in (3, 1):
            session = sessions(count)
            session.policy = policy
            results[count] = told(session.search(PROMPT))
            if count > 1:
                sent = [replica._count for replica in session.sampler.replicas.others]
                assert min(sent) > 0, "a device had nothing to do"
        assert results[3] == results[1], policy


def test_a_device_that_dies_costs_nothing(sessions):
    session = sessions(3)
    session.policy = BestOfN()
    whole = told(sessions(1).search(PROMPT))
    session = sessions(3)
    first = session.sampler.replicas.others[0]

    def kill(count):
        os.kill(first.process.pid, signal.SIGKILL)
        session.sampler.on_calls = None

    session.sampler.on_calls = kill
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = session.search(PROMPT)
    said = [*map(str, result.notes), *(str(w.message) for w in caught)]
    assert any("the process of cpu has died; going on with 2 devices" in note for note in said), said
    assert told(result) == whole


@pytest.fixture
def each(monkeypatch):
    """A session whose reward has a copy on each of so many devices."""
    monkeypatch.setattr(module.subprocess, "Popen", Forked)
    made = []

    def on(count, **options):
        asked = {"candidates": 10, "num_inference_steps": 6, "policy": HALVING, "report": "none", "reward": "shapes"}
        devices = ",".join(["cpu"] * count)
        made.append(prepare("shapes", devices=devices, reward_device="each", **asked | options))
        return made[-1]

    yield on
    for session in made:
        session.close()


def test_rewards_on_each_device_share_the_pictures_and_say_the_same(each, monkeypatch):
    """Ten pictures, four at a time, keep both other devices busy; five one of them; three none."""
    used, send = [], module.Replica.send
    monkeypatch.setattr(module.Replica, "send", lambda own, what: (used.append(type(what).__name__), send(own, what)))
    three = told(each(3).search(PROMPT))
    assert used.count("Use") == 3
    assert used.count("Tool") == 2
    assert told(each(1).search(PROMPT)) == three


def test_a_device_that_dies_while_it_judges_costs_nothing(each):
    session = each(2)
    whole = told(session.search(PROMPT))
    (replica,) = session.sampler.replicas.others
    send = replica.send

    def die(what):
        send(what)
        if isinstance(what, module.Use):
            os.kill(replica.process.pid, signal.SIGKILL)

    replica.send = die
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = session.search(PROMPT)
    said = [*map(str, result.notes), *(str(w.message) for w in caught)]
    assert any("the process of cpu has died" in note for note in said), said
    assert told(result) == whole


def test_rewards_on_each_device_need_devices_and_names():
    wrong = "rewards by name in a search on several devices"
    for options in ({}, {"devices": "cpu,cpu", "reward": {"red": len}}, {"devices": "cpu,cpu", "reward_timeout": 5.0}):
        with pytest.raises(ValueError, match=wrong):
            prepare("shapes", reward_device="each", **options)


def test_devices_are_read_and_what_cannot_be_is_one_sentence():
    assert read_devices("0, 1,cuda:3") == ["cuda:0", "cuda:1", "cuda:3"]
    assert read_devices(["cpu", "cpu"]) == ["cpu", "cpu"]
    with pytest.raises(ValueError, match="such as 0,1,2,3 or cpu,cpu"):
        read_devices("cpu,,cpu")


def test_batches_are_dealt_so_that_all_devices_have_work_until_the_rung():
    assert batch_size([3] * 64, 8, 32) == 8  # all at once, three times
    assert batch_size([4] * 26, 8, 32) == 2  # seven rounds, where lockstep would take four of four each
    assert batch_size([8] * 5, 8, 32) == 1
    assert batch_size([1] * 32, 8, 4) == 4


@pytest.mark.slow
def test_the_command_on_one_and_on_two_devices(tmp_path):
    made = {}
    for devices in ("cpu", "cpu,cpu"):
        begun = time.monotonic()
        out = tmp_path / str(len(devices))
        done = commands.ttsnap(
            "generate", PROMPT, "--candidates", 8, "--steps", 6, "--max-batch", 2, "--devices", devices, "--out", out
        )
        assert done.returncode == 0, done.stderr
        made[devices] = (out / "best.png").read_bytes()
        assert time.monotonic() - begun < 300
    assert made["cpu"] == made["cpu,cpu"]
    done = commands.ttsnap("generate", PROMPT, "--devices", "cpu,cpu", "--device", "mps")
    assert (done.returncode, "begins with cpu" in done.stderr) == (2, True)
