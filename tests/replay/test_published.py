"""The published figures, from the published values; within Monte Carlo error, which each comparison states."""

from __future__ import annotations

import pytest

pytest.importorskip("zarr")
pytest.importorskip("scipy")

from tests.published import VALUES, needs_values
from ttsnap.core.cost import NAMED_COST_MODELS, parse_budgets
from ttsnap.policies import SuccessiveHalving
from ttsnap.recordings.published_values import import_values
from ttsnap.replay import Contender, accounting_of, simulate

pytestmark = needs_values

HALVING = SuccessiveHalving((3, 7, 12), (0.4, 0.4, 0.5))
INCREASE = {  # relative increase in percent: their accounting, every call counted
    "hps": (27.4, 15.3),
    "imr": (30.9, 21.7),
    "pic": (37.3, 26.0),
}


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    folder = tmp_path_factory.mktemp("values")
    return {name: import_values(VALUES, folder / f"{name}.zarr", rewards=[name]) for name in INCREASE}


def simulation(made, accounting, policy=HALVING, budgets="400:4000:200TFLOP", trials=50):
    charge = accounting_of(accounting, NAMED_COST_MODELS["flux-512"])
    return simulate(made, [Contender("TTSnap", policy)], parse_budgets(budgets), charge, trials=trials)


@pytest.mark.parametrize("accounting", ["published", "calls"])
@pytest.mark.parametrize("reward", INCREASE)
def test_relative_increase(values, reward, accounting):
    row = simulation(values[reward], accounting).rows[1][0]
    expected = INCREASE[reward][accounting == "calls"]
    # Their figure is of 50 trials too: four standard errors of the difference of two such means.
    assert abs(row["relative_increase_percent"] - expected) < 4 * 2**0.5 * row["relative_increase_monte_carlo_error"]
    assert row["relative_increase_monte_carlo_error"] < 0.6


def test_the_printed_rewards_at_budget_2000(values):
    row = simulation(values["hps"], "published", budgets="2000TFLOP", trials=400).rows[0][0]
    assert (row["best_of_n_candidates"], row["candidates"]) == (10, 38)
    assert row["best_of_n_reward"] == pytest.approx(29.106, abs=0.0006)  # exact: no Monte Carlo error on our side
    assert row["reward"] == pytest.approx(29.301, abs=0.012)  # four standard errors of their 50 trials


@pytest.mark.slow
def test_three_rewards_by_rank_sum(tmp_path):
    made = import_values(VALUES, tmp_path / "three.zarr", rewards=["imr", "pic", "hps"])
    policy = SuccessiveHalving((5, 7, 12), (0.4, 0.5, 0.6))
    result = simulation(made, "published", policy, "200:4000:200TFLOP")
    at_2000 = {row["reward_name"]: row for row in result.rows[0] if row["budget"] == 2000}
    over_all = {row["reward_name"]: row for row in result.rows[1]}
    for name, best_of_10, snapped, increase in (
        ("imagereward", 1.286, 1.325, 12.71),
        ("pickscore", 21.98, 22.14, 22.98),
        ("hpsv2", 28.84, 29.06, 25.92),
    ):
        row, whole = at_2000[name], over_all[name]
        assert (row["best_of_n_candidates"], row["candidates"]) == (10, 28)
        error = 4 * 2**0.5 * row["monte_carlo_error"] + 0.006  # and their rounding
        assert abs(row["reward"] - snapped) < error
        assert abs(row["best_of_n_reward"] - best_of_10) < error
        assert (
            abs(whole["relative_increase_percent"] - increase)
            < 4 * 2**0.5 * whole["relative_increase_monte_carlo_error"] + 0.5
        )
