"""Config, curriculum, order of images, losses and metrics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("accelerate")
import torch
from scipy.stats import kendalltau

from tests.training.tiny import PROMPTS, config, make_data
from ttsnap.core.ranking import kendall_tau
from ttsnap.training.config import Config, read_config, write_config
from ttsnap.training.curriculum import learning_rate, levels_of
from ttsnap.training.data import Data, batches, open_data, updates_in_level
from ttsnap.training.evaluation import measure, top_select
from ttsnap.training.losses import preference, squared_error


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder, prompts=6, candidates=3)
    return folder


def test_config_round_trip(tmp_path):
    made = Config.of({"tree": "a", "labels": "b", "learning_rate": "1e-5", "levels": "3,1", "normalise": "true"})
    assert (made.learning_rate, made.levels, made.normalise) == (1e-5, (3, 1), True)
    write_config(made, tmp_path / "config.yaml")
    assert Config.of(read_config(tmp_path / "config.yaml")) == made
    assert made.differences(replace(made, batch=2, checkpoint_every=1)) == ["batch"]


BAD = {
    "unknown": ({"speed": 1}, "unknown setting 'speed'; known are tree"),
    "kind": ({"batch": "many"}, "batch takes a whole number, got 'many'"),
    "fraction": ({"batch": 2.5}, "batch takes a whole number, got 2.5"),
    "range": ({"batch": 0}, "batch must be at least 1, got 0"),
    "rate": ({"learning_rate": -1}, "learning_rate must be above 0"),
    "part": ({"warmup": 2}, "warmup is a part of the whole"),
    "choice": ({"schedule": "sine"}, "schedule is one of linear, cosine, exponential, got 'sine'"),
    "nothing": ({"mse": 0}, "nothing to learn"),
    "odd": ({"preference": 1, "batch": 3}, "batch must be even, got 3"),
    "half": ({"eval_tree": "x"}, "belong together"),
    "no tree": ({"tree": None}, "training needs tree"),
    "levels": ({"levels": [0]}, "levels are denoiser calls"),
    "exponential": ({"schedule": "exponential", "floor": 0}, "needs a floor"),
    "tracker": ({"log_with": "paper"}, "log_with takes tensorboard, wandb, got paper"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_setting_is_one_sentence(case):
    values, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        Config.of({"tree": "a", "labels": "b", **values})


def test_data_that_do_not_fit_are_told(folder, tmp_path):
    make_data(tmp_path, prompts=2, candidates=2)
    with pytest.raises(ValueError, match="is not a recording of"):
        Data.open(folder / "tree", tmp_path / "labels", "shapes")
    with pytest.raises(ValueError, match="but not the reward hpsv2"):
        Data.open(folder / "tree", folder / "labels", "hpsv2")
    with pytest.raises(ValueError, match="6 of them cannot be held out"):
        open_data(config(folder, held_out=6))
    with pytest.raises(ValueError, match="has 3 candidates per prompt, not 9"):
        open_data(config(folder, per_prompt=9))
    with pytest.raises(ValueError, match="it needs at least 2"):
        open_data(config(folder, per_prompt=1, preference=1))


def test_held_out_prompts_are_never_trained_on(folder, tmp_path):
    make_data(tmp_path, prompts=2)
    both = {"eval_tree": str(tmp_path / "tree"), "eval_labels": str(tmp_path / "labels")}
    data, test = open_data(config(folder, **both))
    assert [data.tree.prompts[p] for p in data.rows] == list(PROMPTS[2:])
    assert len(test.rows) == 2
    data, test = open_data(config(folder, held_out=2, train_prompts=3, per_prompt=2))
    assert (data.rows.tolist(), test.rows.tolist(), data.targets.shape) == ([0, 1, 2], [4, 5], (3, 2))


def test_levels_go_from_clean_to_noisy(folder):
    tree = Data.open(folder / "tree", folder / "labels", "shapes").tree
    assert [(level.call, level.sigma) for level in levels_of(tree, None)] == [(3, 0.5), (2, 0.75), (1, 1.0)]
    assert [level.call for level in levels_of(tree, (1, 3))] == [3, 1]
    with pytest.raises(ValueError, match="no x0 estimates after call 4; levels can be 1, 2, 3"):
        levels_of(tree, (4,))
    with pytest.raises(ValueError, match="does not tell its noise levels"):
        levels_of(replace(tree, sigmas=(float("nan"),) * 4), None)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
def test_learning_rate(folder, schedule):
    settings = config(folder, learning_rate=1.0, schedule=schedule, warmup=0.1, floor=0.2, level_scale=0.5)
    rates = [learning_rate(settings, 0, update, 100) for update in range(100)]
    assert np.all(np.diff(rates[:11]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)
    assert rates[10] == max(rates) == 1
    assert 0.2 < rates[-1] < 0.22
    assert learning_rate(settings, 2, 50, 100) == pytest.approx(rates[50] / 4)


@pytest.mark.parametrize("changes", [{}, {"preference": 1.0}, {"accumulate": 3}, {"preference": 1.0, "accumulate": 2}])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_image_counts_once_however_work_is_shared(folder, changes, processes):
    settings = config(folder, batch=4, **changes)
    data, _ = open_data(settings)
    shares = [
        list(batches(data, settings, stage=0, call=2, process=process, processes=processes))
        for process in range(processes)
    ]
    assert {len(share) for share in shares} == {updates_in_level(data, settings)}
    parts = [part for share in shares for update in share for part in update]
    counted = np.concatenate([part.targets[part.weights > 0] for part in parts])
    seen = {value: int((counted == value).sum()) for value in data.targets.ravel()}
    assert len(counted) == (24 if settings.pairs else 18)  # of three candidates one is in two pairs
    assert set(seen.values()) == ({1, 2} if settings.pairs else {1})
    for part in parts if settings.pairs else []:
        assert part.prompts[0::2] == part.prompts[1::2]
    later = list(batches(data, settings, stage=0, call=2, first=2, processes=processes))
    for one, other in zip(shares[0][2:], later, strict=True):
        np.testing.assert_array_equal(one[0].images, other[0].images)


def test_losses_by_hand():
    rewards, targets = torch.tensor([1.0, 3.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 5.0, 5.0])
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert squared_error(rewards, targets, weights).item() == 5
    expected = np.log1p(np.exp(-2 / 0.5))
    assert preference(rewards, targets, weights, 0.5).item() == pytest.approx(expected, rel=1e-5)
    assert preference(rewards, targets, torch.ones(4), 0.5).item() == pytest.approx(expected + np.log(2), rel=1e-5)


def test_metrics_against_scipy_and_by_hand():
    rng = np.random.default_rng(0)
    values, targets = rng.integers(0, 5, (9, 12)).astype(float), rng.normal(size=(9, 12))
    expected = [kendalltau(v, t).statistic for v, t in zip(values, targets, strict=True)]
    np.testing.assert_allclose(kendall_tau(values, targets), expected)
    assert np.isnan(kendall_tau(np.ones((1, 4)), targets[:1, :4])).all()
    targets = np.array([[0.0, 1.0, 2.0, 3.0]])
    assert top_select(-targets, targets, 0.5) == (0.0, 2.0)
    assert top_select(-targets, targets, 1.0) == (1.0, 0.0)
    assert top_select(targets, targets, 0.01) == (1.0, 0.0)
    assert measure(np.ones((1, 4)), targets)["kendall_tau"] is None
