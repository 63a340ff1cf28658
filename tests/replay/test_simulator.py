import json

import numpy as np
import pytest

pytest.importorskip("zarr")
pytest.importorskip("scipy")

from tests.replay.synthetic import recording, rewards
from ttsnap.core.cost import Budget, parse_budgets
from ttsnap.core.driver import run
from ttsnap.core.ranking import WeightedSum, read_rule
from ttsnap.policies import BestOfN, EarlySelection, SuccessiveHalving
from ttsnap.replay import Contender, EveryCall, cost_model_of, simulate
from ttsnap.replay.environment import ReplayEnvironment
from ttsnap.replay.simulator import draw

HALVING = SuccessiveHalving((2, 4), keep=(0.4, 0.5))
FIELD = [Contender("best", BestOfN()), Contender("halving", HALVING), Contender("early", EarlySelection(3))]
BUDGETS = parse_budgets("20:120:20TFLOP")


def simulation(made, field=FIELD, budgets=BUDGETS, **options):
    return simulate(made, field, budgets, EveryCall(cost_model_of(made)), **({"trials": 20} | options))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return recording(tmp_path_factory.mktemp("recording") / "r.zarr")


def test_it_equals_one_search_after_the_other(made):
    result = simulation(made).dataset
    for p, contender in enumerate(FIELD):
        for b in (0, 3, 5):
            n = int(result.candidates[p, b])
            for prompt in (0, 7):
                drawn = draw([prompt], 40, 20, n, 0)[0]
                chosen = [
                    run(contender.policy, ReplayEnvironment(made.clean[prompt][picks][None])).rewards[0, 0]
                    for picks in drawn
                ]
                assert result.value.values[p, b, prompt, 0] == pytest.approx(np.mean(chosen), abs=1e-6)


def test_sampled_best_of_n_agrees_with_the_closed_form(made):
    result = simulation(made, trials=400).dataset
    sampled, exact = result.value.sel(policy="best"), result.best_of_n
    error = result.trial_value.sel(policy="best").std("trial", ddof=1) / 20
    assert (abs(sampled.mean("prompt") - exact.mean("prompt")) < 4 * error).all()
    assert float(error.max()) < 0.02


def test_draws_are_paired_and_nested():
    many, few = draw([3, 5], 40, 6, 30, seed=1), draw([5], 40, 6, 10, seed=1)
    np.testing.assert_array_equal(many[1, :, :10], few[0])
    assert all(len(set(row)) == 30 for row in many[0].tolist())
    assert (draw([3], 40, 6, 30, seed=2) != many[0]).any()


def test_neither_threads_nor_company_change_a_figure(made):
    one = simulation(made, threads=1).dataset
    two = simulation(made, field=FIELD[::-1], threads=3).dataset
    np.testing.assert_array_equal(one.value.sel(policy="halving"), two.value.sel(policy="halving"))
    few = simulation(made, prompts=np.array([7, 2])).dataset
    np.testing.assert_array_equal(few.value.values[1, :, 0], one.value.values[1, :, 7])


def test_cost_is_what_was_done(made):
    result = simulation(made)
    rows = result.table.set_index(["policy", "budget"])
    for name, contender in zip(("best", "halving", "early"), FIELD, strict=True):
        row = rows.loc[(name, 100.0)]
        plan = contender.policy.plan(int(row.candidates), 8)
        calls = sum(r.size * (r.step - before) for r, before in zip(plan, [0, *(r.step for r in plan)], strict=False))
        assert row.nfe == calls
        assert row.looks == sum(r.size for r in plan)
        assert row.tflop == pytest.approx(0.5 + calls + 0.5 * row.looks)
        assert row.tflop <= 100


def test_where_looks_say_all_pruning_wins_and_where_they_say_nothing_it_loses(tmp_path):
    sure = rewards(prompts=40, noise=0.0)
    noise = np.random.default_rng(5).normal(size=sure.shape).astype(np.float32)
    noise[:, :, -1] = sure[:, :, -1]
    for values, wins in ((sure, True), (noise, False)):
        made = recording(tmp_path / f"{wins}.zarr", values)
        row = next(r for r in simulation(made).rows[1] if r["policy"] == "halving")
        low, high = row["relative_increase_ci95"]
        assert low > 0 if wins else high < 0
        assert (row["compute_multiplier"] > 1) == wins


def test_what_a_pool_cannot_pay_is_said_and_left_out(made):
    result = simulation(made, budgets=parse_budgets("5:505:100TFLOP"))
    notes = " ".join(result.notes())
    assert "at 5 TFLOP halving can pay for not even one image" in notes
    assert "more candidates than the 40 recorded (up to " in notes
    rows = [row for row in result.rows[0] if row["policy"] == "best"]
    assert rows[0]["reward"] is None
    assert rows[-1]["reward"] is None
    assert rows[-1]["candidates"] > 40
    used = result.rows[1][0]["budgets_used"]
    assert used
    assert 5.0 not in used
    assert 505.0 not in used
    json.dumps(result.to_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="more candidates than the 40 recorded"):
        simulation(made, budgets=[Budget(5000, "TFLOP")])


def test_the_guide_may_differ_from_what_is_reported(tmp_path):
    clean = rewards(noise=3.0)
    aware = np.repeat(clean[:, :, -1:], 8, axis=2)
    aware[:, :, 5:] = np.nan
    made = recording(tmp_path / "r.zarr", clean, aware)
    field = [Contender("aware", HALVING), Contender("clean", HALVING, "clean")]
    result = simulation(made, field).dataset
    assert float((result.value[0] - result.value[1]).mean()) > 0.1
    best = np.sort(clean[:, :, -1, 0], axis=1)
    assert (result.value.values[0].mean(axis=0)[:, 0] <= best[:, -1] + 1e-6).all()


def test_several_rewards_by_rank_sum_and_by_weights(tmp_path):
    made = recording(tmp_path / "r.zarr", kinds=2)
    field = [Contender("best", BestOfN()), Contender("halving", HALVING)]
    ranked = simulation(made, field, trials=200)
    assert ranked.dataset.sizes["reward"] == 2
    weighted = simulation(made, field, weights=[1.0, 0.0], trials=200)
    drawn = draw([0], 40, 200, int(weighted.dataset.candidates[1, 2]), 0)[0]
    chosen = [
        run(HALVING, ReplayEnvironment(made.clean[0][d][None]), WeightedSum([1.0, 0.0])).rewards[0] for d in drawn
    ]
    np.testing.assert_allclose(weighted.dataset.value.values[1, 2, 0], np.mean(chosen, axis=0), atol=1e-5)
    # The weight is all on the first reward: it gains, and the other does not.
    gains = (weighted.dataset.value - ranked.dataset.value).mean(("budget", "prompt")).sel(policy="best").values
    assert gains[0] > 0.1
    assert gains[1] < -0.1
    for simulated in (ranked, weighted):
        sampled, exact = simulated.dataset.value.sel(policy="best"), simulated.dataset.best_of_n
        assert float(abs(sampled.mean("prompt") - exact.mean("prompt")).max()) < 0.05
    with pytest.raises(ValueError, match="need as many weights, got 1"):
        simulation(made, field, weights=[1.0])


def test_several_rewards_by_minimum_and_by_a_bound(tmp_path):
    made = recording(tmp_path / "r.zarr", kinds=2)
    field = [Contender("best", BestOfN()), Contender("halving", HALVING)]
    bound = "reward0 where reward1>=.5"
    for combine, closed in (("minimum", False), (bound, True)):
        simulated = simulation(made, field, combine=combine, trials=200).dataset
        assert simulated.attrs["combine"] == ("minimum" if combine == "minimum" else "reward0 where reward1>=0.5")
        drawn = draw([0], 40, 200, int(simulated.candidates[1, 2]), 0)[0]
        rule = read_rule(combine, made.rewards)
        alone = [run(HALVING, ReplayEnvironment(made.clean[0][d][None]), rule).rewards[0] for d in drawn]
        np.testing.assert_allclose(simulated.value.values[1, 2, 0], np.mean(alone, axis=0), atol=1e-5)
        sampled, exact = simulated.value.sel(policy="best"), simulated.best_of_n
        assert float(abs(sampled.mean("prompt") - exact.mean("prompt")).max()) < 0.05
        assert (len(simulated.size) == 40) == closed  # every size in closed form, or some that are drawn
    free = simulation(made, field, weights=[1.0, 0.0], trials=200).dataset
    held = simulation(made, field, combine=bound, trials=200).dataset
    change = (held.value - free.value).sel(policy="best").isel(budget=-1).mean("prompt").values
    assert change[0] < -0.05  # the bound costs some of the objective, and moves the other
    assert change[1] > 0.3
    with pytest.raises(ValueError, match="combine names the reward 'hps'; there is reward0, reward1"):
        simulation(made, field, combine="hps where reward1>=.5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"field": []}, "at least one policy"),
        ({"budgets": [Budget(20, "TFLOP"), Budget(20, "NFE")]}, "share one unit"),
        ({"budgets": [Budget(40, "TFLOP"), Budget(20, "TFLOP")]}, "must ascend"),
        ({"field": [FIELD[0], FIELD[0]]}, "the same name"),
        ({"trials": 0}, "at least one trial"),
    ],
)
def test_bad_input_is_refused(made, change, message):
    with pytest.raises(ValueError, match=message):
        simulation(made, **change)
