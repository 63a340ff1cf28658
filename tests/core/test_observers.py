"""What a search tells, and what is left when it is stopped anywhere."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.pipelines.toy import ToyReward, toy_sampler
from ttsnap.core.cost import CostModel
from ttsnap.core.driver import run
from ttsnap.core.observers import Observer, Stop, spread
from ttsnap.live.open_search import OpenSearch
from ttsnap.live.session import Session
from ttsnap.policies import BestOfN, SuccessiveHalving

HALVING = SuccessiveHalving((1, 2), sizes=(4, 2))
MODEL = CostModel("toy", 1.0, 0.5, 0.25)


class Recorder(Observer):
    """Notes everything; stops at the event of that number."""

    def __init__(self, stop_at=None):
        self.events, self.stop_at = [], stop_at

    def _note(self, *event):
        self.events.append(event)
        if len(self.events) - 1 == self.stop_at:
            raise Stop

    def started(self, start):
        self.start = start
        self._note("started", start.problem, start.plan)

    def asked(self, query):
        self._note("asked", query.step, int(query.mask.sum()))

    def called(self, calls):
        self._note("called", calls)

    def judged(self, step, rewards):
        known = np.isfinite(rewards).all(axis=-1)
        assert all((p, c, step) in self.start.pictures for p, c in np.argwhere(known))
        self._note("judged", step, int(known.sum()))

    def looked(self, look, ledger):
        self._note("looked", look.step, int(look.alive.sum()), int(ledger.nfe.sum()))

    def ended(self, result):
        self._note("ended", result.stopped)


def searcher(policy=HALVING, candidates=6, **options):
    return Session(toy_sampler(num_steps=4, max_batch=4, **options), {"bright": ToyReward()}, policy, candidates, MODEL)


def test_everything_is_told_in_order():
    tell = Recorder()
    searcher().block(["a"], observer=tell)
    assert [event[0] for event in tell.events] == (
        ["started", "asked"]
        + ["called", "judged"] * 2  # six candidates in two batches
        + ["looked", "asked", "called", "judged", "looked", "asked", "called", "called", "judged", "looked", "ended"]
    )
    assert tell.events[0][2] == HALVING.plan(6, 4)
    assert [event[1:] for event in tell.events if event[0] == "judged"] == [(1, 4), (1, 6), (2, 4), (4, 2)]
    assert sum(event[1] for event in tell.events if event[0] == "called") == 6 + 4 + 2 * 2
    assert tell.events[-2] == ("looked", 4, 2, 6 + 4 + 4)
    assert tell.events[-1] == ("ended", False)


@pytest.mark.parametrize("policy", [HALVING, BestOfN()], ids=str)
def test_stopped_at_any_moment_it_keeps_what_is_finished_and_counts_every_call(policy, tmp_path):
    whole = Recorder()
    searcher(policy).block(["a", "b"], observer=whole)
    made = searcher(policy)  # the same for all: a search that was stopped leaves nothing behind
    for moment in range(len(whole.events) - 1):
        tell = Recorder(stop_at=moment)
        results = made.block(["a", "b"], observer=tell, compare=False)
        calls = sum(event[1] for event in tell.events if event[0] == "called")
        assert sum(result.cost.nfe for result in results) == calls
        judged = [event for event in tell.events if event[0] == "judged" and event[1] == 4]
        assert sum(result.finished for result in results) == (judged[-1][2] if judged else 0)
        for number, result in enumerate(results):
            assert result.stopped
            assert len(result.images) == min(1, result.finished)
            record = result.save(tmp_path / f"{moment}-{number}")
            assert json.loads(json.dumps(record)) == json.loads(
                (tmp_path / f"{moment}-{number}" / "result.json").read_text()
            )
            assert (record["seed"] is None) == (not result.images)
            if not result.images:
                with pytest.raises(ValueError, match="stopped before an image was finished"):
                    result.image  # noqa: B018
        assert tell.events[-1] == ("ended", True)


def test_a_stopped_search_can_be_compared():
    tell = Recorder(stop_at=8)
    block = searcher().open(["a"])
    block.run(tell)
    block.compare()
    result = block.results()[0]
    assert result.stopped
    assert result.best_of_n.best
    block.compare(Recorder(stop_at=0))


def test_a_dropped_candidate_is_finished_after_all_and_pays_for_it():
    block = searcher().open(["a", "b"])
    block.run()
    before = block.results(top=9)
    dropped = ~block.result.finished
    dropped[:, 1:] &= ~dropped[:, :-1]  # the first dropped, and others here and there
    tell = Recorder()
    block.finish(dropped, tell)
    after = block.results(top=9)
    assert [event[0] for event in tell.events[:2]] == ["started", "asked"]
    straight = searcher(BestOfN()).block(["a", "b"], top=9)
    for p in range(2):
        steps = block.result.ledger.position[p][dropped[p]]
        assert (steps == 4).all()
        known = {image.seed: image.reward for image in straight[p].images}
        assert {image.seed: image.reward for image in after[p].images} == pytest.approx(
            {image.seed: known[image.seed] for image in after[p].images}
        )
        assert len(after[p].images) == len(before[p].images) + dropped[p].sum()
        calls = sum(4 - max(s.step for s in before[p].history[seed]) for seed in np.flatnonzero(dropped[p]))
        assert after[p].cost.nfe == before[p].cost.nfe + calls
        assert after[p].cost.looks == before[p].cost.looks + dropped[p].sum()
        assert after[p].reward >= before[p].reward
    with pytest.raises(ValueError, match="finished already"):
        block.finish(block.result.finished)
    with pytest.raises(ValueError, match="when the search has been run"):
        OpenSearch(searcher(), ["a"]).finish(dropped[:1])


def test_a_search_that_was_stopped_early_can_be_finished():
    block = searcher().open(["a"])
    block.run(Recorder(stop_at=1))
    assert block.results()[0].cost.nfe == 0
    block.finish(np.arange(6)[None] == 3)
    result = block.results()[0]
    assert (result.seed, result.stopped, result.cost.nfe) == (3, True, 4)


def test_replay_tells_and_stops_too():
    from ttsnap.replay.environment import ReplayEnvironment

    environment = ReplayEnvironment(np.random.default_rng(0).normal(size=(2, 6, 4, 1)))
    whole = Recorder()
    run(HALVING, environment, observer=whole)
    assert [event[0] for event in whole.events] == ["asked", "looked"] * 3 + ["ended"]
    result = run(HALVING, environment, observer=Recorder(stop_at=3))
    assert result.stopped
    assert (result.chosen == -1).all()
    assert np.isnan(result.rewards).all()
    assert (result.ledger.nfe == 6 + 4).all()


def test_calls_are_spread_over_prompts():
    assert spread(7, np.array([0, 0, 2]), 3).tolist() == [5, 0, 2]
    assert spread(0, np.array([1]), 2).tolist() == [0, 0]
