"""What a search would cost is what it costs."""

from __future__ import annotations

import json

import pytest

import ttsnap as package
from tests.pipelines import tiny
from ttsnap.live.forecast import forecast
from ttsnap.policies import Branching, SuccessiveHalving

OPTIONS = {"num_inference_steps": 4, "height": 32, "width": 32, "max_sequence_length": 12}


@pytest.mark.parametrize("policy", [SuccessiveHalving((2,), (0.5,)), Branching((1, 2), (0.4, 0.2), (0.8, 0.2))])
def test_the_forecast_is_what_the_search_pays(policy):
    pipe = tiny.flux()
    session = package.prepare(pipe, reward=tiny.Redness(), candidates=5, policy=policy, **OPTIONS)
    told = forecast(session, ["a cat", "a dog"])
    paid = [result.cost for result in session.block(["a cat", "a dog"])]
    assert [told.prompt.nfe, told.prompt.looks] == [paid[0].nfe, paid[0].looks]
    assert told.total.tflop == pytest.approx(sum(cost.tflop for cost in paid))
    assert told.prompt.seconds > 0
    assert told.weights == sum(
        parameter.numel() * parameter.element_size()
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
        for parameter in getattr(pipe, name).parameters()
    )


def test_a_dry_run_writes_nothing(ttsnap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = ttsnap("generate", "a red circle", "--steps", "4", "--dry-run", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["model"], told["candidates"], told["prompts"]) == ("shapes", 8, 1)
    code, out, _ = ttsnap("generate", "a red circle", "a blue square", "--steps", "4", "--dry-run", "--candidates", "3")
    assert code == 0
    assert "each of 2 prompts:" in out
    assert not list(tmp_path.iterdir())
