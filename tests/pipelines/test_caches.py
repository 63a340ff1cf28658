"""Denoiser calls with a cache: each candidate has its own state, and the picture of the stock call with that cache."""

from __future__ import annotations

import diffusers
import numpy
import pytest
import torch

import ttsnap
from tests.pipelines import tiny, tiny_flow, tiny_sd
from ttsnap.live.session import load_sampler
from ttsnap.pipelines import caches
from ttsnap.pipelines.counting import count_tflop
from ttsnap.pipelines.forks import Turn, forked
from ttsnap.pipelines.sampler import Sampler
from ttsnap.policies import SuccessiveHalving

CALL = {"num_inference_steps": 6, "height": 32, "width": 32}
QWEN = {**CALL, "true_cfg_scale": 3.0, "negative_prompt": "blurred"}
PROMPTS = ["a red circle", "a blue square", "a red circle"]
SEEDS = [3, 4, 5]
WHOLE = (  # caches with options with which the tiny models skip some calls, and not all
    "FirstBlock,threshold=.3",
    "TaylorSeer,cache_interval=3,disable_cache_before_step=2,max_order=1,taylor_factors_dtype=float32",
    "Mag,mag_ratios=1;.99;.98;.97;.96;.95,threshold=.2,max_skip_steps=2,retention_ratio=.2",
    "PAB,spatial_attention_block_skip_range=2,spatial_attention_block_identifiers=transformer_blocks",
    "Faster,is_guidance_distilled=true,spatial_attention_block_identifiers=transformer_blocks",
)


def flux():
    """FLUX with two blocks of each kind."""
    pipe = tiny.flux()
    torch.manual_seed(6)
    config = dict(pipe.transformer.config) | {"num_layers": 2, "num_single_layers": 2}
    pipe.register_modules(transformer=type(pipe.transformer).from_config(config).eval().requires_grad_(False))
    return pipe


def stock(pipe, text, arguments):
    """Pictures [n, 3, h, w] of the stock pipeline with the cache that the line of `attach` gives it."""
    cache = caches.Cache(*caches.read_cache(text))
    cache.options |= {"num_inference_steps": 6} if cache.kind == "Mag" else {}
    pipe.transformer.enable_cache(eval(cache.written, {"diffusers": diffusers, "torch": torch, "pipe": pipe}))
    made = [
        pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="pt", **arguments).images
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    pipe.transformer.disable_cache()
    return torch.cat(made)


def compared(pipe, text, arguments):
    """How far candidates, pruned on the way, end from the stock calls, and how far these are from whole calls."""
    expected = stock(pipe, text, arguments)
    plain = Sampler(pipe, example="a", **arguments)
    whole = plain.look(plain.advance(plain.start(PROMPTS, SEEDS), 6))
    sampler = load_sampler(pipe, cache=text, **arguments)
    half = sampler.advance(sampler.start(PROMPTS, SEEDS), 3)
    last = sampler.advance(half.select([0, 2]), 6)  # the batch is another one from here on
    late = sampler.advance(half.select([1]), 6)
    made = torch.cat([sampler.look(last), sampler.look(late)])[[0, 2, 1]]
    assert not pipe.transformer.is_cache_enabled
    return (made - expected).abs().max().item(), (whole - expected).abs().max().item(), sampler.cache


@pytest.mark.parametrize("text", [*WHOLE[:2], *(pytest.param(text, marks=pytest.mark.slow) for text in WHOLE[2:])])
def test_candidates_of_a_batch_end_where_the_stock_calls_with_the_cache_do(text):
    apart, from_whole, cache = compared(flux(), text, CALL)
    assert apart < 1e-4
    assert from_whole > 1e-3  # the cache did something
    assert 0 < cache.computed < cache.asked


@pytest.mark.slow
@pytest.mark.parametrize("text", WHOLE[:3])
def test_passes_of_guidance_have_states_of_their_own(text):
    pipe = tiny_flow.qwen_image()
    for parameter in pipe.transformer.transformer_blocks.parameters():
        parameter.mul_(2)  # so that the blocks matter
    apart, from_whole, cache = compared(pipe, text, QWEN)
    assert apart < 1e-4
    assert from_whole > 1e-3
    assert 0 < cache.computed < cache.asked


@torch.no_grad()
def test_a_fork_goes_on_with_what_its_parent_kept():
    pipe, text = flux(), WHOLE[1]
    sampler = load_sampler(pipe, cache=text, **CALL)
    parent = sampler.advance(sampler.start(["a"], [3]), 4)
    call, level = parent.calls[0], sampler.probe.levels[3]
    child = sampler.begin("a", 3, standing=forked(sampler, call, Turn(4, 0.0, 7, *level)))
    sampler.aim([child], 6)
    sampler.bring([child])
    twin, own = sampler.gather([child], 6), sampler.advance(parent, 6)
    assert torch.allclose(twin.latents, own.latents, atol=1e-5)


def test_a_search_says_what_the_cache_computed_and_gives_the_line():
    result = ttsnap.search(
        flux(), "a red circle", reward=tiny.redness, candidates=3, policy="best-of-n", cache=WHOLE[0], **CALL
    )
    assert result.reproduce.startswith(
        "pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.3)); "
    )
    assert any("of the blocks that it watches were computed" in note for note in result.notes)
    assert any("one candidate at a time" in note for note in result.notes)


def test_what_a_cache_saves_is_what_the_stock_call_with_it_does_without():
    pipe, text = flux(), WHOLE[1]
    sampler = load_sampler(pipe, cache=text, **CALL)
    state = sampler.advance(sampler.start(["a"] * 2, [3, 4]), 6)
    generator = torch.Generator("cpu")
    whole = count_tflop(lambda: pipe("a", generator=generator, output_type="latent", **CALL))
    pipe.transformer.enable_cache(caches.Cache(*caches.read_cache(text)).config(lambda: None))
    cached = count_tflop(lambda: pipe("a", generator=generator, output_type="latent", **CALL))
    pipe.transformer.disable_cache()
    assert [call.saved for call in state.calls] == pytest.approx([whole - cached] * 2)
    assert 0 < whole - cached < whole
    assert sum(sampler.cache.shares) * sampler.probe.step_tflop == pytest.approx(
        6 * sampler.probe.step_tflop + cached - whole
    )


@pytest.mark.parametrize("policy", ["halving", pytest.param("svdd", marks=pytest.mark.slow)])
def test_a_search_with_drafts_finishes_with_whole_calls_and_pays_for_both(policy):
    pipe, text = flux(), WHOLE[1].replace("disable_cache_before_step=2", "disable_cache_before_step=1")
    if policy == "halving":
        policy = SuccessiveHalving((4,), (0.5,))
    session, plain = (
        ttsnap.prepare(pipe, reward=tiny.redness, candidates=4, policy=policy, report=None, draft_cache=drafts, **CALL)
        for drafts in (text, None)
    )
    block = session.open(["a red circle"])
    block.run()
    result = block.results()[0]
    drafted, finished = result.cost.nfe, result.finished
    assert drafted == plain.block(["a red circle"])[0].cost.nfe + 4 * finished  # which were begun again
    model = session.cost_model
    looks = block.result.ledger.looks_by_step[0]
    assert 0 < block.grid.saved[0] < drafted * model.call_tflop
    assert result.cost.tflop == pytest.approx(model.tflop(drafted, looks) - block.grid.saved[0])
    planned = model.of_plan(session.policy.plan(4, 6))
    assert planned.nfe == drafted
    if not result.lineage:
        assert planned.tflop == pytest.approx(result.cost.tflop)
    prelude, _, call = result.reproduce.rpartition("\n" if result.lineage else "; ")
    names = {"pipe": pipe, "torch": torch, "ttsnap": ttsnap}
    exec(prelude, names)
    assert "cache" not in result.reproduce
    stock, found = (numpy.asarray(image, dtype=int) for image in (eval(call, names).images[0], result.image))
    assert numpy.abs(stock - found).max() <= 1  # of 255: the batch was another, which rounds differently


def test_what_does_not_fit_is_one_sentence():
    for text, message in (
        ("Teapot", "unknown cache 'Teapot'; known are FirstBlock"),
        ("FirstBlock,treshold=.1", "takes no option 'treshold'; did you mean threshold"),
        ("Mag", "needs mag_ratios"),
        ("Mag,mag_ratios=1;x", "mag_ratios takes numbers such as 1;.99;.98, got 'x'"),
        ("FirstBlock,.1", "an option is written as --cache FirstBlock"),
    ):
        with pytest.raises(ValueError, match=message):
            caches.read_cache(text)
    with pytest.raises(ValueError, match=r"StableDiffusionXLPipeline (takes no cache in diffusers|does not)"):
        load_sampler(tiny_sd.sdxl(), cache="FirstBlock", **CALL)
    with pytest.raises(ValueError, match="does not go with compile"):
        load_sampler("shapes", cache="FirstBlock", compile=True)
    with pytest.raises(ValueError, match="does not go with a draft cache"):
        load_sampler("shapes", cache="FirstBlock", draft_cache="FirstBlock")
    with pytest.raises(ValueError, match="needs whole calls"):
        ttsnap.search("shapes", "a red circle", cache="FirstBlock", candidates=2)
