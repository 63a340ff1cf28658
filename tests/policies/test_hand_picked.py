"""Hand-picked: who agrees gets the proposer's search; who does not gets what was picked, and pays for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttsnap.core.driver import run
from ttsnap.core.observers import Stop
from ttsnap.policies import BestOfN, EarlySelection, HandPicked, SuccessiveHalving
from ttsnap.policies.hand_picked import Picked
from ttsnap.replay.environment import ReplayEnvironment

HALVING = SuccessiveHalving((1, 3), sizes=(3, 2))


def replay(prompts=2, candidates=6, steps=5, seed=0):
    return ReplayEnvironment(np.random.default_rng(seed).normal(size=(prompts, candidates, steps, 1)))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 99), st.data())
def test_who_agrees_gets_the_wrapped_policy(candidates, steps, seed, data):
    rungs = tuple(sorted(data.draw(st.sets(st.integers(1, steps - 1), max_size=3))))
    keep = tuple(data.draw(st.floats(0.05, 1.0)) for _ in rungs)
    for policy in (SuccessiveHalving(rungs, keep), BestOfN(), EarlySelection(1)):
        own = run(policy, replay(candidates=candidates, steps=steps, seed=seed))
        picked = run(HandPicked(policy), replay(candidates=candidates, steps=steps, seed=seed))
        assert (own.chosen == picked.chosen).all()
        assert [move.step for move in own.ledger.moves] == [move.step for move in picked.ledger.moves]
        assert all((a.mask == b.mask).all() for a, b in zip(own.ledger.moves, picked.ledger.moves, strict=True))


def test_what_is_proposed_and_what_is_picked():
    seen = []

    def pick(proposal):
        seen.append(proposal)
        worst = np.argsort(np.where(proposal.alive, proposal.rewards, np.inf), axis=1)[:, :2]
        keep = np.zeros_like(proposal.alive)
        np.put_along_axis(keep, worst, True, axis=1)
        return keep

    result = run(HandPicked(HALVING, pick), replay())
    assert [(p.step, p.next_step, p.alive[0].sum(), p.keep[0].sum()) for p in seen] == [(1, 3, 6, 3), (3, 5, 2, 1)]
    best = np.sort(seen[0].rewards[0])[-3:]
    assert sorted(seen[0].rewards[0][seen[0].keep[0]]) == list(best)
    assert (result.finished == seen[1].alive).all()
    assert (result.ledger.nfe == 6 * 1 + 2 * 4).all()


def test_the_dropped_may_come_back_and_pay_for_their_own_calls():
    def pick(proposal):
        keep = proposal.keep.copy()
        if proposal.step == 3:
            keep[:, :] = True
        return keep

    result = run(HandPicked(HALVING, pick), replay())
    assert result.finished.all()
    assert (result.ledger.nfe == 6 * 5).all()
    assert (result.ledger.looks == 6 + 3 + 6).all()


def test_with_one_left_there_is_nothing_to_decide():
    steps = []

    def pick(proposal):
        steps.append((proposal.step, proposal.alive.sum(axis=1).tolist()))
        keep = proposal.keep.copy()
        if proposal.step == 1:
            keep[0] = np.arange(6) == 4
        return keep

    result = run(HandPicked(HALVING, pick), replay())
    assert steps == [(1, [6, 6]), (3, [0, 3])]
    assert result.finished[0].tolist() == [False] * 4 + [True, False]
    assert result.ledger.nfe[0] == 6 + 4


def test_nobody_kept_is_refused():
    with pytest.raises(ValueError, match="at least one candidate of each prompt must be kept"):
        run(HandPicked(HALVING, lambda proposal: np.zeros_like(proposal.alive)), replay())


def test_whoever_picks_may_stop():
    def pick(proposal):
        raise Stop

    result = run(HandPicked(HALVING, pick), replay())
    assert result.stopped
    assert (result.chosen == -1).all()
    assert (result.ledger.nfe == 6).all()


def test_more_like_a_candidate_are_its_children_in_the_places_of_the_dropped():
    forks = []

    class World(ReplayEnvironment):
        def fork(self, fork):
            forks.append(fork)
            return np.zeros(fork.parents.shape)

    def pick(proposal):
        keep = np.zeros_like(proposal.alive)
        keep[:, [1, 4]] = True
        more = np.zeros(keep.shape, dtype=np.int64)
        if proposal.step == 1:
            more[:, 4] = 3
        return Picked(keep, more)

    result = run(HandPicked(HALVING, angle=25.0, pick=pick), World(replay().guide))
    (fork,) = forks
    assert fork.step == 1
    assert fork.parents.tolist() == [[4, -1, 4, 4, -1, -1]] * 2
    assert fork.angle[0].tolist() == [25.0, 0, 25.0, 25.0, 0, 0]
    assert (result.ledger.nfe == 6 * 1 + 5 * 2 + 2 * 2).all()  # the children pay for their own calls alone

    def wrong(proposal):
        return Picked(proposal.keep, np.ones(proposal.keep.shape, dtype=np.int64))

    with pytest.raises(ValueError, match="more can be made of candidates that were looked at and go on"):
        run(HandPicked(HALVING, pick=wrong), replay())
