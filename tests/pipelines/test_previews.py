"""Previews: cheaper pictures for early looks, at their own price; finished images always use the full decoder."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from tests.pipelines import tiny, tiny_flow
from tests.pipelines.toy import Time, ToyReward, toy_sampler
from ttsnap.core.cost import Budget, CostModel, LookCost, affordable
from ttsnap.core.driver import run
from ttsnap.live.calibration import calibrate
from ttsnap.live.engine import Clock, Engine
from ttsnap.live.session import prepare
from ttsnap.pipelines import previews
from ttsnap.pipelines.flops import cost_model
from ttsnap.pipelines.sampler import Sampler
from ttsnap.policies import BestOfN, SuccessiveHalving
from ttsnap.replay.environment import ReplayEnvironment

SMALL = {"num_inference_steps": 4, "height": 32, "width": 48, "max_sequence_length": 12}


@pytest.fixture(scope="module")
def pipe():
    return tiny.flux()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A directory with a random tiny decoder for the latents of `pipe`."""
    torch.manual_seed(1)
    made = AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    folder = tmp_path_factory.mktemp("taesd")
    made.save_pretrained(folder)
    return folder


def sampler_of(pipe, preview, **options):
    sampler = Sampler(pipe, **SMALL, **options)
    previews.attach(sampler, preview)
    return sampler


def pictures(sampler, step=2):
    state = sampler.advance(sampler.start(["a red circle"] * 3, [1, 2, 3]), step)
    return sampler.look(state), state


def test_a_tiny_decoder_gets_the_latents_the_denoiser_sees(pipe, decoder):
    made, state = pictures(sampler_of(pipe, f"tiny={decoder}"))
    vae = AutoencoderTiny.from_pretrained(decoder)
    latents = pipe._unpack_latents(state.x0, 32, 48, pipe.vae_scale_factor)
    expected = pipe.image_processor.postprocess(vae.decode(latents).sample.detach(), output_type="pt")
    torch.testing.assert_close(made, expected)
    assert made.shape == (3, 3, 32, 48)


def test_in_the_pipeline_a_tiny_decoder_gives_the_same(pipe, decoder):
    """The stock pipeline with the tiny decoder as its VAE is the oracle of which latents it expects."""
    sampler = sampler_of(pipe, f"tiny={decoder}")
    done = sampler.advance(sampler.start(["a red circle"], [7]), 4)
    twin = type(pipe)(**{**pipe.components, "vae": sampler.preview.vae})
    twin.set_progress_bar_config(disable=True)
    twin.vae_scale_factor = pipe.vae_scale_factor
    twin.image_processor = pipe.image_processor
    stock = twin(
        "a red circle",
        generator=torch.Generator("cpu").manual_seed(7),
        height=32,
        width=48,
        num_inference_steps=4,
        max_sequence_length=12,
        output_type="pt",
    ).images
    torch.testing.assert_close(sampler.preview(sampler, sampler.spatial(done.x0)), stock, atol=2e-5, rtol=1e-4)


def test_small_pictures_are_the_decoded_average_of_the_latents(pipe):
    made, state = pictures(sampler_of(pipe, "small=24"))
    assert made.shape == (3, 3, 16, 24)
    sampler = Sampler(pipe, **SMALL)
    averaged = torch.nn.functional.avg_pool2d(sampler.spatial(state.x0), 2)
    torch.testing.assert_close(made, sampler.decode_spatial(averaged))


PACKED = {
    "FLUX.2": (tiny_flow.flux2, {"max_sequence_length": 64}),
    "FLUX.2 Klein": (tiny_flow.flux2_klein, {"max_sequence_length": 96}),
    "Qwen-Image": (tiny_flow.qwen_image, {}),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_latents_become_the_picture_that_the_full_decoder_gets(name):
    build, options = PACKED[name]
    sampler = Sampler(build(), num_inference_steps=3, height=32, width=64, **options)
    state = sampler.advance(sampler.start(["a red circle"] * 2, [1, 2]), 1)
    picture, (rows, columns) = sampler.spatial(state.x0), (8, 16)
    assert picture.shape == (2, 4, 2 * rows, 2 * columns)
    for place in ((0, 0), (3, 5), (7, 15)):  # a token is a patch of 2 x 2, channel by channel
        patch = state.x0[:, place[0] * columns + place[1]].reshape(2, 4, 2, 2)
        top, left = 2 * place[0], 2 * place[1]
        here = sampler.normalised(picture)[:, :, top : top + 2, left : left + 2]
        if name == "Qwen-Image":  # FLUX.2 moves its latents by statistics of their patches
            torch.testing.assert_close(here, patch, atol=1e-5, rtol=1e-5)
    full = sampler.look(state)
    previews.attach(sampler, "small=64")
    torch.testing.assert_close(sampler.look(state), full)
    for pixels, shape in ((32, (16, 32)), (20, (10, 20))):
        previews.attach(sampler, f"small={pixels}")
        latents = torch.nn.functional.interpolate(picture, [side // 2 for side in shape], mode="area")
        assert sampler.look(state).shape == (2, 3, *shape)
        torch.testing.assert_close(sampler.look(state), sampler.decode_spatial(latents))


@pytest.mark.parametrize("name", PACKED)
def test_where_packed_latents_have_no_cheap_map_a_sentence_says_so(name):
    build, options = PACKED[name]
    sampler = Sampler(build(), num_inference_steps=3, height=32, width=64, **options)
    if name == "Qwen-Image":  # its decoder is one of videos
        with pytest.raises(ValueError, match="has no linear preview; use full, tiny or small"):
            previews.attach(sampler, "linear")
    with pytest.raises(ValueError, match="no tiny decoder is known for"):
        previews.attach(sampler, "tiny")


def test_a_linear_map_is_fitted_where_colours_are_linear_in_the_latents():
    mixture = torch.tensor([[1.0, 0.2, 0.0], [0.3, 1.0, -0.4], [0.0, 0.5, 2.0], [1.0, 1.0, 1.0]])
    sampler = toy_sampler()
    sampler.encode_spatial = lambda images: torch.einsum("lc,nchw->nlhw", mixture, images) - 0.3
    fitted = previews.Linear.fit(sampler)
    colours = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fitted(sampler, sampler.encode_spatial(colours)), colours, atol=1e-4, rtol=1e-4)


def test_linear_pictures_have_the_size_of_the_latents(pipe):
    made, _ = pictures(sampler_of(pipe, "linear"))
    assert made.shape == (3, 3, 16, 24)
    assert made.min() >= 0
    assert made.max() <= 1


@pytest.mark.parametrize("kind", ["tiny", "small=16", "linear"])
def test_finished_images_use_the_full_decoder_and_early_looks_the_preview(pipe, decoder, kind):
    kind = f"tiny={decoder}" if kind == "tiny" else kind
    seen = []

    def judge(images, prompts, *, sigma):
        seen.append((sigma == 0.0, images.clone()))
        return images.mean((1, 2, 3))

    sampler = sampler_of(pipe, kind)
    environment = Engine(sampler, {"bright": judge}, Clock()).grid(["a red circle"], np.arange(4)[None])
    result = run(SuccessiveHalving((2,), keep=(0.5,)), environment)
    plain = Sampler(pipe, **SMALL)
    for finished, images in seen:
        state = plain.start(["a red circle"] * 4, [0, 1, 2, 3])
        state = plain.advance(state, 4 if finished else 2)
        if finished:
            rows = np.flatnonzero(result.finished[0]).tolist()
            torch.testing.assert_close(images, plain.decode(state.x0[rows]), atol=2e-5, rtol=1e-4)
        else:
            torch.testing.assert_close(
                images, sampler.preview(sampler, sampler.spatial(state.x0)), atol=2e-5, rtol=1e-4
            )
    assert environment.engine.clock.previews > 0
    assert environment.engine.clock.decodes > 0


@pytest.mark.parametrize("kind", ["tiny", "small=16", "linear", "full"])
def test_keep_all_costs_best_of_n_plus_its_looks_at_their_own_price(pipe, decoder, kind):
    sampler = sampler_of(pipe, f"tiny={decoder}" if kind == "tiny" else kind)
    judges = {"red": tiny.Redness()}
    model = cost_model(sampler, judges)
    assert [look.source for look in model.early] == ([] if kind == "full" else [kind.partition("=")[0]])
    seeds = np.arange(5)[None]
    keep_all = SuccessiveHalving((1, 3), keep=(1.0, 1.0))
    live, best = (
        run(policy, Engine(sampler, judges).grid(["a red circle"], seeds)) for policy in (keep_all, BestOfN())
    )
    replayed = run(keep_all, ReplayEnvironment(np.random.default_rng(0).normal(size=(1, 5, 4, 1))))
    paid, least = live.ledger.cost(model), best.ledger.cost(model)
    assert paid.tflop == pytest.approx(least.tflop + 5 * (model.look(1).tflop + model.look(3).tflop))
    assert replayed.ledger.cost(model) == dataclasses.replace(paid, seconds=pytest.approx(np.nan, nan_ok=True))
    assert model.of_plan(keep_all.plan(5, 4)).to_dict() == pytest.approx(paid.to_dict())
    early = 0 if kind == "full" else 10
    assert (paid.previews, paid.decodes, paid.looks) == (early, 15 - early, 15)
    assert (least.previews, least.decodes, least.looks) == (0, 5, 5)
    assert live.ledger.tflop(model)[0] == pytest.approx(paid.tflop)
    if kind != "full":
        assert model.look(1).picture_tflop < model.decode_tflop
        saved = CostModel.read(json.loads(json.dumps(model.tflops())))
        assert saved.tflops() == model.tflops()
        assert saved.look(3) == model.look(3)


def test_a_preview_may_serve_the_first_looks_only(pipe):
    sampler = Sampler(pipe, **SMALL)
    sampler.preview = previews.Small(16)
    sampler.preview.until = 2
    model = cost_model(sampler, {"red": tiny.Redness()})
    assert [model.look(step).source for step in (1, 2, 3, 4)] == ["small", "small", "full", "full"]
    assert [sampler.preview_at(step) is not None for step in (1, 2, 3, 4)] == [True, True, False, False]


def test_a_cheaper_look_buys_more_candidates():
    dear = CostModel("toy", 1.0, 5.0, 1.0)
    cheap = dataclasses.replace(dear, early=(LookCost("tiny", 3, 0.5, 1.0),))
    policy, budget = SuccessiveHalving((1,), keep=(0.25,)), Budget(100, "TFLOP")
    assert affordable(policy, budget, cheap, 4) > affordable(policy, budget, dear, 4)
    assert affordable(BestOfN(), budget, cheap, 4) == affordable(BestOfN(), budget, dear, 4)


@pytest.mark.parametrize("seconds", [9, 33.3])
def test_a_budget_in_seconds_knows_what_previews_take(seconds):
    clock = Time()

    class Quick(previews.Preview):
        name = "quick"

        def __call__(self, sampler, x0):
            clock.takes(0.03125, 0.015625, len(x0))
            return x0

    sampler, judges = toy_sampler(clock=clock), {"bright": ToyReward(clock)}
    sampler.preview = Quick()
    model = calibrate(sampler, judges, dataclasses.replace(cost_model(sampler, judges)), "a", clock)
    policy = SuccessiveHalving((1, 3), keep=(0.5, 0.5))
    n = affordable(policy, Budget(seconds, "s"), model, sampler.num_steps)

    def takes(candidates):
        start = clock()
        run(policy, Engine(sampler, judges).grid(["a"], np.arange(candidates)[None]))
        return clock() - start

    assert takes(n) <= seconds < 1.05 * takes(n + 1)  # batches of several steps are fuller than planned
    assert takes(n) == pytest.approx(model.of_plan(policy.plan(n, 4)).seconds, rel=0.05)


@pytest.fixture
def large(monkeypatch):
    """Whatever size the tests use is large."""
    monkeypatch.setattr(previews, "LARGE", 32)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def chosen(pipe, **options):
    return prepare(pipe, reward=options.pop("reward", tiny.Redness()), candidates=2, **SMALL, **options).sampler.preview


def test_of_large_images_a_search_saves_full_decodes_unless_told_otherwise(pipe, decoder, large):
    assert chosen(pipe).name == "small"
    assert chosen(pipe, preview="auto").name == "small"
    assert chosen(pipe, preview="full") is None
    assert chosen(pipe, preview=f"tiny={decoder}").name == "tiny"
    sampler = Sampler(pipe, **SMALL)
    previews.attach(sampler, None)
    assert sampler.preview is None  # what is recorded shows the model's own pictures


def test_the_record_says_what_early_looks_saw(pipe, large):
    policy = SuccessiveHalving((2,), keep=(0.5,))
    for preview, name in ((None, "small"), ("full", "full")):
        session = prepare(pipe, reward=tiny.Redness(), candidates=4, policy=policy, preview=preview, **SMALL)
        result = session.block(["a red circle"])[0]
        assert result.to_dict()["preview"] == name
        assert result.cost.previews == (4 if name == "small" else 0)


def test_of_small_images_the_full_decoder_is_as_good(pipe):
    assert chosen(pipe) is None


def test_a_tiny_decoder_beside_the_model_is_taken(pipe, decoder, large, tmp_path, monkeypatch):
    monkeypatch.setitem(previews.TINY, (4, pipe.vae.config.scaling_factor), "someone/taesd-of-tests")
    pipe.save_pretrained(tmp_path / "model")
    assert chosen(str(tmp_path / "model")).name == "small"
    (tmp_path / "taesd-of-tests").symlink_to(decoder)
    assert chosen(str(tmp_path / "model")).name == "tiny"


def test_a_reward_trained_on_decoded_estimates_goes_on_to_see_them(pipe, large):
    class Trained(tiny.Redness):
        def level(self, sigma):
            return sigma

    assert chosen(pipe, reward=Trained()) is None


BAD = {
    "blurry": "a preview is auto, full, tiny",
    "tiny=": "a preview is auto, full, tiny",
    "full=3": "a preview is auto, full, tiny",
    "small=0": "takes pixels",
    "small=big": "takes pixels",
    "tiny=/": "no config.json",
    "tiny=nowhere/at/all": "cannot load tiny decoder 'nowhere/at/all'",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_previews_are_refused(pipe, text, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=BAD[text]):
        previews.attach(Sampler(pipe, **SMALL), text)


def test_a_decoder_of_another_family_is_refused(pipe, tmp_path):
    AutoencoderTiny(
        latent_channels=7,
        encoder_block_out_channels=(4,),
        decoder_block_out_channels=(4,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reads 7 latent channels, FluxPipeline has 4"):
        previews.attach(Sampler(pipe, **SMALL), f"tiny={tmp_path}")


def test_a_search_says_how_many_previews_it_paid(pipe):
    searcher = prepare(
        pipe, reward=tiny.Redness(), candidates=4, policy=SuccessiveHalving((2,)), preview="small", **SMALL
    )
    result = searcher.block(["a red circle"])[0]
    cost = result.to_dict()["cost"]
    assert (cost["previews"], cost["decodes"], cost["looks"]) == (4, cost["looks"] - 4, cost["looks"])
    assert result.image.size == (48, 32)
    assert result.board().width > 1000
