"""Policies at equal cost: what is measured, what is told of it, and what a second run leaves alone."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from ttsnap.core.cost import Budget
from ttsnap.live import comparison as module
from ttsnap.live import leaderboard
from ttsnap.live.comparison import Comparison, ComparisonSettings, Measuring
from ttsnap.live.leaderboard import Pool, Row
from ttsnap.live.session import Session
from ttsnap.live.settings import ModelSettings
from ttsnap.pipelines.conditions import Pictures

PROMPTS = ["a red circle", "a blue square", "a green triangle left of a red circle"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 2)
    monkeypatch.setattr(leaderboard, "BLOCK", 2)


def compared(folder, prompts=PROMPTS, first=0, budgets=("12NFE",), **settings):
    settings = ComparisonSettings(**{"policies": "best-of-n,svdd", "pool": 5, "try_steps": "none"} | settings)
    return Comparison.of(ModelSettings(steps=3), Pictures(), settings, budgets, prompts, first, folder)


def measured(comparison):
    measuring = Measuring(comparison)
    for part in comparison.parts():
        measuring.measure(part)
    return comparison


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 2)
        return measured(compared(tmp_path_factory.mktemp("whole"), draws=2, try_steps="2"))


def test_best_of_n_of_a_pool_is_the_mean_over_all_choices():
    rng = np.random.default_rng(0)
    reward, right = rng.normal(size=(4, 3, 6)), rng.random((4, 3, 6))
    pool = Pool(reward, 5.0, 1.0, 7, {"right": right})
    for n in range(1, 7):
        choices = [list(found) for found in itertools.combinations(range(6), n)]
        best = [reward[..., c].argmax(-1) for c in choices]
        values = [np.take_along_axis(reward[..., c], b[..., None], -1) for c, b in zip(choices, best, strict=True)]
        other = [np.take_along_axis(right[..., c], b[..., None], -1) for c, b in zip(choices, best, strict=True)]
        np.testing.assert_allclose(pool.curves[:, n - 1], np.mean(values, axis=0)[..., 0].mean(1))
        np.testing.assert_allclose(pool.held_out["right"][:, n - 1], np.mean(other, axis=0)[..., 0].mean(1))
    assert pool.cost(3, "TFLOP") == 13
    assert pool.cost(3, "NFE") == 21
    assert [pool.affordable(Budget(amount, "TFLOP")) for amount in (4.9, 5, 8.99, 9, 100)] == [1, 1, 1, 2, 6]
    everybody = np.arange(4)
    assert pool.needed(pool.curves[:, 2].mean(), "TFLOP", everybody) == pytest.approx(13)
    between = pool.curves[:, 1:3].mean()
    assert pool.needed(between, "NFE", everybody) == pytest.approx(2.5 * 7)


def test_all_search_with_the_same_candidates_and_pay_for_what_they_do(whole):
    parts = {(p.contender.policy, p.budget is None, p.contender.steps, p.first, p.draw): p for p in whole.parts()}
    for first, draw in itertools.product((0, 2), (0, 1)):
        pool = whole.read(parts["best-of-n", True, None, first, draw])
        found = whole.read(parts["best-of-n", False, None, first, draw])
        assert found["started"] == 4  # 12 calls, 3 each
        np.testing.assert_allclose(found["reward"], pool["reward"][:, :4].max(1), rtol=1e-5)
        best = pool["reward"][:, :4].argmax(1)
        held_out = np.take_along_axis(pool["held-out shapes-checker"], best[:, None], 1)[:, 0]
        np.testing.assert_allclose(found["held-out shapes-checker"], held_out)
        assert (found["nfe"] == 12).all()
        np.testing.assert_allclose(found["tflop"], 4 * (pool["tflop"] - pool["prompt"]) + pool["prompt"], rtol=1e-3)
        forked = whole.read(parts["svdd", False, None, first, draw])
        assert (forked["nfe"] <= 12).all()
    fewer = whole.read(parts["best-of-n", True, 2, 0, 0])
    assert fewer["steps"] == 2
    assert fewer["tflop"] < whole.read(parts["best-of-n", True, None, 0, 0])["tflop"]


def test_rows_tell_what_was_found(whole):
    rows = leaderboard.rows(whole)
    named = {row.policy: row for row in rows}
    base = named["best-of-N"]
    assert (base.started, base.paid, base.steps, base.multiplier, base.interval) == (4, 12, 3, 1, (1, 1))
    assert set(base.held_out) == {"shapes-checker"}
    same = named["best-of-n"]  # as a contender: with four of the pool's five, not with their mean
    assert same.paid == 12
    low, high = same.interval
    assert low <= same.multiplier <= high
    assert same.value == pytest.approx(base.value, abs=1.5)
    text = "\n".join(leaderboard.table(rows))
    assert "| 12 NFE | svdd |" in text
    assert "12 NFE | -" not in text
    file = leaderboard.save(whole, rows, "ttsnap bench ...")
    data = leaderboard.read(file.parent)
    assert [leaderboard.read_row(row) for row in data["rows"]] == rows
    assert {p.name for p in file.parent.iterdir()} == {"bench.json", "bench.md", "bench.png", "bench.svg", "measured"}
    assert "2 sets of seeds, pool of 5" in (file.parent / "bench.md").read_text()
    assert "| 12 NFE | svdd, 3 steps |" in "\n".join(leaderboard.compare(file, file.parent))


def test_what_was_measured_is_not_measured_again_wherever_the_list_is_cut(whole, monkeypatch):
    monkeypatch.setattr(Measuring, "session", lambda *_: pytest.fail("measured again"))
    measured(whole)
    parts = [
        Comparison(whole.model, whole.pictures, whole.settings, whole.budgets, tuple(some), first, whole.folder)
        for some, first in ((PROMPTS[:2], 0), (PROMPTS[2:], 2))
    ]
    for part in parts:
        measured(part)
    other = compared(whole.folder, policies="svdd,restart", draws=2, try_steps="2")
    left = [part for part in other.parts() if not other.file(part).is_file()]
    assert {part.contender.policy for part in left} == {"restart"}
    elsewhere = compared(whole.folder, [*PROMPTS[:2], "a blue circle"], draws=2, try_steps="2")
    assert {part.first for part in elsewhere.parts() if not elsewhere.file(part).is_file()} == {2}


def test_best_of_n_is_tried_with_fewer_steps_too_unless_told_otherwise(tmp_path, monkeypatch):
    own = ComparisonSettings(policies="all,svdd@8")
    assert [(who.policy, who.steps) for who in own.contenders()[-2:]] == [("rbf", None), ("svdd", 8)]
    assert [who.steps for who in own.plain(20)] == [None, 8, 12]
    assert [who.steps for who in own.plain(1)] == [None]
    assert [who.share for who in own.plain(None)] == [None, 0.4, 0.6]
    monkeypatch.setattr(Comparison, "plain", lambda self: self.settings.plain(None))  # as of a model that is not known
    found = measured(compared(tmp_path, PROMPTS[:1], policies="best-of-n", try_steps="34%", budgets=("2NFE",)))
    assert [found.read(part)["steps"] for part in found.parts()[:2]] == [3, 1]
    monkeypatch.setattr(Session, "with_steps", refuse)
    found = measured(compared(tmp_path, PROMPTS[:1], policies="best-of-n", try_steps="67%", budgets=("3NFE",)))
    assert "impossible" in found.read(found.parts()[1])
    assert [row.policy for row in leaderboard.rows(found)] == ["best-of-N", "best-of-n"]


def refuse(session, steps):
    raise ValueError("it takes no other number of steps")


def test_a_policy_that_the_budget_does_not_pay_for_is_left_out(tmp_path):
    found = measured(compared(tmp_path, PROMPTS[:1], budgets=("2NFE",), policies="best-of-n@2,best-of-n@3"))
    assert [(row.policy, row.steps) for row in leaderboard.rows(found)] == [("best-of-N", 3), ("best-of-n", 2)]
    (why,) = leaderboard.left_out(found)
    assert "best-of-n at 2 NFE: budget 2 NFE is too small" in why


@pytest.mark.parametrize(
    ("settings", "budgets", "told"),
    [
        ({"policies": "magic"}, ("9NFE",), "unknown policy 'magic'"),
        ({"policies": "svdd@x"}, ("9NFE",), "such as svdd@8"),
        ({"policies": ""}, ("9NFE",), "needs --policies"),
        ({}, (), "needs --policies"),
        ({}, ("3s",), "seconds depend on"),
        ({}, ("9NFE", "1TFLOP"), "all alike"),
        ({"try_steps": "a"}, ("9NFE",), "--try-steps"),
        ({"try_steps": "40%,120%"}, ("9NFE",), "between 0 and 100 %"),
        ({"pool": 1}, ("9NFE",), "pool"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(tmp_path, settings, budgets, told):
    with pytest.raises(ValueError, match=told):
        compared(tmp_path, budgets=budgets, **settings)


def test_two_benches_without_a_row_in_common(tmp_path):
    for name, policy in (("one", "svdd"), ("two", "rbf")):
        (tmp_path / name).mkdir()
        row = Row(policy, None, None, 20, "18 GFLOP", 4, 1.0, 1.0, (0, 2), {}, 1.0, (1, 2))
        (tmp_path / name / "bench.json").write_text(json.dumps({"rows": [vars(row)]}))
    with pytest.raises(ValueError, match="no policy and budget in common"):
        leaderboard.compare(tmp_path / "one", tmp_path / "two")
    with pytest.raises(ValueError, match="is no bench"):
        leaderboard.read(tmp_path)
