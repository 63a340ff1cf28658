"""The pipelines of diffusers' own test-suite; see diffusers_matrix.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.pipelines.diffusers_matrix import FULL, NEEDED, ROUNDED, by_pipeline, is_exact, matrix

CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")


@pytest.mark.slow
@pytest.mark.skipif(not CHECKOUT, reason="DIFFUSERS_CHECKOUT names no folder with diffusers' `tests/`")
def test_the_pipelines_of_diffusers_own_tests_are_exact_in_full_batches():
    for name in NEEDED:
        pytest.importorskip(name, reason=f"diffusers' tests need {name}")
    found = by_pipeline(list(matrix(Path(str(CHECKOUT)), only=os.environ.get("DIFFUSERS_ONLY", ""))))
    exact = {name for name, rows in found.items() if all(map(is_exact, rows))}
    full = {name for name in exact if all(row["batches"] < FULL for row in found[name])}
    changed = [row for rows in found.values() for row in rows if is_exact(row) and row.get("winner", 9.0) >= ROUNDED]
    assert not changed, "the line that makes the winner again makes another picture"
    assert len(exact) >= 0.94 * len(found), found.keys() - exact  # 125 of 133
    assert len(full) >= 0.86 * len(found), found.keys() - full  # 115 of 133
