import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy")

from ttsnap.replay.statistics import (
    best_of_n,
    best_of_n_weights,
    candidates_to_reach,
    interval,
    rank_correlation,
    relative_increase,
    resample,
)


@given(pool=st.integers(1, 7), seed=st.integers(0, 1000), ties=st.booleans())
@settings(max_examples=40, deadline=None)
def test_best_of_n_is_the_mean_over_all_draws(pool, seed, ties):
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 3, size=(2, pool, 1)).astype(float) if ties else rng.normal(size=(2, pool, 1))
    sizes = np.arange(1, pool + 1)
    expected = [
        np.mean([rewards[:, draw].max(axis=1) for draw in itertools.combinations(range(pool), size)], axis=0)
        for size in sizes
    ]
    np.testing.assert_allclose(best_of_n(rewards, sizes), expected)


def test_best_of_n_of_several_rewards_is_decided_by_one_number():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(1, 6, 2))
    chosen_by = rewards @ [1.0, 0.5]
    pairs = [pair[int(np.argmax(chosen_by[0, list(pair)]))] for pair in itertools.combinations(range(6), 2)]
    np.testing.assert_allclose(best_of_n(rewards, np.array([2]), chosen_by)[0, 0], rewards[0, pairs].mean(axis=0))


def test_best_of_n_needs_a_size_within_the_pool():
    assert best_of_n_weights(5000, np.array([2500])).sum() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"needs N in 1\.\.5"):
        best_of_n_weights(5, np.array([6]))


def test_relative_increase_is_the_ratio_of_areas():
    budgets = np.array([1.0, 2.0, 3.0])
    baseline = np.array([0.0, 1.0, 2.0])
    assert relative_increase(budgets, baseline, baseline) == 0
    assert relative_increase(budgets, 1.5 * baseline, baseline) == pytest.approx(50)
    assert np.isnan(relative_increase(budgets[:1], baseline[:1], baseline[:1]))


def test_candidates_to_reach_lies_between_the_points_of_the_curve():
    sizes, curve = np.array([1, 2, 4]), np.array([0.0, 1.0, 2.0])
    np.testing.assert_allclose(
        candidates_to_reach(np.array([-1, 0.5, 1.5, 2, 2.1]), sizes, curve), [1, 1.5, 3, 4, np.inf]
    )


def test_the_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        sample = rng.normal(size=80)
        low, high = interval(resample(80, 400, rng) @ sample)
        hits += low <= 0 <= high
    assert 0.90 < hits / 300 < 0.98


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(1)
    target = rng.normal(size=(3, 20))
    guide = target[..., None] + rng.normal(size=(3, 20, 4)) * [0, 0.5, 1, 5]
    expected = [[spearmanr(guide[p, :, s], target[p]).statistic for s in range(4)] for p in range(3)]
    np.testing.assert_allclose(rank_correlation(guide, target), expected)
    assert (rank_correlation(np.zeros((3, 20, 1)), target) == 0).all()
