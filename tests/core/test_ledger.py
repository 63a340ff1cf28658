"""The ledger: every call and look is charged once, in any order of questions."""

from __future__ import annotations

import numpy as np
import pytest

from ttsnap.core.cost import CostModel, Ledger, LookCost
from ttsnap.core.driver import run
from ttsnap.core.grid import Problem, Query
from ttsnap.policies import BestOfN, SuccessiveHalving
from ttsnap.replay.environment import ReplayEnvironment


def _mask(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=bool)


def test_moves_in_any_order_are_charged_once() -> None:
    ledger = Ledger(Problem(2, 3, 10))
    assert ledger.charge(Query(_mask([1, 1, 1], [1, 1, 0]), 2)).sum() == 5
    assert ledger.charge(Query(_mask([1, 0, 0], [0, 1, 0]), 4)).sum() == 2
    assert ledger.charge(Query(_mask([1, 0, 0], [0, 0, 0]), 4)).sum() == 0  # asking again is free
    assert ledger.charge(Query(_mask([1, 1, 0], [0, 0, 1]), 10)).tolist() == [[True, True, False], [False, False, True]]
    assert ledger.position.tolist() == [[10, 10, 2], [2, 4, 10]]
    assert ledger.nfe.tolist() == [22, 16]
    assert ledger.looks.tolist() == [3 + 1 + 2, 2 + 1 + 1]
    assert ledger.finished.tolist() == [[True, True, False], [False, False, True]]


def test_going_back_in_time_is_refused() -> None:
    ledger = Ledger(Problem(1, 2, 10))
    ledger.charge(Query(_mask([1, 0]), 5))
    with pytest.raises(ValueError, match="already brought further"):
        ledger.charge(Query(_mask([1, 1]), 3))


def test_a_policy_may_reuse_its_mask() -> None:
    ledger = Ledger(Problem(1, 3, 10))
    mask = np.ones((1, 3), dtype=bool)
    ledger.charge(Query(mask, 1))
    mask[0, 0] = False
    ledger.charge(Query(mask, 2))
    assert ledger.position.tolist() == [[1, 2, 2]]


def test_keep_all_costs_best_of_n_plus_its_looks() -> None:
    guide = np.random.default_rng(0).normal(size=(4, 6, 10, 1))
    best = run(BestOfN(), ReplayEnvironment(guide))
    keep_all = run(SuccessiveHalving(rungs=(2, 5), keep=(1.0, 1.0)), ReplayEnvironment(guide))
    assert (keep_all.chosen == best.chosen).all()
    assert (keep_all.ledger.nfe == best.ledger.nfe).all()
    assert (keep_all.ledger.looks == 3 * best.ledger.looks).all()


def test_draws_are_looked_up_in_the_pool() -> None:
    guide = np.random.default_rng(0).normal(size=(3, 20, 8, 2))
    rng = np.random.default_rng(1)
    draws = np.stack([rng.permutation(20)[:7] + 20 * prompt for prompt in (0, 0, 1, 2, 2)])
    policy = SuccessiveHalving(rungs=(2, 5), keep=(0.5, 0.5))
    lazy = run(policy, ReplayEnvironment(guide, draws=draws))
    copied = run(policy, ReplayEnvironment(guide.reshape(60, 8, 2)[draws]))
    assert (lazy.chosen == copied.chosen).all()
    np.testing.assert_array_equal(lazy.rewards, copied.rewards)
    assert (lazy.ledger.nfe == copied.ledger.nfe).all()


def test_a_missing_reward_names_prompt_seed_and_step() -> None:
    guide = np.zeros((2, 3, 4, 1))
    guide[1, 2, 3] = np.nan
    environment = ReplayEnvironment(guide, prompts=["a cat", "a dog"], seeds=np.arange(6).reshape(2, 3) + 10)
    with pytest.raises(ValueError, match="a reward returned nan for prompt 'a dog', seed 15 at step 4 of 4"):
        run(BestOfN(), environment)


def test_calls_of_a_stopped_move_stay_charged() -> None:
    ledger = Ledger(Problem(2, 3, 10))
    ledger.charge(Query(np.ones((2, 3), dtype=bool), 4))
    ledger.amend(_mask([1, 0, 0], [1, 1, 1]), np.array([5, 0]))
    assert ledger.position.tolist() == [[4, 0, 0], [4, 4, 4]]
    assert ledger.nfe.tolist() == [4 + 5, 12]
    assert ledger.looks.tolist() == [1, 3]


def test_what_a_plan_costs_is_what_the_ledger_charges_for_it() -> None:
    early = (LookCost("tiny", 3, 0.25, 0.5),)
    model = CostModel("made up", 3.0, 2.0, 0.5, prompt_tflop=7.0, early=early)
    policy = SuccessiveHalving(rungs=(2, 5), keep=(0.5, 0.5))
    guide = np.random.default_rng(0).normal(size=(3, 8, 10, 1))
    paid = run(policy, ReplayEnvironment(guide)).ledger.cost(model)
    planned = model.of_plan(policy.plan(8, 10), prompts=3)
    for name in ("nfe", "decodes", "looks", "tflop"):
        assert getattr(planned, name) == pytest.approx(getattr(paid, name)), name
    assert (planned.previews, paid.previews) == (24, 24)
    by_hand = 3 * (7 + (8 * 2 + 4 * 3 + 2 * 5) * 3 + 8 * 0.75 + (4 + 2) * 2.5)
    assert paid.tflop == pytest.approx(by_hand)
