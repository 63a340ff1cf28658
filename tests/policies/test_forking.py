"""Policies that fork, against cases computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ttsnap import policies
from ttsnap.core.driver import run
from ttsnap.core.grid import Fork, Problem, Query
from ttsnap.policies import (
    BestFirst,
    Branching,
    Evolution,
    Restart,
    Rollover,
    SearchOverPaths,
    Steering,
    SuccessiveHalving,
    UntilGood,
    ZeroOrder,
)
from ttsnap.policies.places import RESAMPLING, placed, systematic
from ttsnap.replay.environment import ReplayEnvironment


def sizes(plan):
    """Steps and sizes of rungs, none of them drafts."""
    assert not any(rung.draft for rung in plan)
    return tuple((rung.step, rung.size) for rung in plan)


def asked(policy, rewards, steps=5):
    """What a policy asks of one prompt, given the rewards [candidates] at each look in turn."""
    problem, answers, seen = Problem(1, len(rewards[0]), steps), iter(rewards), []
    search = policy.search(problem, np.random.default_rng(0))
    answer = None
    while True:
        try:
            query = next(search) if answer is None else search.send(answer)
        except StopIteration:
            return seen
        if isinstance(query, Fork):
            more = [query.back] * bool(query.back) + [query.band] * bool(query.band)
            seen.append(("fork", query.step, query.parents[0].tolist(), query.angle[0].tolist(), *more))
            answer = np.full(problem[:2], np.nan)
        else:
            seen.append((query.step, np.flatnonzero(query.mask[0]).tolist()))
            answer = np.where(query.mask, np.array([next(answers)], dtype=float), np.nan)


def test_a_beam_keeps_the_best_and_fills_their_children_in():
    policy = Branching((1, 3), keep=(0.4, 0.2), grow=(0.8, 0.2), angle=30.0)
    found = asked(policy, [[1, 5, 2, 4, 3], [7, 1, 9, 8, 0], [0] * 5])
    assert found == [
        (1, [0, 1, 2, 3, 4]),
        ("fork", 1, [1, -1, 3, -1, -1], [30, 0, 30, 0, 0]),  # of 1 and 3, the best first, in free places from the left
        (3, [0, 1, 2, 3]),
        (5, [2]),
    ]


def test_families_each_keep_their_best():
    policy = Branching((1, 3), keep=(0.5, 0.5), grow=(1.0, 0.5), families=True)
    found = asked(policy, [[4, 3, 2, 1], [6, 1, 5, 2], [0] * 4])
    assert found[1][2] == [-1, -1, 0, 1]
    # 2 is a child of 0: of the family {0, 2} only 0 goes on, though 2 beats all of {1, 3}
    assert found[3] == (5, [0, 3])


def test_zero_order_search_goes_where_it_is_better():
    """Eight places: a pivot, three neighbours, their twins, the best so far."""
    found = asked(
        ZeroOrder(rounds=2, look=3, angle=20.0), [[0] * 8, [0, 0, 0, 0, 1, 5, 2, 0], [0, 0, 0, 0, 3, 4, 4, 0], [0] * 8]
    )
    none = [0.0] * 8
    assert found == [
        (1, [0]),
        ("fork", 1, [-1, 0, 0, 0, -1, -1, -1, -1], [0, 20, 20, 20, 0, 0, 0, 0]),
        ("fork", 1, [-1, -1, -1, -1, 1, 2, 3, -1], none),
        (3, [4, 5, 6]),
        ("fork", 3, [-1] * 7 + [5], none),  # the second twin is the best so far,
        ("fork", 1, [2] + [-1] * 7, none),  # and its neighbour the next pivot
        ("fork", 1, [-1, 0, 0, 0, -1, -1, -1, -1], [0, 20, 20, 20, 0, 0, 0, 0]),
        ("fork", 1, [-1, -1, -1, -1, 1, 2, 3, -1], none),
        (3, [4, 5, 6]),  # none of them beats 5
        (5, [7]),
    ]
    explored = asked(ZeroOrder(rounds=1, look=3, explore=1.0), [[0] * 8] * 3)
    assert explored[1][3] == [0, 90, 90, 90, 0, 0, 0, 0]
    assert sizes(ZeroOrder(rounds=3).plan(8, 20)) == ((1, 1), (8, 9), (20, 1))


def test_paths_go_back_and_further_ahead():
    """Two paths of two children each: four calls ahead, two back, of twelve."""
    policy = SearchOverPaths(children=2, ahead=0.34, back=0.17)
    found = asked(policy, [[1, 2] + [0] * 2, [3, 9, 8, 1], [4, 5, 6, 7], [9, 0, 8, 0], [0] * 4], steps=12)
    assert sizes(policy.plan(4, 12)[:3]) == ((4, 2), (2, 0), (6, 4))
    assert np.isnan(found[1][3]).all()  # as the forward process adds noise
    assert [entry[:3] + entry[4:] for entry in found] == [
        (4, [0, 1]),
        ("fork", 4, [0, 0, 1, 1], 2),
        (6, [0, 1, 2, 3]),
        ("fork", 6, [1, 1, 2, 2], 2),  # of the best two, the better first
        (8, [0, 1, 2, 3]),
        ("fork", 8, [3, 3, 2, 2], 2),
        (10, [0, 1, 2, 3]),
        (12, [0, 2]),
    ]


def test_a_restart_goes_on_with_the_best_of_child_and_parent():
    policy = Restart(step=5, back=0.2, rounds=2, width=0.5)
    found = asked(policy, [[1, 2, 9, 3], [9, 4, 8, 0], [9, 11, 5, 0], [0] * 4], steps=10)
    assert [entry[:3] + entry[4:] for entry in found] == [
        (5, [0, 1, 2, 3]),
        ("fork", 5, [2, -1, -1, -1]),  # the best takes the first place,
        ("fork", 5, [-1, 0, 0, -1], 2),  # and has two children two calls before it
        (5, [0, 1, 2]),  # none of them is better
        ("fork", 5, [-1, 0, 0, -1], 2),
        (5, [0, 1, 2]),
        (10, [1]),
    ]
    assert sizes(policy.plan(4, 10)) == ((5, 4), (3, 0), (5, 2), (3, 0), (5, 2), (10, 1))


def test_a_population_evolves():
    """Three noises, three twins that are judged, and the fittest twin."""
    policy = Evolution((1, 2), look=4, elite=0.34, angle=20.0, band=(0.0, 0.5))
    found = asked(policy, [[0] * 7, [0, 0, 0, 5, 9, 7, 0], [0] * 7, [0, 0, 0, 6, 8, 7, 0], [0] * 7], steps=6)
    winners = np.random.default_rng(0).integers(3, size=(2, 2))
    fitness = np.array([5, 9, 7])
    winners = np.where(fitness[winners[0]] >= fitness[winners[1]], winners[0], winners[1]).tolist()
    none = [0.0] * 7
    assert found == [
        (1, [0, 1, 2]),
        ("fork", 1, [-1, -1, -1, 0, 1, 2, -1], none),
        (4, [3, 4, 5]),
        ("fork", 4, [-1] * 6 + [4], none),
        ("fork", 1, [winners[1], -1, winners[0]] + [-1] * 4, [20.0, 0, 20.0] + [0] * 4, (0.0, 0.5)),  # 1 is the elite
        (2, [0, 1, 2]),
        ("fork", 2, [-1, -1, -1, 0, 1, 2, -1], none),
        (4, [3, 4, 5]),  # nobody beats 9
        (6, [6]),
    ]


def test_what_a_stage_saves_the_next_may_spend():
    policy = Rollover((1, 2, 3), first=0.4, angle=30.0)
    rows = [[2, 1] + [0] * 4, [0, 3] + [0] * 4, [0, 1] + [0] * 4, [0, 2] + [0] * 4, [0, 1.5] + [0] * 4, [0] * 6]
    found = asked(policy, rows, steps=5)
    assert sizes(policy.plan(6, 5)) == ((1, 2), (2, 2), (3, 2), (5, 1))
    try_again = ("fork", 2, [-1, 0, -1, -1, -1, -1], [0, 30.0, 0, 0, 0, 0])
    assert found[0] == (1, [0, 1])
    assert [entry for entry in found if entry[0] != "fork"] == [
        (1, [0, 1]),
        (2, [1]),  # 3 beats 2 at the first try: one is left
        *[(3, [1])] * 3,  # so the next stage has three, of which none beats 3
        (5, [0]),
    ]
    assert found.count(try_again) == 3
    assert [entry[2] for entry in found if entry[0] == "fork" and entry[1] == 3] == [
        [-1, -1, 1, -1, -1, -1],
        [-1, -1, 1, -1, -1, -1],  # 2 after 1; 1.5 is no better
        [2, -1, -1, -1, -1, -1],
    ]


def test_best_first_takes_up_an_earlier_one_when_it_is_disappointed():
    policy = BestFirst((1, 3), share=0.75)  # 15 of 20 calls: 4, and 11 more
    found = asked(policy, [[5, 9, 7, 1], [0, 6, 0, 0], [0, 0, 8, 0], [0, 0, 8, 0], [0, 6, 0, 0], [0] * 4], steps=5)
    assert found == [(1, [0, 1, 2, 3]), (3, [1]), (3, [2]), (5, [2]), (5, [1])]


def test_the_default_looks_late_where_there_are_few_steps():
    assert sizes(policies.default_policy(20).plan(32, 20)) == ((3, 32), (7, 13), (12, 5), (20, 2))
    assert sizes(policies.default_policy(9).plan(32, 9)) == ((1, 32), (3, 13), (5, 5), (9, 2))
    assert sizes(policies.default_policy(8).plan(32, 8)) == ((4, 32), (6, 16), (8, 6))
    assert sizes(policies.default_policy(4).plan(8, 4)) == ((2, 8), (3, 4), (4, 2))
    assert sizes(policies.default_policy(2).plan(8, 2)) == ((1, 8), (2, 4))
    assert sizes(policies.default_policy(1).plan(8, 1)) == ((1, 8),)


def test_until_good_searches_groups_by_another_policy():
    halving = SuccessiveHalving((1,), sizes=(1,))
    policy = UntilGood(stop_at=4.0, group=3, inner=halving)
    found = asked(policy, [[1, 3, 2] + [0] * 3, [0, 3.5] + [0] * 4, [0] * 3 + [2, 1, 0], [0] * 3 + [5, 0, 0]])
    assert found == [(1, [0, 1, 2]), (5, [1]), (1, [3, 4, 5]), (5, [3])]
    assert sizes(policy.plan(6, 5)) == ((1, 3), (5, 1), (0, 0), (1, 3), (5, 1))


def test_a_rung_may_be_a_share_of_the_steps():
    halving = SuccessiveHalving((0.25, 0.5), keep=(0.5, 0.5))
    assert sizes(halving.plan(8, 20)) == ((5, 8), (10, 4), (20, 2))
    assert sizes(halving.plan(8, 3)) == ((1, 8), (2, 4), (3, 2))
    with pytest.raises(ValueError, match="whole numbers of at least 1, or all shares between 0 and 1"):
        SuccessiveHalving((0.25, 3), keep=(0.5, 0.5))
    assert policies.named("psp") == halving
    for name in policies.PRESETS:
        assert policies.named(name).plan(16, 20)[-1].step == 20


def test_steering_weighs_by_its_potential():
    first, second = np.array([[0.0, 1.0, 2.0]]), np.array([[2.0, 1.0, 1.0]])
    spread = second.std()
    for potential, value in (("max", [2, 1, 2]), ("sum", [2, 2, 3]), ("difference", [2, 0, -1])):
        weights = Steering(strength=1.5, potential=potential)._weights([first, second])
        expected = np.exp(1.5 * np.array([value]) / spread)
        np.testing.assert_allclose(weights, expected / expected.sum())


def test_systematic_resampling_draws_as_often_as_the_weights_say():
    weights = np.array([[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]])
    drawn = [systematic(weights, np.random.default_rng(seed)) for seed in range(400)]
    assert all((times.sum(axis=1) == 4).all() for times in drawn)
    assert all(times[0].tolist() == [2, 1, 1, 0] for times in drawn)
    np.testing.assert_allclose(np.mean(drawn, axis=0)[1], 4 * weights[1], atol=0.1)
    for name, resample in RESAMPLING.items():
        drawn = [resample(weights, np.random.default_rng(seed)) for seed in range(2000)]
        assert all((times.sum(axis=1) == 4).all() for times in drawn), name
        np.testing.assert_allclose(np.mean(drawn, axis=0), 4 * weights, atol=0.1, err_msg=name)
    assert all(
        times[0].tolist() == [2, 1, 1, 0] for times in [RESAMPLING["residual"](weights, np.random.default_rng(0))]
    )
    assert placed(np.array([[2, 0, 0, 2]]), 3, 20.0).parents.tolist() == [[-1, 0, 3, -1]]


def test_until_good_stops_for_each_prompt_alone():
    guide = np.zeros((3, 6, 5, 1))
    guide[0, :, -1, 0] = [1, 9, 0, 0, 0, 0]
    guide[1, :, -1, 0] = [1, 2, 3, 4, 5, 6]
    guide[2, :, -1, 0] = [0, 0, 0, 0, 0, 1]
    result = run(UntilGood(stop_at=4.0, group=2), ReplayEnvironment(guide))
    assert result.ledger.nfe.tolist() == [2 * 5, 4 * 5, 6 * 5]
    assert result.chosen.tolist() == [1, 3, 5]
    with pytest.raises(ValueError, match="needs a reward to stop at"):
        policies.named("until-good")
    assert policies.from_dict({"policy": "until-good", "stop_at": 4.0, "group": 2}) == UntilGood(4.0, 2)


def test_replay_refuses_what_it_cannot_know():
    guide = np.random.default_rng(0).normal(size=(1, 6, 5, 1))
    with pytest.raises(ValueError, match="forks candidates, which no recording holds; run it live"):
        run(Branching((1, 2), keep=(0.3, 0.2), grow=(1.0, 0.2)), ReplayEnvironment(guide))


def test_bad_hyperparameters_are_refused():
    for options, told in (
        ({"keep": (0.5,)}, "keep takes 3 shares"),
        ({"grow": (0.05,) * 3}, "grow must be at least keep"),
        ({"angle": (1.0, 2.0)}, "angle takes one number or 3"),
    ):
        with pytest.raises(ValueError, match=told):
            Branching(**options)
    with pytest.raises(ValueError, match="a potential is max, difference, sum, got 'min'"):
        Steering(potential="min")
    with pytest.raises(ValueError, match="must lie below the 5 steps"):
        Branching(rungs=(2, 5), keep=(0.5, 0.5), grow=(0.5, 0.5)).plan(4, 5)
    assert isinstance(policies.named("steering"), Steering)


def test_without_rungs_they_are_shares_of_the_steps():
    assert [rung.step for rung in Steering().plan(4, 20)] == [3, 6, 9, 12, 20]
    assert sizes(Branching().plan(40, 28)) == ((6, 40), (11, 16), (17, 12), (28, 3))
    assert sizes(Branching().plan(40, 3)) == ((1, 40), (2, 12), (3, 3))
    assert [rung.step for rung in Branching().plan(1, 20)] == [20]


def test_the_driver_knows_where_children_stand_and_what_they_cost():
    class Forks:
        """Two start; the first of them has a child in the second's place, and the child is finished."""

        def search(self, problem, rng):
            rewards = yield Query(np.array([[True, True]]), 2)
            assert rewards.tolist() == [[3.0, 1.0]]
            yield Fork(np.array([[-1, 0]]), 2, np.array([[0.0, 30.0]]))
            again = yield Query(np.array([[False, True]]), 2)  # nothing is advanced or looked at again
            assert again[0, 1] == 3.0
            yield Query(np.array([[False, True]]), 5)

        def plan(self, num_candidates, num_steps):
            return ()

    class World(ReplayEnvironment):
        def fork(self, fork):
            return np.zeros((1, 2))

    guide = np.zeros((1, 2, 5, 1))
    guide[0, :, 1, 0] = [3.0, 1.0]
    result = run(Forks(), World(guide))
    ledger = result.ledger
    assert ledger.position.tolist() == [[2, 5]]
    assert ledger.nfe.tolist() == [2 + 2 + 3]
    assert ledger.looks.tolist() == [3]
    assert ledger.finished.tolist() == [[False, True]]
    for fork, told in (
        (Fork(np.array([[-1, 0]]), 3, np.zeros((1, 2))), "parent that does not stand there"),
        (Fork(np.array([[-1, 0]]), 2, np.zeros((1, 2))), "place of a finished image"),
        (Fork(np.array([[-1, 0]]), 5, np.zeros((1, 2))), "step must be in 1..4"),
        (Fork(np.array([[2, -1]]), 2, np.zeros((1, 2))), "parents among its candidates"),
    ):
        with pytest.raises(ValueError, match=told):
            ledger.fork(fork)
