"""docs/evidence.md: what the lint finds, and the README's first figure run again."""

from __future__ import annotations

import json
import re

import pytest
from tools import evidence

HEAD = "# Evidence\n| claim | command | last run | hardware | record |\n|---|---|---|---|---|\n"
ROW = "| [README](../README.md#what-it-buys) | `ttsnap bench` | 2026-11-28 | CPU | [bench](bench.json) |\n"
README = "# It\n## What it `buys`\n| policy | reward | right |\n|---|---|---|\n| svdd | -1.62 | 35.0 % |\n"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs" / "evidence.md").write_text(HEAD + ROW)
    (tmp_path / "docs" / "words.md").write_text(
        "# W\n| a | b |\n|---|---|\n| one | two |\n| 3 | four |\n| five | six |\n"
    )
    record(tmp_path, -1.6181, 0.35)
    return tmp_path


def record(root, reward, right):
    (root / "docs" / "bench.json").write_text(json.dumps({"rows": [{"value": reward, "held_out": {"x": right}}]}))


def test_a_table_that_agrees_with_its_record_passes(root):
    assert evidence.problems(root) == []
    assert [table.key for table in evidence.tables(root)] == ["README.md#what-it-buys"]


@pytest.mark.parametrize(("reward", "right", "told"), [(-1.7, 0.35, "prints -1.62,"), (-1.6181, 0.36, "prints 35.0,")])
def test_a_number_that_is_not_in_the_record_is_told(root, reward, right, told):
    record(root, reward, right)
    (problem,) = evidence.problems(root)
    assert told in problem
    assert "run: `ttsnap bench`" in problem


def test_a_table_without_a_row_and_a_row_without_a_table_are_told(root):
    (root / "docs" / "more.md").write_text(README)
    assert evidence.problems(root) == [
        "docs/more.md#what-it-buys has a table of figures and no row in docs/evidence.md"
    ]
    (root / "docs" / "more.md").unlink()
    (root / "docs" / "evidence.md").write_text(HEAD + ROW.replace("what-it-buys", "gone"))
    problems = evidence.problems(root)
    assert len(problems) == 2
    assert problems[1] == "docs/evidence.md names README.md#gone, which is not there"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (ROW.replace("bench.json", "none.json"), "there is no record"),
        (ROW.replace("2026-11-28", "lately"), "needs a date"),
        (ROW.replace("`ttsnap bench`", ""), "a row has claim, command"),
    ],
)
def test_a_row_that_lacks_something_is_told(root, row, told):
    (root / "docs" / "evidence.md").write_text(HEAD + row)
    (problem,) = evidence.problems(root)
    assert told in problem


@pytest.mark.slow
def test_the_readmes_best_of_n_is_what_its_command_measures_now(ttsnap, tmp_path):
    told = next(
        dict(zip(table.head, row, strict=True))
        for table in evidence.tables(evidence.ROOT)
        for row in table.rows
        if table.document == "README.md" and "best-of-N" in row and "18 GFLOP" in row
    )
    code, out, err = ttsnap(
        *(
            "bench",
            "--model",
            "shapes-hard",
            "--policies",
            "best-of-n",
            "--budget",
            "18GFLOP",
            "--pool",
            8,
            "--json",
            "--try-steps",
            "none",
        ),
        *("--prompts", "shapes-hard:held-out", "--prompt-range", "0:120", "--out", tmp_path / "bench"),
    )
    assert code == 0, err
    found = json.loads(out)["rows"][0]
    number = {name: float(re.search(r"-?[\d.]+", told[name])[0]) for name in ("started", "paid", "reward")}
    assert found["started"] == number["started"]
    assert 1000 * found["paid"] == pytest.approx(number["paid"], rel=0.01)  # GFLOP
    low, high = found["value_interval"]
    assert low - (high - low) / 2 < number["reward"] < high + (high - low) / 2
