"""Who may write to an output: locks of the system, and locks in a real object store, between real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.object_store import serve
from ttsnap.files.locks import locked
from ttsnap.files.storage import filesystem, location

BEAT = 0.5  # seconds; an owner is dead after six


@pytest.fixture(scope="module")
def store():
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTSNAP_HEARTBEAT", str(BEAT))
        yield server


HOLDER = """
import select, sys
from ttsnap.files.locks import locked
from ttsnap.files.storage import location
input()
try:
    with locked(location(sys.argv[1])) as check:
        print("in", flush=True)
        while not select.select([sys.stdin], [], [], 0.02)[0]:
            check()
    print("out", flush=True)
except ValueError as error:
    print(error, flush=True)
"""


class Holder:
    """A process that takes the lock of an output when it is told to go, and ends when it is told so again."""

    def __init__(self, out, go=True):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], **pipes)
        self.pid = self.process.pid
        if go:
            self.go()
            assert self.hear() == "in"

    def go(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def hear(self):
        return self.process.stdout.readline().strip()

    def kill(self, how=signal.SIGKILL):
        os.kill(self.pid, how)
        if how == signal.SIGKILL:
            self.process.wait()


@pytest.fixture
def holder():
    made = []

    def make(*arguments, **options):
        made.append(Holder(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.process.kill()
        one.process.communicate()


def test_an_output_belongs_to_one_process_at_a_time_until_that_is_gone(tmp_path, holder):
    out, lock = tmp_path / "run", tmp_path / ".run.lock"
    other = holder(out)
    assert json.loads(lock.read_text())["pid"] == other.pid
    with pytest.raises(ValueError, match=rf"is being written by process {other.pid} on .* since"), locked(out):
        pass
    other.kill()
    assert lock.exists()  # killed, it could not tidy up; its lock is gone all the same
    with locked(out):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()


def test_in_an_object_store_an_owner_who_lives_is_left_alone(store, holder):
    out = location(store.bucket() + "/run")
    other, said = holder(out), []
    with (
        pytest.raises(ValueError, match=rf"is being written by process {other.pid} on .* since"),
        locked(out, said.append),
    ):
        pass
    assert len(said) == 1
    assert f"begun by process {other.pid}" in said[0]
    assert "a sign of life" in said[0]
    other.go()
    assert other.hear() == "out"
    with locked(out, said.append) as check:
        check()
    assert len(said) == 1  # its end was written, so that nobody waits


def test_in_an_object_store_an_owner_who_was_killed_blocks_the_next_for_six_heartbeats(store, holder):
    out = location(store.bucket() + "/run")
    holder(out).kill()
    start = time.monotonic()
    with locked(out):
        assert time.monotonic() - start > 5 * BEAT
        owners = list((out.parent / ".run.lock").iterdir())
        assert [place.name for place in owners] == ["00000002"]
        assert json.loads(owners[0].read_text())["pid"] == os.getpid()


@pytest.mark.slow
def test_of_many_who_start_at_the_same_moment_one_gets_an_object_store(store, holder):
    out = location(store.bucket() + "/run")
    first = holder(out)
    others = [holder(out, go=False) for _ in range(4)]
    first.kill()
    for other in others:
        other.go()
    heard = sorted(other.hear() for other in others)
    assert heard[0] == "in", heard
    assert all("is being written by process" in one for one in heard[1:])


@pytest.mark.slow
def test_an_owner_who_slept_too_long_is_told_that_the_object_store_is_taken(store, holder):
    out = location(store.bucket() + "/run")
    other = holder(out)
    other.kill(signal.SIGSTOP)
    with locked(out) as check:
        other.kill(signal.SIGCONT)
        assert f"was taken over by process {os.getpid()} on" in other.hear()
        check()


@pytest.mark.slow
def test_while_an_object_store_is_away_nobody_is_taken_to_be_dead(store, holder):
    out = location(store.bucket() + "/run")
    other = holder(out)
    store.fail_for(8 * BEAT)
    with pytest.raises(ValueError, match=f"is being written by process {other.pid}"), locked(out):
        pass


def test_an_object_store_without_conditional_puts_is_told_of(store, holder):
    out, said = location(store.bucket() + "/run"), []
    store.conditional = False
    try:
        with locked(out, said.append):
            assert ["without conditional puts" in sentence for sentence in said] == [True]
        other = holder(out)
        with pytest.raises(ValueError, match=f"is being written by process {other.pid}"), locked(out):
            pass
    finally:
        store.conditional = True


def test_what_is_no_lock_is_taken_for_a_dead_one(store, monkeypatch):
    monkeypatch.setattr("ttsnap.files.locks.HEARTBEAT", BEAT)
    out = location(store.bucket() + "/run")
    (out.parent / ".run.lock" / "00000007").write_bytes(b"[1, 2")
    with locked(out):
        assert [place.name for place in (out.parent / ".run.lock").iterdir()] == ["00000008"]


@pytest.mark.slow
def test_two_records_on_one_object_store_and_one_that_goes_on_after_a_kill(store):
    """The commands themselves: the second is refused while the first is at work, and goes on when that was killed."""
    out = store.bucket() + "/tree"
    command = [sys.executable, "-m", "ttsnap", "record", "--prompts", "shapes:held-out", "--prompt-range", "0:16"]
    command += ["--per-prompt", "4", "--max-batch", "4", "--calls", "5,10,15", "--out", out, "--json"]

    def record():
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def images():
        return sum(1 for path in set(store.puts) if path.endswith(".png"))

    def stored():
        found, path = filesystem(out)
        return sum(name.endswith(".png") for name in found.find(path))

    first = record()
    deadline = time.monotonic() + 120
    while not images() and time.monotonic() < deadline:
        time.sleep(0.05)
    second = record()
    _, err = second.communicate(timeout=300)
    assert second.returncode == 2
    assert f"was begun by process {first.pid} on" in err
    assert f"error: {out} is being written by process {first.pid} on" in err
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    made = stored()
    assert 0 < made < 16 * 4 * 4, "it was killed too early or too late to tell anything"
    third = record()
    text, err = third.communicate(timeout=300)
    assert third.returncode == 0, err
    assert "waiting up to 3 s for a sign of life" in err
    report = json.loads(text)
    assert (report["images_found"], report["images"]) == (made, 16 * 4 * 4 - made)  # nothing is done twice


@pytest.mark.parametrize("heartbeat", ["0", "nan", "soon", "1e9"])
def test_a_heartbeat_is_some_seconds(store, monkeypatch, heartbeat):
    monkeypatch.setenv("TTSNAP_HEARTBEAT", heartbeat)
    with pytest.raises(ValueError, match="TTSNAP_HEARTBEAT is above 0"), locked(location("s3://b/run")):
        pass
