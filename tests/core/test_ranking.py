"""Ranking: the fast paths agree with sorting, whatever the ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttsnap.core.ranking import (
    Bound,
    Constrained,
    Minimum,
    RankSum,
    WeightedSum,
    alive_index,
    choose,
    order,
    ranks,
    read_rule,
    said,
    top,
)


@st.composite
def grids(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Values with many ties, and who is alive: equally many per row or not."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    values = rng.integers(0, draw(st.sampled_from([2, 4, 1000])), (rows, width)).astype(float)
    if draw(st.booleans()):
        alive = np.zeros((rows, width), dtype=bool)
        alive[:, : draw(st.integers(1, width))] = True
        alive = rng.permuted(alive, axis=1)
    else:
        alive = rng.random((rows, width)) < 0.6
    return values, alive


def _sorted_candidates(values: np.ndarray, alive: np.ndarray) -> list[int]:
    return sorted(np.flatnonzero(alive).tolist(), key=lambda i: (-values[i], i))


@given(grids(), st.integers(1, 9))
@settings(deadline=None)
def test_top_keeps_the_best_and_ties_go_to_the_lower_index(grid: tuple[np.ndarray, np.ndarray], size: int) -> None:
    values, alive = grid
    observed = np.where(alive, values, np.nan)
    kept = top(observed, alive, size)
    for row in range(len(values)):
        assert set(np.flatnonzero(kept[row])) == set(_sorted_candidates(values[row], alive[row])[:size])


@given(grids())
@settings(deadline=None)
def test_choose_and_order_start_with_the_best(grid: tuple[np.ndarray, np.ndarray]) -> None:
    values, alive = grid
    observed = np.where(alive, values, np.nan)
    for row in range(len(values)):
        expected = _sorted_candidates(values[row], alive[row])
        assert order(observed, alive)[row, : len(expected)].tolist() == expected
        if expected:
            assert choose(observed, alive)[row] == expected[0]


@given(grids())
@settings(deadline=None)
def test_ranks_are_those_of_scipy(grid: tuple[np.ndarray, np.ndarray]) -> None:
    stats = pytest.importorskip("scipy.stats")
    values, alive = grid
    found = ranks(values, alive)
    for row in range(len(values)):
        np.testing.assert_array_equal(found[row, alive[row]], stats.rankdata(values[row, alive[row]]))
        assert np.isnan(found[row, ~alive[row]]).all()


def test_sizes_may_differ_between_prompts() -> None:
    values = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    kept = top(values, np.ones((2, 3), dtype=bool), np.array([1, 2]))
    assert kept.tolist() == [[True, False, False], [False, True, True]]


def test_alive_index_needs_equally_many_in_every_row() -> None:
    assert alive_index(np.array([[True, False], [False, True]])).tolist() == [[0], [3]]
    assert alive_index(np.array([[True, True], [False, False]])) is None
    assert alive_index(np.zeros((2, 2), dtype=bool)) is None


def test_an_alive_candidate_without_a_value_comes_before_the_dead() -> None:
    assert order(np.array([[np.nan, np.nan, 1.0]]), np.array([[False, True, True]]))[0].tolist() == [2, 1, 0]


def test_rank_sum_ranks_among_the_alive_only() -> None:
    rewards = np.array([[[1.0, 9.0], [2.0, 8.0], [3.0, 7.5], [100.0, 0.0]]])
    alive = np.array([[True, True, True, False]])
    combined = RankSum()(rewards, alive)
    assert combined[0, :3].tolist() == [4.0, 4.0, 4.0]
    assert np.isnan(combined[0, 3])


ALL = np.ones((1, 4), dtype=bool)


def test_the_minimum_of_ranks_prefers_the_image_without_a_weak_side() -> None:
    rewards = np.array([[[4.0, 10.0], [3.0, 30.0], [2.0, 40.0], [1.0, 20.0]]])  # ranks 4,1  3,3  2,4  1,2
    assert order(Minimum()(rewards, ALL), ALL)[0].tolist() == [1, 2, 0, 3]
    assert order(RankSum()(rewards, ALL), ALL)[0].tolist() == [1, 2, 0, 3]
    alive = np.array([[True, False, False, True]])  # of two: ranks 2,1 and 1,2
    assert choose(Minimum()(rewards, alive), alive).tolist() == [0]
    assert np.isnan(Minimum()(rewards, alive)[0, 1])
    uneven = np.array([[[1.0, 4.0], [2.0, 2.0], [3.0, 1.0], [4.0, 3.0]]])  # sums 5, 4, 4, 7; least 1, 2, 1, 3
    assert order(Minimum()(uneven, ALL), ALL)[0].tolist() == [3, 1, 0, 2]
    assert order(RankSum()(uneven, ALL), ALL)[0].tolist() == [3, 0, 1, 2]


def test_the_minimum_of_weighted_rewards_needs_one_scale() -> None:
    rewards = np.array([[[0.9, 10.0], [0.5, 60.0], [0.7, 75.0], [0.6, 90.0]]])
    np.testing.assert_allclose(Minimum((1, 0.01))(rewards, ALL), [[0.1, 0.5, 0.7, 0.6]])
    with pytest.raises(ValueError, match="2 rewards need as many weights, got 1"):
        Minimum((1,))(rewards, ALL)


def test_who_keeps_the_bounds_comes_first_and_who_misses_by_less_before_others() -> None:
    rewards = np.array([[[5.0, 0.7], [1.0, 0.8], [2.0, 0.9], [9.0, 0.2]]])
    rule = Constrained((0,), (Bound(1, ">=", 0.8),))
    assert order(rule(rewards, ALL), ALL)[0].tolist() == [2, 1, 0, 3]
    assert rule(rewards, ALL)[0, 1:3].tolist() == [1.0, 2.0]  # the objective itself
    none = Constrained((0,), (Bound(1, ">=", 0.99),))
    assert order(none(rewards, ALL), ALL)[0].tolist() == [2, 1, 0, 3]
    at_most = Constrained((0,), (Bound(1, "<=", 0.75),))
    assert order(at_most(rewards, ALL), ALL)[0].tolist() == [3, 0, 1, 2]
    both = Constrained((0,), (Bound(1, ">=", 0.5), Bound(0, "<=", 4.0)))
    assert order(both(rewards, ALL), ALL)[0].tolist()[:2] == [2, 1]
    dead = np.where(ALL[..., None] & (np.arange(4) != 2)[None, :, None], rewards, np.nan)
    found = rule(dead, np.isfinite(dead[..., 0]))
    assert found[0, 1] == 1.0
    assert np.isnan(found[0, 2])


@given(st.integers(0, 10**6), st.integers(2, 8))
def test_a_rule_that_says_so_orders_two_candidates_the_same_in_any_company(seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(1, width, 2))
    everyone = np.ones((1, width), dtype=bool)
    pair = np.zeros((1, width), dtype=bool)
    pair[0, rng.choice(width, 2, replace=False)] = True
    names = ["a", "b"]
    for text, weights in (("a where b>=.5", None), ("b where a<=0", None), ("minimum", (1, 2)), (None, (1, -1))):
        rule = read_rule(text, names, weights)
        assert rule.is_order(2)
        among = order(rule(rewards, everyone), pair)[0, 0]
        assert choose(rule(rewards, pair), pair)[0] == among
    for text in ("minimum", "rank-sum", "a,b where b>=.5"):
        assert not read_rule(text, names).is_order(2)


def test_rules_are_read_from_words() -> None:
    names = ["hpsv2", "vqascore+run", "m:f"]
    assert read_rule(None, names) == read_rule("rank sum", names) == RankSum()
    assert read_rule(None, names, (1, 2, 3)) == read_rule("weighted-sum", names, (1, 2, 3)) == WeightedSum((1, 2, 3))
    assert read_rule("minimum", names) == Minimum()
    rule = read_rule("hpsv2 where vqascore>=.8 and m:f <= -1e1", names)
    assert rule == Constrained((0,), (Bound(1, ">=", 0.8), Bound(2, "<=", -10.0)))
    assert said(rule, names) == "hpsv2 where vqascore+run>=0.8 and m:f<=-10"
    weighted = read_rule("m:f, hpsv2 where vqascore+run>=.8", names, (1, 30))
    assert weighted == Constrained((2, 0), (Bound(1, ">=", 0.8),), WeightedSum((1, 30)))
    assert (said(RankSum(), names), said(RankSum(), names[:1])) == ("rank sum", "one reward")
    assert said(min, names) == "min"


@pytest.mark.parametrize(
    ("text", "weights", "message"),
    [
        ("best", None, "unknown combine 'best'; it can be rank-sum"),
        ("weighted-sum", None, "weights belong to weighted-sum"),
        ("rank-sum", (1, 2), "weights belong to weighted-sum"),
        (None, (1,), r"2 rewards \(a, b\) need as many weights, got 1"),
        ("a where b>.8", None, "a bound is such as vqascore>=.8 or clipscore<=30, got 'b>.8'"),
        ("a where b>=good", None, "got 'b>=good'"),
        ("a where b>=nan", None, "got 'b>=nan'"),
        ("c where b>=1", None, "combine names the reward 'c'; there is a, b"),
        ("a where c>=1", None, "combine names the reward 'c'; there is a, b"),
        ("a where a>=1", None, "says nothing of the reward b"),
        ("a where b>=1", (1, 2), r"1 rewards \(a\) need as many weights, got 2"),
    ],
)
def test_a_rule_that_cannot_be_is_one_sentence(
    text: str | None, weights: tuple[float, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_rule(text, ["a", "b"], weights)
