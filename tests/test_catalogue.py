from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ttsnap import catalogue
from ttsnap.policies import SuccessiveHalving

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"


def test_the_document_holds_the_tables_as_they_are():
    text = DOCUMENT.read_text()
    assert catalogue.renewed(text) == text, "renew it: python benchmarks/models.py --docs"


@pytest.mark.parametrize("family", catalogue.FAMILIES, ids=lambda family: family.name)
def test_each_family_starts_with_a_schedule_that_runs(family):
    assert len(family.rungs) == len(family.keep)
    if family.rungs:
        plan = SuccessiveHalving(tuple(family.looks), family.keep).plan(32, family.steps)
        assert [rung.step for rung in plan] == [*family.looks, family.steps]
        assert plan[-1].size < plan[0].size == 32


def test_figures_are_of_known_families_and_plausible():
    assert set(catalogue.figures()) <= {family.name for family in catalogue.FAMILIES}
    for family in catalogue.FAMILIES:
        costs = [family.tflop(size) for size in catalogue.SIZES]
        if None in costs:
            continue
        (call, decode), (large_call, large_decode) = costs
        assert 1.5 < large_call / call < 10
        assert 3.5 < large_decode / decode < 5
        assert 0.1 < family.weights_gb < 200
    flux = catalogue.find(["FLUX.1 dev"])[0]
    assert flux.tflop(512) == pytest.approx((21.50, 2.515), abs=0.01)
    assert flux.tflop(1024) == pytest.approx((74.38, 10.47), abs=0.01)


def test_commands_are_understood(monkeypatch):
    """Up to the search itself."""
    import shlex

    from typer.testing import CliRunner

    from ttsnap.cli import app, generating

    seen = []
    monkeypatch.setattr(generating, "execute", lambda request, *, as_json: seen.append(request))
    for family in catalogue.FAMILIES:
        program, *arguments = shlex.split(family.command)
        assert program == "ttsnap"
        assert CliRunner().invoke(app, arguments).exit_code == 0, family.command
    assert [request.model for request in seen] == [family.model for family in catalogue.FAMILIES]


def test_the_verb_shows_the_same():
    from typer.testing import CliRunner

    from ttsnap.cli import app

    shown = CliRunner().invoke(app, ["models"]).stdout
    assert all(family.name.split()[0] in shown for family in catalogue.FAMILIES)
    more = re.sub(r"\s+", " ", CliRunner().invoke(app, ["models", "klein"]).stdout)
    assert "not measured on this model" in more
    assert "ttsnap generate" in more
    found = json.loads(CliRunner().invoke(app, ["models", "--json", "FLUX.1 dev"]).stdout)
    assert [(family["name"], family["looks"]) for family in found] == [("FLUX.1 dev", [3, 7, 12])]
    assert found[0]["cost"]["512"]["call_tflop"] == pytest.approx(21.5, abs=0.1)
    with pytest.raises(ValueError, match="no model fits 'midjourney'; known are shapes, FLUX"):
        CliRunner().invoke(app, ["models", "midjourney"], catch_exceptions=False)
