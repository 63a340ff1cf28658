"""`ttsnap import-values` and `ttsnap simulate`, as typed."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("zarr")

from tests.commands import ttsnap
from tests.recordings.conftest import write_values
from tests.replay.synthetic import recording, rewards
from ttsnap.policies import SuccessiveHalving, to_dict


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    clean = rewards(prompts=6, candidates=20, steps=10)
    return recording(tmp_path_factory.mktemp("cli") / "r.zarr", clean, clean + 0.1).path


def test_published_values_become_a_recording_that_is_simulated(tmp_path):
    write_values(tmp_path / "values", "hps", rewards(prompts=4, candidates=9, steps=5)[..., 0].astype(float))
    done = ttsnap("import-values", tmp_path / "values", tmp_path / "r.zarr", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reward_names"] == ["hpsv2"]
    done = ttsnap(
        "simulate", tmp_path / "r.zarr", "--rungs", "2", "--keep", ".5", "--budgets", "100:200:50TFLOP", "--json"
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["settings"]["cost_model"] == "flux-512"
    assert [row["budget_tflop"] for row in answer["results"]] == [100, 150, 200]
    needed = "policy budget_tflop candidates reward ci95 nfe tflop"
    assert set(needed.split()) <= set(answer["results"][0])
    assert {"relative_increase_percent", "compute_multiplier"} <= set(answer["policies"][0])
    again = ttsnap("import-values", tmp_path / "values", tmp_path / "r.zarr")
    assert (again.returncode, again.stdout) == (2, "")
    assert "exists already" in again.stderr


def test_tables_pictures_and_csv(made, tmp_path):
    policy = tmp_path / "mine.json"
    policy.write_text(json.dumps(to_dict(SuccessiveHalving((3,), keep=(0.5,)))))
    done = ttsnap(
        *("simulate", made, "--policy", "halving", "--policy", policy, "--policy", "early-selection"),
        *("--plots", tmp_path / "plots", "--csv", tmp_path / "table.csv", "--trials", 5),
    )
    assert done.returncode == 0, done.stderr
    for name in ("TTSnap", "TTSp", "TTSnap mine", "TTSp early-selection", "best-of-N", "over all budgets"):
        assert name in done.stdout
    assert "more candidates than the 20 recorded" in done.stdout
    tables, _, _ = done.stdout.partition("note:")
    assert max(map(len, tables.splitlines())) <= 80
    pictures = {path.name for path in (tmp_path / "plots").iterdir()}
    names = ("reward", "multiplier", "increase", "correlation")
    assert pictures == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert len(rows) == 10 * 6
    assert np.isfinite(float(rows[0]["reward"]))


BAD = {
    "no recording": (["nowhere.zarr"], "there is no recording at nowhere.zarr"),
    "guide": (["--guide", "best"], "unknown guide 'best'; known are aware, clean, both"),
    "policy": (["--policy", "magic"], "unknown policy 'magic'; known are best-of-n, halving"),
    "only best-of-n": (["--policy", "best-of-n"], "in every table already"),
    "policy file": (["--policy", "nowhere.json"], "cannot read policy file nowhere.json"),
    "rungs": (["--rungs", "12"], "must lie below the 10 steps"),
    "keep alone": (["--keep", ".5"], "--keep needs --rungs"),
    "budgets": (["--budgets", "400:4000"], "first:last:step"),
    "unit": (["--budgets", "400"], "needs a number and a unit"),
    "accounting": (["--accounting", "free"], "known are calls, published"),
    "cost model": (["--cost-model", "sd9"], "known are flux-512"),
    "half a cost": (["--call-tflop", "9.9"], "needed together"),
    "weights": (["--weights", "1,2"], "need as many weights"),
    "combine": (["--combine", "best"], "unknown combine 'best'"),
    "trials": (["--trials", "0"], "at least one trial"),
    "seconds": (["--budgets", "30s"], "seconds"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, made, capsys, monkeypatch):
    from ttsnap.cli import main

    arguments, message = BAD[case]
    first = [] if case == "no recording" else [str(made)]
    monkeypatch.setattr(sys, "argv", ["ttsnap", "simulate", *first, *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
