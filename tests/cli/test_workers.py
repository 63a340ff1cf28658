"""What the progress of many workers tells, and how failures are reported."""

from __future__ import annotations

import json
import os
import signal

import pytest
from rich.console import Console

from ttsnap.cli import verbosity
from ttsnap.cli.options import Workers
from ttsnap.cli.progress import Board
from ttsnap.cli.workers import report_failures, run
from ttsnap.cluster.jobs import Event, Plan
from ttsnap.cluster.scheduling import Outcome


@pytest.fixture(autouse=True)
def not_quiet(monkeypatch):
    """Whatever a command in this process said of itself before."""
    monkeypatch.setattr(verbosity, "level", 0)


def test_one_bar_and_a_line_per_worker():
    board = Board("recording", "images", silent=False, workers=True)
    board.planned(Plan([(0,), (1,)], images=40, prompts=2))
    board.state(0, "prompt 0")
    board.state(1, "died; another starts")
    outcome = Outcome(Plan([]), images=10, found=5, stored={0})
    board.event(0, Event(10), outcome)
    board.tick()
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(board._live.get_renderable())
    text = console.export_text()
    assert "15/40" in text
    assert "per second" in text
    assert "prompts)" in text
    assert "left" in text
    assert "worker 0: prompt 0" in text
    assert "worker 1: died; another starts" in text
    assert board.report()["images_found"] == 5


def test_failures_are_listed_by_prompt_and_the_list_goes_when_there_are_none(tmp_path, capsys):
    place = tmp_path / "failures.json"
    outcome = Outcome(Plan([], prompts=2), failures={1: "RuntimeError: no"}, stored={0}, notes={"a note": None})
    found = report_failures(outcome, place, lambda p: f"prompt {p}")
    assert found == [{"prompt": 1, "text": "prompt 1", "error": "RuntimeError: no"}]
    assert json.loads(place.read_text()) == {"failures": found}
    err = capsys.readouterr().err
    assert "warning: a note" in err
    assert "prompt 1 ('prompt 1') failed: RuntimeError: no" in err
    assert report_failures(Outcome(Plan([], prompts=2), stored={0, 1}), place, str) == []
    assert not place.exists()
    with pytest.raises(ValueError, match="RuntimeError: no"):
        report_failures(Outcome(Plan([], prompts=1), failures={0: "RuntimeError: no"}), place, str)


def test_one_worker_here_needs_no_ray():
    assert Workers().alone
    assert Workers(workers=1).alone
    assert not Workers(workers=2).alone
    assert not Workers(workers=None, ray_address="auto").alone
    with pytest.raises(ValueError, match="--workers must be at least 1, got 0"):
        Workers(workers=0)
    with pytest.raises(ValueError, match="has a GPU of its own"):
        Workers(workers=2).check_device("cuda:1")
    with pytest.raises(ValueError, match="--reward-device is cpu or cuda, got 'cuda:1'"):
        Workers(workers=2).check_device(None, "cuda:1")


class Job:
    """Does something for each of its prompts."""

    def __init__(self, what):
        self.what = what

    def load(self):
        return self

    def plan(self):
        return Plan([(0,), (1,)], images=2, prompts=2)

    def run(self, block, shared):
        self.what()
        yield Event(1, prompts=block)


def quiet():
    return Board("recording", "images", silent=True, workers=False)


def test_what_a_reward_prints_stays_out_of_the_results(tmp_path, capsys):
    assert run(Job(lambda: print("I am chatty")), Workers(), tmp_path / "out", quiet()).images == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "I am chatty\nI am chatty\n")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_and_the_term_signal_of_a_scheduler_are_one_sentence(tmp_path, capsys, how, request):
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # as shells start their background jobs
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ignored))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run(Job(lambda: os.kill(os.getpid(), how)), Workers(), tmp_path / "out", quiet())
    assert stop.value.code == 130
    assert capsys.readouterr().err == f"stopped: the same command goes on from there ({tmp_path / 'out'})\n"
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / ".out.lock").exists()
