import numpy as np
import pytest

from ttsnap.core.cost import NAMED_COST_MODELS, Budget, CostModel
from ttsnap.core.driver import run
from ttsnap.policies import BestOfN, EarlySelection, SuccessiveHalving
from ttsnap.replay.environment import ReplayEnvironment

pytest.importorskip("zarr")

from tests.replay.synthetic import recording
from ttsnap.replay import EveryCall, Published, accounting_of, cost_model_of

FLUX = NAMED_COST_MODELS["flux-512"]
PUBLISHED = SuccessiveHalving((3, 7, 12), (0.4, 0.4, 0.5))


def test_every_call_charges_what_the_ledger_of_a_search_counts():
    model = CostModel("made up", 2.0, 0.5, 0.25, prompt_tflop=3.0)
    accounting = EveryCall(model)
    rewards = np.random.default_rng(0).normal(size=(1, 600, 20, 1))
    for policy in (BestOfN(), PUBLISHED, SuccessiveHalving((1, 2, 3), sizes=(9, 4, 2)), EarlySelection(5)):
        for amount in (60, 100, 333, 1000):
            budget = Budget(amount, "TFLOP")
            n = accounting.candidates(policy, budget, 20)
            assert n >= 1
            ledgers = [run(policy, ReplayEnvironment(rewards[:, :size])).ledger for size in (n, n + 1)]
            fits, exceeds = (float(ledger.tflop(model)[0]) for ledger in ledgers)
            assert fits <= amount < exceeds
            spent = accounting.tflop(policy, n, 20, ledgers[0].nfe[0], ledgers[0].looks_by_step[0])
            assert spent == pytest.approx(fits)


def test_too_small_a_budget_pays_for_no_candidate():
    assert EveryCall(FLUX).candidates(BestOfN(), Budget(100, "TFLOP"), 20) == 0


def test_the_published_convention_charges_one_call_less():
    published = Published(FLUX)
    assert published.candidates(PUBLISHED, Budget(2000, "TFLOP"), 20) == 38
    assert published.tflop(PUBLISHED, 1, 20, 0, 0) == pytest.approx(51.9, abs=0.05)
    assert published.candidates(BestOfN(), Budget(2000, "TFLOP"), 20) == 10
    three = SuccessiveHalving((5, 7, 12), (0.4, 0.5, 0.6))
    assert published.candidates(three, Budget(2000, "TFLOP"), 20) == 28


def test_the_published_convention_refuses_what_it_does_not_know():
    published = Published(FLUX)
    with pytest.raises(ValueError, match="not early selection"):
        published.candidates(EarlySelection(3), Budget(2000, "TFLOP"), 20)
    with pytest.raises(ValueError, match="TFLOP only"):
        published.candidates(BestOfN(), Budget(200, "NFE"), 20)
    with pytest.raises(ValueError, match="known are calls, published"):
        accounting_of("free", FLUX)


def test_the_cost_model_is_recorded_named_or_given(tmp_path):
    made = recording(tmp_path / "r.zarr", prompts=2)
    assert cost_model_of(made) == CostModel("made up", 1.0, 0.2, 0.3, 0.5)
    assert cost_model_of(made, "sdxl-1024").call_tflop == 13.52
    given = cost_model_of(made, call_tflop=4.0, look_tflop=1.0)
    assert (given.call_tflop, given.decode_tflop + given.look_tflop) == (4.0, 1.0)
    for options, message in (
        ({"name": "sd-9"}, "unknown cost model 'sd-9'; known are flux-512"),
        ({"call_tflop": 4.0}, "needed together"),
        ({"call_tflop": 0.0, "look_tflop": 1.0}, "more than 0"),
        ({"name": "flux-512", "call_tflop": 4.0, "look_tflop": 1.0}, "not both"),
    ):
        with pytest.raises(ValueError, match=message):
            cost_model_of(made, **options)
    made.provenance = {}
    with pytest.raises(ValueError, match="does not say what a call costs"):
        cost_model_of(made)
