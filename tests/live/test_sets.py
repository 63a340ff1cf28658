"""Sets of images that are good and different."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

import ttsnap
from tests.pipelines import tiny
from ttsnap.core.ranking import RankSum
from ttsnap.live import sets
from ttsnap.live.sets import Different
from ttsnap.policies import SuccessiveHalving

OPTIONS = {"num_inference_steps": 4, "height": 32, "width": 32, "max_sequence_length": 12}


def test_the_best_set_maximises_the_quadratic_program(monkeypatch):
    rng = np.random.default_rng(0)
    good, far = rng.normal(size=9), sets.distances(rng.normal(size=(9, 5)))
    assert far[np.triu_indices(9, 1)].mean() == pytest.approx(1.0)

    def value(members, weight):  # the formula, written out
        pairs = sum(far[i, j] for i, j in itertools.combinations(members, 2))
        return sum(good[i] for i in members) + weight * pairs / (len(members) - 1)

    for weight in (0.0, 1.0, 5.0):
        best = sets.best_set(good, far, 4, weight)
        values = {members: value(members, weight) for members in itertools.combinations(range(9), 4)}
        assert value(best, weight) == pytest.approx(max(values.values()))
        monkeypatch.setattr(sets, "MOST", 0)  # by exchanges
        found = sets.best_set(good, far, 4, weight)
        assert value(found, weight) >= value(sets.greedy(good, far, weight)[:4], weight)
        assert value(found, weight) == pytest.approx(max(values.values()), rel=0.05)
        monkeypatch.undo()
    assert sorted(sets.best_set(good, far, 4, 0.0)) == sorted(np.argsort(-good)[:4])


def test_two_of_a_kind_are_not_taken_before_another():
    """Four alike pictures with the highest rewards, and one other: it comes second."""
    pictures = {(0, c): np.full((8, 8, 3), 0.2 + 0.001 * c) for c in range(4)} | {(0, 4): np.full((8, 8, 3), 0.9)}
    rewards = np.array([[[5.0], [4.9], [4.8], [4.7], [4.5]]])
    merge = Different(RankSum(), pictures)
    alive = np.ones((1, 5), dtype=bool)
    assert np.argsort(-merge(rewards, alive)[0]).tolist()[:2] == [0, 4]
    assert merge.choose(0, alive[0], rewards[0, :, 0], 2) == [0, 4]
    alive[0, 4] = False
    assert np.isnan(merge(rewards, alive)[0, 4])
    assert np.argsort(-merge(rewards, alive)[0])[1:3].tolist() != [4, 4]


def test_a_search_returns_a_set_that_differs_more_and_stream_gives_the_same():
    pipe = tiny.flux()
    settings = {"reward": tiny.Redness(), "candidates": 10, "policy": SuccessiveHalving((2,), (0.2,)), **OPTIONS}
    found = ttsnap.search(pipe, "a cat", top=3, different=True, **settings)
    assert found.finished == 3  # not two: a set of three is wanted
    assert found.policy["least"] == 3
    assert found.images[0].reward == max(image.reward for image in found.images)

    # Of all finished images, the set that the formula says.
    finished = ttsnap.search(pipe, "a cat", top=10, **settings | {"policy": "best-of-n"}).images
    rewards = np.array([image.reward for image in finished])
    pixels = [np.asarray(image.image.resize((8, 8), Image.Resampling.BOX), dtype=float).ravel() for image in finished]
    apart = np.array([[np.linalg.norm(one - other) for other in pixels] for one in pixels])
    apart /= apart[np.triu_indices(10, 1)].mean()
    good = (rewards - rewards.mean()) / rewards.std()

    def value(members):
        return good[list(members)].sum() + sum(apart[i, j] for i, j in itertools.combinations(members, 2)) / 2

    best = max(itertools.combinations(range(10), 3), key=value)
    chosen = ttsnap.search(pipe, "a cat", top=3, different=True, **settings | {"policy": "best-of-n"}).images
    assert [image.seed for image in chosen] == [finished[place].seed for place in best]
    session = ttsnap.prepare(pipe, different=3, **settings)
    ((_, streamed),) = session.stream(["a cat"], top=3, previews=False)
    assert [image.seed for image in streamed.images] == [image.seed for image in found.images]


def test_a_policy_that_finishes_too_few_is_refused():
    with pytest.raises(ValueError, match="finishes 1, fewer than the 3 that are to differ; take halving"):
        ttsnap.search(
            tiny.flux(), "a", reward=tiny.Redness(), candidates=6, top=3, different=True, policy="restart", **OPTIONS
        )
