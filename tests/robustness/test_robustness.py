"""Every case, and that the page tells of them all."""

from __future__ import annotations

import ast

import pytest

from tests.robustness.cases import CASES, Here
from tests.robustness.table import BEGIN, ELSEWHERE, END, PAGE, ROOT, render, rows


@pytest.mark.parametrize("name", CASES)
def test_case(name, ttsnap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CASES[name].test(Here(ttsnap, tmp_path))


def test_the_page_is_the_table_of_the_tests():
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == render(), "run: python -m tests.robustness.table"
    assert len(rows()) >= 50


@pytest.mark.parametrize("row", ELSEWHERE, ids=lambda row: row[1])
def test_what_the_page_says_of_other_tests(row):
    file, function = row[3].split("::")
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in ast.walk(ast.parse(source)))
    assert row[4] in source
