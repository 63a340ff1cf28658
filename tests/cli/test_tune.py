"""`ttsnap tune`, as typed, and the policy file it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("zarr")
pytest.importorskip("optuna")

from tests.commands import ttsnap
from tests.replay.synthetic import recording, rewards
from ttsnap import policies


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return recording(tmp_path_factory.mktemp("cli") / "r.zarr", rewards(prompts=12, steps=8, noise=0.3)).path


def test_a_tuned_policy_is_written_and_simulated(made, tmp_path):
    out = tmp_path / "new" / "tuned.json"
    options = ["--budgets", "40:80:20TFLOP", "--folds", 2, "--trials", 150]
    done = ttsnap("tune", made, *options, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["file"] == str(out)
    assert answer["policy"] == "halving"
    assert answer["provenance"]["cost_model"]["name"] == "made up"
    assert [row["budget"] for row in answer["held_out"]["budgets"]] == [40, 60, 80]
    policy, notes = policies.load_with_notes(out)
    assert notes["held_out"] == answer["held_out"]
    done = ttsnap("simulate", made, "--policy", out, "--budgets", "60TFLOP", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["policies"][0]["hyperparameters"]["rungs"] == list(policy.rungs)
    assert answer["policies"][0]["policy"].endswith("tuned (in-sample)")
    assert answer["in_sample"] == {str(out): notes["held_out"]["sentence"]}
    other = recording(tmp_path / "other.zarr", rewards(prompts=12, candidates=30, steps=8, noise=0.3)).path
    done = ttsnap("simulate", other, "--policy", out, "--budgets", "60TFLOP")
    assert "in-sample" not in done.stdout
    done = ttsnap("simulate", made, "--policy", out, "--budgets", "60TFLOP")
    assert "was tuned on this recording" in done.stdout


def test_people_get_a_table_and_the_result_in_words(made):
    done = ttsnap("tune", made, "--budget", "60TFLOP", "--folds", 2, "--trials", 20)
    assert done.returncode == 0, done.stderr
    for words in ("12 held-out prompts", "gain over best-of-N", "policy: ", "60 TFLOP"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "60"], "budget '60' needs a number and a unit"),
        (["--budget", "60TFLOP", "--budget", "60NFE"], "budgets must share one unit"),
        (["--folds", 1], "folds must be in 2..6"),
        (["--cost-model", "tea"], "unknown cost model 'tea'"),
        (["--accounting", "creative"], "unknown accounting 'creative'"),
        (["--guide", "stars"], "a guide is `aware` or `clean`, got 'stars'"),
        (["--out", "."], "is a folder; give a file"),
    ],
)
def test_errors_are_one_sentence(made, options, message):
    done = ttsnap("tune", made, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
