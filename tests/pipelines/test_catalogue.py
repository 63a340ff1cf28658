from __future__ import annotations

import json
import re

import pytest

from ttsnap.pipelines import catalogue
from ttsnap.policies import SuccessiveHalving


@pytest.mark.parametrize("family", catalogue.families(), ids=lambda family: family.name)
def test_each_family_starts_with_a_schedule_that_runs(family):
    assert len(family.rungs) == len(family.keep)
    if family.rungs:
        plan = SuccessiveHalving(tuple(family.looks), family.keep).plan(32, family.steps)
        assert [rung.step for rung in plan] == [*family.looks, family.steps]
        assert plan[-1].size < plan[0].size == 32


def test_figures_are_of_known_families_and_plausible():
    uncounted = {family.name for family in catalogue.families()} - set(catalogue.figures())
    assert uncounted == {"shapes", "shapes-hard", "any other pipeline"}
    assert set(catalogue.figures()) <= {family.name for family in catalogue.families()}
    for family in catalogue.families():
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


def test_commands_are_understood(ttsnap, monkeypatch):
    """Up to the search itself."""
    import shlex

    from ttsnap.live import settings

    seen = []

    def prepare(search, model, *rest):
        seen.append(model.model)
        raise ValueError("far enough")

    monkeypatch.setattr(settings.SearchSettings, "prepare", prepare)
    for family in catalogue.families():
        program, *arguments = shlex.split(family.command)
        assert program == "ttsnap"
        code, _, err = ttsnap(*arguments)
        assert (code, "far enough" in err) == (2, True), (family.command, err)
    assert seen == [family.model for family in catalogue.families()]


def test_the_verb_shows_the_same(ttsnap):
    shown = ttsnap("models")[1]
    assert all(family.name.split()[0] in shown for family in catalogue.families())
    more = re.sub(r"\s+", " ", ttsnap("models", "klein")[1])
    assert "not measured on this model" in more
    assert "ttsnap generate" in more
    found = json.loads(ttsnap("models", "--json", "FLUX.1 dev")[1])
    assert [(family["name"], family["looks"]) for family in found] == [("FLUX.1 dev", [3, 7, 12])]
    assert found[0]["cost"]["512"]["call_tflop"] == pytest.approx(21.5, abs=0.1)
    code, _, err = ttsnap("models", "midjourney")
    assert code == 2
    assert "no model fits 'midjourney'; known are shapes, shapes-hard, FLUX" in err
