"""Tuning finds what is there, reports it on other prompts, and says when nothing is there."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("zarr")
pytest.importorskip("optuna")

from tests.published import VALUES, needs_values
from tests.replay.synthetic import recording, rewards
from ttsnap import policies
from ttsnap.core.cost import NAMED_COST_MODELS, Budget, CostModel, parse_budgets
from ttsnap.policies import BestOfN, SuccessiveHalving
from ttsnap.recordings.published_values import import_values
from ttsnap.replay import Contender, accounting_of, fitting, simulate, tuning
from ttsnap.replay.accounting import EveryCall
from ttsnap.replay.tuning import tune

MODEL = CostModel("made up", call_tflop=1.0, decode_tflop=0.1, look_tflop=0.1)
CHARGE = EveryCall(MODEL)
RANGE = parse_budgets("20:80:20TFLOP")
ONE = [Budget(50, "TFLOP")]


def quick(made, budgets=RANGE, **options):
    return tune(made, budgets, CHARGE, **({"trials": 120, "folds": 2} | options))


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """Schedules are judged on a quarter of the draws: what is looked for here is plain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "MOST_REPEATS", 16)
        yield


@pytest.fixture(scope="module")
def informative(tmp_path_factory):
    return recording(tmp_path_factory.mktemp("tuning") / "informative", prompts=20, noise=0.5)


@pytest.fixture(scope="module")
def tuned(informative):
    return quick(informative)


def test_where_looks_tell_halving_wins(tuned):
    assert tuned.better
    assert isinstance(tuned.policy, SuccessiveHalving)
    over_all = tuned.figures["over_all"][0]
    assert over_all["relative_increase_ci95"][0] > 20
    assert over_all["compute_multiplier"] > 1.3
    assert "relative increase over best-of-N on held-out prompts" in tuned.sentence


def test_one_budget_may_have_sizes_and_beats_the_default(informative):
    tuned = quick(informative, ONE, trials=480)
    row = tuned.figures["budgets"][0]
    assert tuned.better
    assert row["gain_ci95"][0] > 0
    assert row["tflop"] <= 50
    default = simulate(informative, [Contender("default", policies.default_policy(8))], ONE, CHARGE, trials=50)
    assert row["reward"] > default.rows[0][0]["reward"]


@pytest.mark.parametrize("budgets", [RANGE, ONE], ids=["range", "one"])
def test_where_looks_are_noise_best_of_n_is_returned_and_said(tmp_path, budgets):
    noise = np.random.default_rng(0).normal(size=(20, 40, 8, 1)).astype(np.float32)
    tuned = quick(recording(tmp_path / "noise", noise), budgets)
    assert not tuned.better
    assert tuned.policy == BestOfN()
    assert tuned.sentence.startswith("no schedule is better than best-of-N beyond its interval")


def at_odds(path, first, prompts=20):
    """Looks at step 2 are right on the first prompts and wrong on the others; at step 4 the other way round."""
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(prompts, 40, 8, 1)).astype(np.float32)
    sign = np.where(np.isin(np.arange(prompts), first), 1, -1)[:, None, None]
    clean[:, :, 1] = sign * clean[:, :, -1]
    clean[:, :, 3] = -sign * clean[:, :, -1]
    return recording(path, clean)


def test_the_report_is_of_prompts_not_fitted_on(tmp_path):
    made = at_odds(tmp_path / "odds", range(10))
    tuned = quick(made, fit=range(10), test=range(10, 20))
    assert tuned.folds[0].gain > 20
    assert tuned.figures["over_all"][0]["relative_increase_percent"] < -20
    assert tuned.policy == BestOfN()
    assert list(tuned.held_out.dataset.prompt.values) == [f"prompt {i}" for i in range(10, 20)]


def test_every_fold_is_reported_by_the_schedule_of_the_other(tmp_path, informative):
    (_, first), *_ = tuning._splits(informative, 2, None, None, seed=3)
    made = at_odds(tmp_path / "odds", first)
    tuned = quick(made, seed=3)
    assert all(fold.gain > 20 for fold in tuned.folds)
    assert tuned.figures["over_all"][0]["relative_increase_ci95"][1] < -20
    assert not tuned.better


def test_held_out_figures_are_what_simulate_says(tuned, informative):
    tested = np.concatenate([fold.test for fold in tuned.folds])
    assert sorted(tested) == list(range(20))
    for fold in tuned.folds:
        assert not set(fold.fit) & set(fold.test)
        alone = simulate(informative, [Contender("x", fold.policy)], RANGE, CHARGE, prompts=fold.test)
        rows = np.isin(tested, fold.test)
        np.testing.assert_allclose(tuned.held_out.dataset.value[..., rows, :], alone.dataset.value)


def test_the_same_seed_gives_the_same_result_on_any_number_of_threads(informative):
    def comparable(**options):
        data = quick(informative, ONE, trials=50, **options).to_dict()
        return json.dumps(data | {"provenance": data["provenance"] | {"seconds": None}})

    one = comparable()
    assert comparable(threads=1) == one
    assert comparable(seed=1) != one


def test_a_policy_file_is_read_with_its_notes(tuned, tmp_path):
    path = tmp_path / "deep" / "tuned.json"
    tuned.save(path)
    assert policies.load(path) == tuned.policy
    _, notes = policies.load_with_notes(path)
    assert notes == json.loads(json.dumps({"provenance": tuned.provenance, "held_out": tuned.figures}))
    assert notes["provenance"]["policy_fitted_on"] == "all recorded prompts"
    assert notes["provenance"]["schedules_tried"] > 50
    assert [p.name for p in path.parent.iterdir()] == ["tuned.json"]
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"extra": 1}))
    with pytest.raises(ValueError, match="policy halving has no extra"):
        policies.load(path)
    with pytest.raises(ValueError, match="notes on provenance, held_out, by_budget, not advice"):
        policies.save(tuned.policy, path, advice="none")


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"weights": (1.0, 0.5)},
        {"combine": "minimum", "weights": (1.0, 1.0)},
        {"combine": "reward0 where reward1>=0"},
    ],
)
def test_several_rewards_by_any_rule(tmp_path, rule):
    made = recording(tmp_path / "two", rewards(20, 40, kinds=2, noise=0.3))
    tuned = quick(made, ONE, trials=40, **rule)
    assert [row["reward_name"] for row in tuned.figures["budgets"]] == ["reward0", "reward1"]
    assert tuned.better


def test_a_schedule_may_not_miss_a_bound_more_than_best_of_n_does(tmp_path, monkeypatch):
    both = rewards(20, 40, kinds=2, noise=0.3)
    both[..., :-1, 1] = 9.0  # early looks promise that any bound is kept
    made, rule = recording(tmp_path / "two", both), "reward0 where reward1>=0.5"
    assert quick(made, ONE, combine=rule, trials=40).policy == BestOfN()
    monkeypatch.setattr(fitting, "MISSED", np.inf)
    lax = quick(made, ONE, combine=rule, trials=40)
    assert lax.provenance["combine"] == rule
    assert [row["gain"] > 0 for row in lax.figures["budgets"]] == [True, False]


def test_the_guide_matters(tmp_path):
    clean = rewards(20, 40, noise=3.0)
    made = recording(tmp_path / "aware", clean, rewards(20, 40, noise=0.1))
    gains = [quick(made, ONE, guide=guide, trials=60).figures["budgets"][0]["gain"] for guide in ("aware", "clean")]
    assert gains[0] > gains[1] + 0.1


def test_schedules_and_budgets_beyond_the_pool_are_said(tmp_path):
    tuned = quick(recording(tmp_path / "small", rewards(12, 8, noise=0.1)), parse_budgets("2:82:10TFLOP"), trials=100)
    assert "2 TFLOP pays for not even one image" in tuned.notes[0]
    assert "best-of-N at 82 TFLOP would start 10 candidates, more than the 8 recorded" in tuned.notes[1]
    assert "schedules would have started more candidates than the 8 recorded" in tuned.notes[2]
    assert all(row["candidates"] <= 8 for row in tuned.figures["budgets"])


def test_a_limit_in_seconds_is_kept_and_noted(informative):
    tuned = quick(informative, trials=10**6, seconds=0.5)
    assert tuned.provenance["stopped_early"]
    assert tuned.provenance["seconds"] < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": []}, "tuning needs a budget"),
        ({"budgets": [*ONE, Budget(9, "NFE")]}, "budgets must share one unit"),
        ({"budgets": [*ONE, *ONE]}, "budgets must ascend, got 50 TFLOP, 50 TFLOP"),
        ({"budgets": [Budget(1, "TFLOP")]}, "1 TFLOP pays for not even one image"),
        ({"budgets": parse_budgets("20,21TFLOP".replace(",", "TFLOP,"))}, "best-of-N is best-of-2 at all budgets"),
        ({"folds": 1}, "folds must be in 2..10 .* got 1"),
        ({"folds": 11}, "folds must be in 2..10"),
        ({"fit": [0, 1]}, "needed together"),
        ({"fit": [0, 1, 2], "test": [2, 3]}, "prompt 2 is to be used to fit and to test"),
        ({"fit": [0, 1], "test": [5, 99]}, "prompt 99 is to be used to test, but it is not recorded"),
        ({"fit": [0], "test": [5, 6]}, "at least 2 prompts to fit on are needed, got 1"),
        ({"trials": 0}, "at least 1 schedule, got 0"),
        ({"seconds": 0}, "must be above 0"),
        ({"weights": (1.0, 2.0)}, "1 rewards .reward0. need as many weights"),
        ({"combine": "reward0 where reward7>=1"}, "combine names the reward 'reward7'; there is reward0"),
        ({"guide": "oracle"}, "a guide is `aware` or `clean`, got 'oracle'"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(informative, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        quick(informative, **options)
    assert "\n" not in str(caught.value)


def test_recordings_that_cannot_be_tuned_on_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 4 recorded prompts, got 3"):
        quick(recording(tmp_path / "few", prompts=3))
    with pytest.raises(ValueError, match="at least 2 steps and 2 candidates, recorded are 1 and 40"):
        quick(recording(tmp_path / "short", rewards(steps=1)))
    gaps = rewards()
    gaps[:, :, :-1] = np.nan
    with pytest.raises(ValueError, match="no step but the last at which every candidate was judged"):
        quick(recording(tmp_path / "gaps", gaps))


def test_looks_are_only_where_everybody_was_judged(tmp_path):
    gaps = rewards(20, 40, noise=0.3)
    gaps[:, :, [0, 1, 3, 5, 6]] = np.nan
    gaps[7, 3, 4] = np.nan
    tuned = quick(recording(tmp_path / "gaps", gaps), ONE, trials=60)
    assert tuned.policy.rungs == (3,)
    assert tuned.notes[0].startswith("schedules look at steps 3 only")


@needs_values
@pytest.mark.slow
@pytest.mark.parametrize(("reward", "least"), [("hps", 25.5), ("imr", 25.0), ("pic", 26.5)])
def test_published_values_even_prompts_tell_about_odd_ones(tmp_path, reward, least):
    made = import_values(VALUES, tmp_path / "r", rewards=[reward])
    charge = accounting_of("calls", NAMED_COST_MODELS["flux-512"])
    budgets = parse_budgets("400:4000:200TFLOP")
    tuned = tune(made, budgets, charge, fit=range(0, 200, 2), test=range(1, 200, 2))
    assert tuned.figures["over_all"][0]["relative_increase_percent"] >= least
    assert tuned.policy == tuned.folds[0].policy
