"""Negative token merging on the UNets of SDXL and Stable Diffusion; tests/pipelines/test_negtome.py has the rest."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch

from tests.pipelines import tiny_sd
from tests.pipelines.test_negtome import CLOSE, A, B, plain
from ttsnap.pipelines.negtome import Negtome, applied, parse
from ttsnap.pipelines.negtome_sites import sites_of
from ttsnap.pipelines.sampler import Sampler

STRONG = Negtome(merging_alpha=1.0, merging_threshold=-1.0, t_end=400.0, min_attn_dim=4)


@functools.cache
def pipeline(build):
    return build()


def sampler_of(build=tiny_sd.sdxl, max_batch=8, **options):
    return Sampler(pipeline(build), num_inference_steps=4, height=32, width=32, max_batch=max_batch, **options)


def finish(sampler, prompts=(A, A, A), seeds=(1, 2, 3), to_step=4):
    return sampler.advance(sampler.start(prompts, seeds), to_step).latents


def names(sampler, parameters):
    modules = {module: name for name, module in sampler.pipe.unet.named_modules()}
    return [(modules[site.module], site.tokens) for site in sites_of(sampler, parameters)]


def test_published_parameters():
    with applied(sampler_of()) as state:
        found = state.parameters
    assert (found.merging_alpha, found.merging_threshold, found.t_start, found.t_end) == (1.9, 0.65, 1000, 900)
    assert (found.blocks, found.min_attn_dim) == ("up_blocks", 32)
    with applied(sampler_of(), parse("negtome", "merging_alpha=1.5,blocks=mid_block+up_blocks")) as state:
        assert (state.parameters.merging_alpha, state.parameters.blocks) == (1.5, "mid_block+up_blocks")
    with pytest.raises(ValueError, match=r"blocks are down_blocks, .*, got 'side_blocks'"):
        parse("negtome", "blocks=side_blocks")


def test_self_and_cross_attentions_of_the_upper_half_where_the_picture_is_large_enough():
    sampler = sampler_of()
    up = [f"up_blocks.0.attentions.{i}.transformer_blocks.{j}.attn{k}" for i in (0, 1) for j in (0, 1) for k in (1, 2)]
    assert names(sampler, STRONG) == [(name, 64) for name in up]
    assert names(sampler, Negtome(min_attn_dim=9)) == []
    everywhere = names(sampler, Negtome(blocks="down_blocks+mid_block+up_blocks", min_attn_dim=1))
    assert {name.split(".")[0] for name, _ in everywhere} == {"down_blocks", "mid_block", "up_blocks"}
    assert all(tokens == 64 for _, tokens in everywhere)


def test_full_size_sdxl_at_1024_takes_part_at_two_sizes_and_at_512_at_one():
    """The authors' SDXL: 30 blocks at 32 x 32 and 6 at 64 x 64, two attentions each."""
    from types import SimpleNamespace

    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**tiny_sd.SDXL_UNET)
    for size, expected in ((1024, {32 * 32: 60, 64 * 64: 12}), (512, {32 * 32: 12})):
        sampler = SimpleNamespace(pipe=SimpleNamespace(unet=unet, vae_scale_factor=8), height=size, width=size)
        tokens = [site.tokens for site in sites_of(sampler, Negtome())]
        assert {count: tokens.count(count) for count in set(tokens)} == expected


@pytest.mark.parametrize("build", [tiny_sd.sdxl, tiny_sd.stable_diffusion])
def test_a_call_is_the_plain_one_on_every_attention(build, monkeypatch):
    """Independent of the hooks: the attentions themselves are wrapped; each half of guidance is its own group."""
    sampler = sampler_of(build)
    with applied(sampler, STRONG):
        ours = finish(sampler, (A, A), (1, 2), 1)
    assert not torch.equal(ours, finish(sampler, (A, A), (1, 2), 1))
    for module, _, _ in sites_of(sampler, STRONG):

        def wrapped(*args, forward=module.forward, **kwargs):
            x = forward(*args, **kwargs)  # the negative half, then the prompt's: reference and candidate each
            return torch.stack([x[0], plain(x[1], x[0], STRONG), x[2], plain(x[3], x[2], STRONG)])

        monkeypatch.setattr(module, "forward", wrapped)
    torch.testing.assert_close(ours, finish(sampler, (A, A), (1, 2), 1), atol=1e-5, rtol=1e-5)


def test_nothing_to_do_is_stock_to_the_last_bit():
    sampler = sampler_of()
    stock = finish(sampler)
    for parameters in (
        Negtome(merging_alpha=0.0, min_attn_dim=4),
        Negtome(min_attn_dim=1000),
        Negtome(merging_threshold=-1, t_start=250, t_end=2, min_attn_dim=4),
    ):
        with applied(sampler, parameters):
            assert torch.equal(finish(sampler), stock)
    assert sum(len(m._forward_hooks) for m in sampler.pipe.unet.modules()) == 0


def double():
    """In fp32 the rounding of another batch can decide which of two nearly equal tokens is the best match."""
    return tiny_sd.sdxl().to(dtype=torch.float64)


SOME = Negtome(3.0, 0.7, 0.2, t_end=400.0, min_attn_dim=4)


@pytest.mark.parametrize(
    ("parameters", "options"), [(STRONG, {}), (SOME, {"guidance_scale": 1.0})], ids=["all guided", "some plain"]
)
def test_batches_do_not_matter_and_the_reference_stays(parameters, options):
    whole, split = sampler_of(double, **options), sampler_of(double, max_batch=1, **options)
    prompts, seeds = (A, A, B, A, B), (1, 2, 3, 4, 5)
    stock = finish(whole, prompts, seeds)
    with applied(whole, parameters) as state:
        together = finish(whole, prompts, seeds)
        assert state.extra_calls == 0
    assert torch.equal(together[[0, 2]], stock[[0, 2]])
    assert all(not torch.equal(together[row], stock[row]) for row in (1, 3, 4))
    with applied(split, parameters) as state:
        torch.testing.assert_close(finish(split, prompts, seeds), together, **CLOSE)
        assert state.extra_calls > 0


def test_generated_and_recorded_with_it(ttsnap, tmp_path):
    folder = tmp_path / "sdxl"
    tiny_sd.save(tiny_sd.sdxl, folder)
    options = [B, "--model", folder, "--steps", 4, "--diversity", "negtome", "--diversity-options", "min_attn_dim=4"]
    options += ["--reward", "tests.pipelines.tiny:redness", "--size", 32]
    code, out, err = ttsnap(
        "generate", *options, "--candidates", 4, "--rungs", 2, "--keep", 0.5, "--json", "--out", tmp_path / "out"
    )
    assert code == 0, err
    record = json.loads(out)
    assert record["diversity"]["merging_alpha"] == 1.9
    code, _, err = ttsnap("record", *options, "--per-prompt", 4, "--max-batch", 2, "--out", tmp_path / "rewards")
    assert code == 0, err
    from ttsnap.recordings import Recording

    recorded = Recording.open(tmp_path / "rewards").clean
    assert recorded.shape == (1, 4, 4, 1)
    assert np.isfinite(recorded).all()
