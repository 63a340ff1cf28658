"""Published comparisons: what they fill in, what they cost, what is set beside; and each of them on small models."""

from __future__ import annotations

import json

import pytest

from tests.pipelines import tiny_sd
from tests.rewards import reference as ref
from ttsnap.core.cost import parse_budgets
from ttsnap.live.comparison import ComparisonSettings
from ttsnap.live.leaderboard import Row
from ttsnap.live.protocols import PROTOCOLS, filled, named
from ttsnap.live.settings import ModelSettings

OPEN = [name for name, protocol in PROTOCOLS.items() if protocol.prompts is None]


def row(policy, reward, value, held_out):
    return Row(policy, reward, None, 4, "16 NFE", 4, 16.0, value, (0, 1), held_out, 1.0, (1, 2))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_settings_that_bench_takes(name):
    protocol = named(name)
    model, compared = filled(ModelSettings(), protocol.model), filled(ComparisonSettings(), protocol.compared)
    assert model.steps == protocol.model["steps"]
    assert compared.contenders()
    (budget,) = protocol.budgets(model.steps)
    assert parse_budgets(budget)
    known = {"best-of-N", *(who.policy for who in compared.contenders())}
    measured = {*compared.reward, *(compared.report_reward or "").split(",")}
    assert all(one.policy is None or one.policy in known for one in protocol.printed)
    assert {one.measure for one in protocol.printed} <= measured


def test_what_is_given_goes_before_what_the_protocol_says():
    protocol = named("psp")
    model = filled(ModelSettings(steps=4), protocol.model)
    assert (model.steps, model.model) == (4, protocol.model["model"])
    assert protocol.budgets(model.steps) == ("16NFE",)
    assert filled(ComparisonSettings(reward=("mine:judge",)), protocol.compared).reward == ("mine:judge",)
    with pytest.raises(ValueError, match="unknown protocol 'pps'; known are ttsnap, psp"):
        named("pps")


def test_printed_figures_stand_beside_those_of_the_same_policy_and_reward():
    rows = [
        row("best-of-N", None, 1.0, {"hpsv2": 0.25, "geneval": 0.5}),
        row("psp", "imagereward", 1.2, {"hpsv2": 0.26, "geneval": 0.6}),
    ]
    lines = named("psp").beside(rows)
    assert "| best-of-4 | best-of-N | imagereward | 1.098 | 1.000 |" in lines
    assert "| PSP | psp | imagereward | 1.224 | 1.200 |" in lines
    assert "| PSP | psp | geneval | 0.645 | 0.600 |" in lines
    assert "| BFS | no such policy | imagereward | 1.247 | - |" in lines
    assert "| FK steering | fk-max | hpsv2 | 0.284 | - |" in lines  # it was not run
    other = [row("best-of-N", None, 1.0, {}), row("psp", "mine:judge", 1.2, {})]
    assert all(line.endswith("| - |") for line in named("psp").beside(other)[2:])  # another reward is another scale
    assert "not at hand" in named("dog-trim").beside(rows)[0]


@pytest.mark.parametrize("name", OPEN)
def test_prompts_that_do_not_come_with_ttsnap_are_asked_for(ttsnap, name):
    code, _, err = ttsnap("bench", "--protocol", name)
    assert code == 2
    assert f"protocol {name} needs --prompts: " in err


@pytest.mark.slow
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_whole_protocol_runs_on_a_small_model(ttsnap, tmp_path, monkeypatch, name):
    tiny_sd.save(tiny_sd.sdxl, tmp_path / "model")
    (tmp_path / "ir").mkdir()
    ref.save_imagereward(tmp_path / "ir", "ImageReward.pt", ref.imagereward_state(len(ref.bert_tokenizer())))
    (tmp_path / "mine.py").write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    monkeypatch.chdir(tmp_path)
    code, out, err = ttsnap(
        *("bench", "a photo of two dogs", "a photo of a red cup", "--protocol", name, "--model", tmp_path / "model"),
        *("--steps", 10, "--size", 64, "--budget", "60NFE", "--reward", f"imagereward={tmp_path / 'ir'}", "--pool", 6),
        *("--report-reward", "mine:red", "--out", tmp_path / "bench"),
    )
    assert code == 0, err
    data = json.loads((tmp_path / "bench" / "bench.json").read_text())
    asked = {who.policy for who in filled(ComparisonSettings(), PROTOCOLS[name].compared).contenders()}
    assert {r["policy"] for r in data["rows"]} >= asked - {line.split(" at ")[0] for line in data["left_out"]}
    assert data["protocol"]["name"] == name
    assert PROTOCOLS[name].source in out
    if name.startswith("psp"):
        assert "| PSP | psp | imagereward |" in out
        assert not any(
            line.startswith("| PSP | psp | imagereward") and line.endswith("| - |") for line in out.split("\n")
        )
