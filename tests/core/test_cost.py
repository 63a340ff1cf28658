from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttsnap.core.cost import Budget, CostModel, Seconds, affordable, parse_budgets
from ttsnap.policies import BestOfN, SuccessiveHalving

MODEL = CostModel("test", call_tflop=9.9, decode_tflop=0.5, look_tflop=0.7, prompt_tflop=1.0)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("200NFE", 200, "NFE"),
        ("2000TFLOP", 2000, "TFLOP"),
        ("30s", 30, "s"),
        ("1.5 min", 90, "s"),
        ("50gflops", 0.05, "TFLOP"),
    ],
)
def test_budgets_are_read(text, amount, unit):
    budget = Budget.parse(text)
    assert (pytest.approx(budget.amount), budget.unit) == (amount, unit)


@pytest.mark.parametrize("text", ["200", "NFE", "-3s", "0s", "3 parsecs", "", "1e999TFLOP"])
def test_bad_budgets_are_refused(text):
    with pytest.raises(ValueError, match="budget"):
        Budget.parse(text)


def test_budgets_are_one_several_or_a_range():
    assert parse_budgets("2000TFLOP") == [Budget(2000, "TFLOP")]
    assert parse_budgets("60NFE, 20NFE") == [Budget(20, "NFE"), Budget(60, "NFE")]
    assert parse_budgets("400:4000:200TFLOP") == [Budget(amount, "TFLOP") for amount in range(400, 4001, 200)]
    assert parse_budgets("0.1:0.3:0.1s") == [Budget(pytest.approx(amount), "s") for amount in (0.1, 0.2, 0.3)]
    assert parse_budgets("500GFLOP:2TFLOP:500GFLOP") == [Budget(amount, "TFLOP") for amount in (0.5, 1.0, 1.5, 2.0)]


@pytest.mark.parametrize("text", ["", "1:2", "1:2:3:4NFE", "1:2:0NFE", "9:2:1NFE", "1:2:3", "2NFE,3s", "1NFE:9s:1s"])
def test_bad_ranges_of_budgets_are_refused(text):
    with pytest.raises(ValueError, match="budget"):
        parse_budgets(text)


@given(st.floats(250, 1e5), st.sampled_from([BestOfN(), SuccessiveHalving(), SuccessiveHalving((4,), sizes=(2,))]))
def test_the_largest_number_that_fits_is_found(amount, policy):
    n = affordable(policy, Budget(amount, "TFLOP"), MODEL, 20)
    assert MODEL.of_plan(policy.plan(n, 20)).tflop <= amount
    assert MODEL.of_plan(policy.plan(n + 1, 20)).tflop > amount


@pytest.mark.parametrize("unit", ["NFE", "TFLOP", "s"])
def test_a_budget_too_small_names_the_smallest_that_works(unit):
    model = CostModel("t", 9.9, 0.5, 0.7, 1.0, Seconds(0.1, 0.013), Seconds(0, 0.1), Seconds(0.1, 0))
    with pytest.raises(ValueError, match="too small for one image") as caught:
        affordable(SuccessiveHalving(), Budget(0.1, unit), model, 20)
    named = Budget.parse(str(caught.value).split()[-1])
    assert affordable(SuccessiveHalving(), named, model, 20) == 1


def test_seconds_need_a_calibration():
    with pytest.raises(ValueError, match="calibrated"):
        affordable(BestOfN(), Budget(10, "s"), MODEL, 20)
