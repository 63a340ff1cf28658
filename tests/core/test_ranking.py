"""Ranking: the fast paths agree with sorting, whatever the ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttsnap.core.ranking import RankSum, alive_index, choose, order, ranks, top


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
