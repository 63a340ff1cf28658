"""The table of options and families in docs/models.md is what is found."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.pipelines import option_matrix

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao, as the table has it")
def test_the_table_of_options_is_what_is_found():
    found = {(title, family): text for title, family, text in option_matrix.matrix()}
    assert option_matrix.table(found) in DOCS.read_text(encoding="utf-8")


@pytest.mark.slow
def test_options_that_need_no_package_are_exact_or_a_sentence():
    found = {(title, family): text for title, family, text in option_matrix.matrix("SDXL")}
    ran = {title: text for (title, _), text in found.items() if not text.startswith("not run")}
    assert len(ran) >= 8
    assert set(ran.values()) == {"exact"}
