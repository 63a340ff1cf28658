"""Tuning live: hyperparameters by searching with them, reported on prompts that they were not tuned on."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.pipelines import tiny
from ttsnap import policies
from ttsnap.core.cost import Budget, affordable
from ttsnap.core.ranking import Minimum, WeightedSum
from ttsnap.live import tuning
from ttsnap.live.session import prepare
from ttsnap.live.settings import SearchSettings
from ttsnap.policies import POLICIES, PRESETS, Branching, SuccessiveHalving, space

PROMPTS = ["a red circle", "a blue square", "a cat", "a dog", "two birds", "a tree"]


@pytest.fixture(scope="module")
def session():
    return prepare(
        tiny.flux(), reward=tiny.Redness(), candidates=2, num_inference_steps=5, height=32, width=32,
        max_sequence_length=12,
    )  # fmt: skip


def test_a_policy_is_tuned_on_some_prompts_and_reported_on_others(session, tmp_path):
    before = Branching((0.2, 0.5), keep=(0.4, 0.2), grow=(0.6, 0.3), angle=50.0)
    budget = Budget(25.0, "NFE")
    told = []
    found = tuning.tune(session, PROMPTS, before, budget, trials=4, on_progress=lambda *seen: told.append(seen))
    again = tuning.tune(session, PROMPTS, before, budget, trials=4)
    assert found.trials == again.trials
    assert [seen[0] for seen in told] == [1, 2, 3, 4]
    assert found.trials[0] == policies.to_dict(before) | {"num_steps": 5, "reward": found.trials[0]["reward"]}
    best = max((trial for trial in found.trials if trial["reward"] is not None), key=lambda trial: trial["reward"])
    tuned = policies.from_dict({key: value for key, value in best.items() if key not in ("num_steps", "reward")})
    # Held out are the odd prompts, each policy with what the budget pays for, on the same seeds.
    count = affordable(tuned, budget, session.cost_model, 5)
    part = dataclasses.replace(session, policy=tuned, candidates=count)
    alone = [
        part.block([prompt], seed=tuning.SEEDS * (3 + place))[0].reward for place, prompt in enumerate(PROMPTS[1::2])
    ]
    np.testing.assert_allclose(found.rewards["tuned"], alone, atol=1e-5)
    assert (found.tflop["best-of-n"] <= session.cost_model.of_plan(policies.BestOfN().plan(5, 5)).tflop + 1e-12).all()
    mean, low, high = found.gain("before")
    assert low <= mean <= high
    assert found.better == (low > 0)
    assert found.policy in (tuned, before)
    tuning.save([found], tmp_path / "tuned.json")
    read, notes = policies.load_with_notes(tmp_path / "tuned.json")
    assert read == found.policy
    assert (notes["held_out"]["prompts"], notes["provenance"]["budget"]) == (3, "25 NFE")


def test_what_cannot_be_tuned_is_one_sentence(session):
    halving = SuccessiveHalving((2,), (0.5,))
    for prompts, policy, budget, told in (
        (PROMPTS[:3], halving, "30NFE", "at least 4 prompts, half of them held out, got 3"),
        (PROMPTS, halving, "30s", "budget in NFE or TFLOP"),
        (PROMPTS, policies.BestOfN(), "30NFE", "BestOfN has no hyperparameters"),
        (PROMPTS, halving, "3NFE", "too small for one image"),
    ):
        with pytest.raises(ValueError, match=told):
            tuning.tune(session, prompts, policy, Budget.parse(budget))
    two = dataclasses.replace(session, judges={"a": tiny.Redness(), "b": tiny.Redness()})
    with pytest.raises(ValueError, match="give --weights"):
        tuning.tune(two, PROMPTS, halving, Budget.parse("30NFE"))


def test_several_rewards_that_are_made_one_number_are_measured_by_it(session):
    halving, budget, two = SuccessiveHalving((2,), (0.5,)), Budget.parse("12NFE"), {"a": tiny.Redness(), "b": Half()}
    alone, _ = tuning.measure(session, halving, budget, PROMPTS[:2], 0)
    for combine, expected in (
        (WeightedSum((1.0, 2.0)), 2 * alone),
        (Minimum((1.0, 1.0)), np.minimum(alone, alone / 2)),
    ):
        both = dataclasses.replace(session, judges=two, combine=combine)
        found, _ = tuning.measure(both, halving, budget, PROMPTS[:2], 0)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


class Half(tiny.Redness):
    """Half of it."""

    def __call__(self, images, prompts, *, sigma):
        return 0.5 * super().__call__(images, prompts, sigma=sigma)


class Told:
    """Suggests what it is told, within the range."""

    def __init__(self, told):
        self.told = told

    def suggest_float(self, name, low, high):
        return min(max(self.told[name], low), high)

    def suggest_int(self, name, low, high):
        return round(self.suggest_float(name, low, high))


@pytest.mark.parametrize("name", [*POLICIES, *PRESETS])
def test_every_policy_but_the_fixed_ones_can_be_varied(name):
    if name in ("best-of-n", "until-good", "hand-picked"):
        return
    policy = policies.named(name) or SuccessiveHalving()
    given = space.values(policy, 20)
    higher = {key: value if "rungs" in key else 1.1 * value for key, value in given.items()}
    varied = space.suggest(policy, Told(higher | {key: 1.0 for key in given if key.startswith("grow")}))
    assert varied != policy
    assert varied.plan(16, 20)[-1].step == 20
    again = space.suggest(policy, Told(given))
    assert [rung.step for rung in again.plan(32, 20)] == [rung.step for rung in policy.plan(32, 20)]


def test_the_number_of_steps_is_tuned_too_and_goes_with_the_policy(session, tmp_path):
    found = tuning.tune(
        session, PROMPTS, SuccessiveHalving((0.4,), (0.5,)), Budget(24.0, "NFE"), steps=[2, 3], trials=6
    )
    assert {trial["num_steps"] for trial in found.trials} > {5}
    assert found.provenance["steps"] == [2, 3, 5]
    assert set(found.rewards) == {"tuned", "before", "best-of-n", "best-of-n at its best steps"}
    plain = {}
    for steps in (2, 3, 5):
        one = session if steps == 5 else session.with_steps(steps)
        assert one.sampler.num_steps == steps
        rewards, paid = tuning.measure(one, policies.BestOfN(), Budget(24.0, "NFE"), PROMPTS[::2], 0)
        plain[steps] = rewards.mean()
        assert (paid > 0).all()
    assert found.provenance["best_of_n_steps"] == max(plain, key=plain.get)
    assert "gain_over_best_of_n_at_its_best_steps" in found.figures
    poor = tuning.tune(session, PROMPTS, SuccessiveHalving((0.4,), (0.5,)), Budget(4.0, "NFE"), steps=[2, 3], trials=2)
    assert poor.provenance["steps"] == [2, 3]  # five cannot be paid for
    tuning.save([found], tmp_path / "tuned.json")
    assert policies.read(str(tmp_path / "tuned.json"))[1] == found.num_steps
    assert policies.read("svdd")[1] is None


def test_a_budget_chooses_policy_and_steps_from_a_file_that_was_tuned_for_several(session, tmp_path):
    options = {"steps": [2], "trials": 2}
    first, second = (
        tuning.tune(session, PROMPTS, SuccessiveHalving((0.4,), (keep,)), Budget(amount, "NFE"), **options)
        for amount, keep in ((12.0, 0.5), (24.0, 0.3))
    )
    file = tmp_path / "tuned.json"
    tuning.save([first, second], file)
    for amount, unit, one in (
        (6, "NFE", first), (12, "NFE", first), (23, "NFE", first), (24, "NFE", second), (99, "NFE", second),
        (1, "TFLOP", second), (None, "", second),
    ):  # fmt: skip
        budget = Budget(float(amount), unit) if amount else None
        assert policies.for_budget(file, budget) == (one.policy, one.num_steps)
        assert policies.read(str(file), Budget.parse(f"{amount}{unit}") if amount else None)[1] == one.num_steps
    made = prepare(
        session.sampler.pipe, reward=tiny.Redness(), budget="12NFE", policy=str(file), height=32, width=32,
        max_sequence_length=12,
    )  # fmt: skip
    assert (made.policy, made.sampler.num_steps) == (first.policy, first.num_steps)
    assert made.compare_steps == (second.provenance["best_of_n_steps"],)
    assert SearchSettings(policy=str(file), budget="12NFE").chosen_policy() == (first.policy, first.num_steps)
    assert SearchSettings(policy=str(file), budget="12NFE").key() != SearchSettings(policy=str(file)).key()


def test_of_what_ships_the_budget_or_the_number_of_steps_chooses(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "TUNED", tmp_path)
    twenty, eight, four = (SuccessiveHalving((rung,), (0.5,)) for rung in (9, 3, 1))
    entries = [("2 GFLOP", four, 4), ("4 GFLOP", eight, 8), ("40 NFE", eight, 8), ("9 GFLOP", twenty, 20)]
    by_budget = [{"budget": b, "policy": policies.to_dict(p), "num_steps": n} for b, p, n in entries]
    provenance = {"guides": ["mine"], "rewards": ["clean"], "num_steps": 20}
    policies.save(twenty, tmp_path / "model-mine.json", provenance=provenance, by_budget=by_budget)
    for steps, budget, found in (
        (None, None, (twenty, 20)), (None, "1GFLOP", (four, 4)), (None, "5GFLOP", (eight, 8)),
        (None, "1TFLOP", (twenty, 20)), (None, "99NFE", (eight, 8)), (None, "3s", (twenty, 20)),
        (4, None, (four, 4)), (4, "9GFLOP", (four, 4)), (20, "1GFLOP", (twenty, 20)), (20, "40NFE", (twenty, 20)),
        (6, None, None), (6, "5GFLOP", None),
    ):  # fmt: skip
        assert policies.tuned_policy("model", ["mine"], steps, Budget.parse(budget) if budget else None) == found
    assert policies.tuned_policy("model", ["clean"]) is None
    assert policies.tuned_policy("a/model", ["mine"]) is None


@pytest.mark.parametrize(
    "entries", [[1], [{"budget": "9NFE"}], [{"budget": "x"}], 3, [{"budget": "9NFE", "policy": 1}]]
)
def test_a_file_whose_budgets_are_not_as_tune_writes_them_is_refused(tmp_path, entries):
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"policy": "best-of-n", "by_budget": entries}))
    with pytest.raises(ValueError, match="by_budget is a list of a budget and its policy"):
        policies.for_budget(file, Budget(9.0, "NFE"))


def test_a_session_with_other_steps_is_one_that_was_prepared_so(session):
    other = session.with_steps(3)
    fresh = prepare(
        session.sampler.pipe, reward=tiny.Redness(), candidates=2, num_inference_steps=3, height=32, width=32,
        max_sequence_length=12,
    )  # fmt: skip
    assert other.cost_model.of_plan(policies.BestOfN().plan(2, 3)) == pytest.approx(
        fresh.cost_model.of_plan(policies.BestOfN().plan(2, 3)), nan_ok=True
    )
    ours, theirs = (dataclasses.replace(one, policy=policies.BestOfN()).block(["a cat"])[0] for one in (other, fresh))
    np.testing.assert_array_equal(np.asarray(ours.image), np.asarray(theirs.image))
