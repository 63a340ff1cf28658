"""Looks at features: nothing is decoded for them, they cost what their judge costs, and a replay knows all that."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.pipelines import tiny
from ttsnap.core.cost import CostModel
from ttsnap.core.driver import run
from ttsnap.live.calibration import calibrate
from ttsnap.live.engine import Clock, Engine
from ttsnap.pipelines.features import Features, Place
from ttsnap.pipelines.flops import cost_model
from ttsnap.pipelines.sampler import Sampler
from ttsnap.policies import SuccessiveHalving
from ttsnap.recordings.recorder import judge_all, record_rewards
from ttsnap.replay import Contender, EveryCall, cost_model_of, simulate
from ttsnap.replay.environment import ReplayEnvironment

PROMPTS = ["a red circle", "a blue square left of a green circle"]
SEEDS = np.arange(12).reshape(2, 6)
POLICY = SuccessiveHalving((1, 3), sizes=(4, 2))


class Reader:
    """Reads features of the first half of the way; elsewhere and in the end it judges redness."""

    places, clean_name = [Place("single_transformer_blocks.0", grid=2)], "red"

    def __init__(self):
        self.asked = []

    def level(self, sigma):
        return sigma if sigma >= 0.5 else None

    def early(self, features, prompts, *, sigma):
        self.asked.append((len(prompts), sigma))
        assert [len(words) for words in features.words] == [12] * len(prompts)
        return (features.cells @ torch.ones(features.cells.shape[-1], 1)).mean((1, 2)) + sigma

    def blank(self, device):
        return Features(torch.zeros(1, 4, 32), [torch.zeros(12, 128)])

    def __call__(self, images, prompts, *, sigma):
        return tiny.Redness()(images, prompts, sigma=sigma)


@pytest.fixture
def sampler():
    made = Sampler(tiny.flux(), num_inference_steps=6, height=32, width=32, max_sequence_length=12, max_batch=8)
    made.decoded = []
    decode = made.pipe.vae.decode
    made.pipe.vae.decode = lambda z, **k: made.decoded.append(len(z)) or decode(z, **k)
    return made


def test_nothing_is_decoded_for_looks_at_features(sampler):
    reward = Reader()
    environment = Engine(sampler, {"it": reward}, Clock()).grid(PROMPTS, SEEDS)
    result = run(POLICY, environment)
    assert reward.asked == [(8, 1.0), (4, 1.0), (8, sampler.sigmas[2])]
    assert sum(sampler.decoded) == 4
    assert environment.only_shown == 0
    assert environment.engine.clock.decodes > 0
    final = environment.finished
    assert len(final) == 4
    clean = tiny.Redness()
    for p, c in enumerate(result.chosen):
        image = torch.from_numpy(final[p, c]).permute(2, 0, 1)[None] / 255
        assert float(clean(image, [""], sigma=0.0)) == pytest.approx(result.rewards[p, 0], abs=2e-3)


def test_pictures_only_for_the_board_are_counted_apart(sampler):
    environment = Engine(sampler, {"it": Reader()}).grid(PROMPTS, SEEDS, previews=True)
    plain = Engine(sampler, {"it": Reader()}).grid(PROMPTS, SEEDS)
    results = [run(POLICY, one) for one in (environment, plain)]
    assert environment.only_shown == 12 + 8
    assert len(environment.pictures) == 12 + 8 + 4
    np.testing.assert_array_equal(results[0].rewards, results[1].rewards)


def test_a_look_at_features_costs_its_judge_and_no_picture(sampler):
    model = cost_model(sampler, {"it": Reader()})
    plain = cost_model(sampler, {"red": tiny.Redness()})
    (early,) = model.early
    assert (early.source, early.until, early.picture_tflop) == ("features", 4, 0.0)
    assert early.judge_tflop == 2 * 4 * 32 / 1e12
    assert model.look(5).tflop == model.look(6).tflop == plain.look(1).tflop
    plan = POLICY.plan(6, 6)
    saved = (6 + 4) * (plain.look(1).tflop - early.tflop)
    assert plain.of_plan(plan).tflop - model.of_plan(plan).tflop == pytest.approx(saved)
    assert model.of_plan(plan).decodes == 2
    assert model.under("clean") == plain.under("clean")
    mixed = cost_model(sampler, {"it": Reader(), "red": tiny.Redness()})
    assert [look.source for look in mixed.early] == ["full"]
    assert mixed.look(1).tflop == pytest.approx(plain.look(1).tflop + early.judge_tflop)
    assert CostModel.read(model.tflops()).look(3) == model.look(3)


def test_the_books_of_a_search_are_those_of_its_plan(sampler):
    model = cost_model(sampler, {"it": Reader()})
    result = run(POLICY, Engine(sampler, {"it": Reader()}).grid(PROMPTS, SEEDS))
    paid, planned = result.ledger.cost(model, 0), model.of_plan(POLICY.plan(6, 6))
    assert (paid.nfe, paid.decodes, paid.looks) == (planned.nfe, planned.decodes, planned.looks) == (6 + 8 + 6, 2, 12)
    assert paid.tflop == pytest.approx(planned.tflop)


def test_replayed_it_makes_the_same_choice_at_the_same_cost(sampler, tmp_path):
    """The recording keeps what the head said as noise-aware values, and what its looks cost."""
    recording = record_rewards(sampler, {"it": Reader()}, PROMPTS, SEEDS, tmp_path / "both")
    assert recording.rewards == ("red",)
    assert np.isfinite(recording.aware[:, :, :4]).all()
    assert np.isnan(recording.aware[:, :, 4:]).all()
    live = run(POLICY, Engine(sampler, {"it": Reader()}).grid(PROMPTS, SEEDS))
    replayed = run(POLICY, ReplayEnvironment(recording.guide("aware")))
    np.testing.assert_array_equal(live.chosen, replayed.chosen)
    np.testing.assert_allclose(live.rewards, replayed.rewards, atol=1e-5)
    model = cost_model_of(recording)
    assert model == CostModel.read(cost_model(sampler, {"it": Reader()}).tflops())
    np.testing.assert_allclose(live.ledger.tflop(model), replayed.ledger.tflop(model))
    budget = model.of_plan(POLICY.plan(6, 6))
    contenders = [Contender(kind, POLICY, kind) for kind in ("aware", "clean")]
    from ttsnap.core.cost import Budget

    rows = simulate(recording, contenders, [Budget(budget.tflop, "TFLOP")], EveryCall(model), trials=3).dataset
    assert rows.candidates.values[:, 0].tolist()[0] == 6
    assert rows.candidates.values[:, 0].tolist()[1] < 6  # a clean guide must decode its looks


def test_a_queue_of_prompts_decodes_as_little(sampler):
    alone = run(POLICY, Engine(sampler, {"it": Reader()}).grid(PROMPTS, SEEDS))
    sampler.decoded.clear()
    ended = sorted(Engine(sampler, {"it": Reader()}).stream(PROMPTS, SEEDS, POLICY), key=lambda one: one.number)
    assert [one.error for one in ended] == [None, None]
    assert [int(one.result.chosen[0]) for one in ended] == alone.chosen.tolist()
    assert sum(sampler.decoded) == 4


def test_searches_that_take_turns_on_one_sampler_keep_their_own_features(sampler):
    one, other = (
        Engine(sampler, rewards).grid(PROMPTS, SEEDS) for rewards in ({"it": Reader()}, {"red": tiny.Redness()})
    )
    assert sampler.tap is None
    assert run(POLICY, one).finished.sum() == 4
    run(POLICY, other)
    assert sampler.tap is None


def test_calibration_measures_looks_at_features(sampler):
    rewards = {"it": Reader()}
    model = calibrate(sampler, rewards, cost_model(sampler, rewards), PROMPTS[0], patience=0.1)
    (early,) = model.early
    assert early.picture_seconds is not None
    assert early.judge_seconds is not None
    assert early.judge_seconds.each + early.judge_seconds.fixed + early.picture_seconds.fixed < model.decode_seconds(
        1, 1
    )


def test_images_hold_no_features():
    with pytest.raises(ValueError, match="it reads the denoiser's features, which no image holds"):
        judge_all({"it": Reader()}, torch.rand(2, 3, 8, 8), PROMPTS, 0.75)
