"""The table of options and families in docs/models.md is what is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipelines.option_matrix import BEGIN, END, FAMILIES, NEEDED, OPTIONS, matrix, read_table

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
WRITTEN = read_table(DOCS.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0])


def test_the_table_has_a_cell_for_each_option_and_family():
    assert WRITTEN.keys() == {(title, family) for title in OPTIONS for family in FAMILIES}
    assert "-" not in WRITTEN.values()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_what_is_found(family):
    found = {title: text for title, _, text in matrix(family, exactly=True)}
    ran = {title: text for title, text in found.items() if not text.startswith("not run")}  # packages may be missing
    assert len(ran) >= len(OPTIONS) - len(NEEDED)
    assert ran == {title: WRITTEN[title, family] for title in ran}
