"""What every sampler must do, whatever its family: the same as its stock pipeline, for any mix of candidates."""

from __future__ import annotations

import ast
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from tests.samplers import tiny, tiny_any, tiny_sd
from ttsnap import samplers
from ttsnap.environments.live import to_uint8

A, B = "a red circle", "a blue square left of a green circle"
LONG = " ".join(["a red circle left of a blue square above a green circle"] * 30)


@dataclass(frozen=True)
class Case:
    """A family.

    Attributes:
        build: makes its tiny random pipeline.
        options: of the sampler.
        unit: width and height must be multiples of it.
        reads: the encoder whose limit a long prompt exceeds.
        passes: per call.
    """

    build: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    unit: int = 8
    reads: str = "CLIP"
    passes: int = 2


T5 = {"max_sequence_length": 12}
CASES = {
    "flux": Case(lambda: tiny.flux(guidance_embeds=True, dynamic_shifting=True), T5, 4, "T5", 1),
    "flux, guided": Case(tiny.flux, T5 | {"negative_prompt": "a cyan square", "true_cfg_scale": 3.0}, 4, "T5"),
    "sd": Case(tiny_sd.stable_diffusion),
    "sd, unguided": Case(tiny_sd.stable_diffusion, {"guidance_scale": 1.0}, passes=1),
    "sd, ddim": Case(tiny_sd.stable_diffusion, {"scheduler": "ddim", "negative_prompt": "a cyan square"}),
    "sd, dpm karras": Case(tiny_sd.stable_diffusion, {"scheduler": "dpm-karras"}),
    "sdxl": Case(tiny_sd.sdxl),
    "sdxl, karras": Case(
        tiny_sd.sdxl, {"scheduler": "euler-karras", "negative_prompt": "a cyan square", "guidance_rescale": 0.5}
    ),
    "sd3": Case(tiny_sd.sd3, T5, 4, "T5"),
}
every = pytest.mark.parametrize("name", CASES)
OWN_CALLS = {
    "own call, dpm++": Case(tiny_any.stable_diffusion, {"sampler": "fallback"}),
    "own call, flux": Case(lambda: tiny.flux(guidance_embeds=True), T5 | {"sampler": "fallback"}),
}
CASES_AND_OWN_CALLS = CASES | OWN_CALLS
with_own_calls = pytest.mark.parametrize("name", CASES_AND_OWN_CALLS)


@functools.cache
def pipeline(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return CASES_AND_OWN_CALLS[name].build().to(dtype=dtype)


def sampler_of(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    options = {"num_steps": 3, "height": 32, "width": 48} | CASES_AND_OWN_CALLS[name].options | options
    return samplers.for_pipeline(pipeline(name, dtype), **options)


def stock(sampler: Any, prompt: str, seed: int, kind: str) -> torch.Tensor:
    """What the pipeline itself makes; with its own scheduler back in place afterwards."""
    *before, call = sampler.reproduce(prompt, seed).splitlines()
    assert call.endswith(")")
    return evaluate(sampler.pipe, "\n".join([*before, f"{call[:-1]}, output_type={kind!r})"])).images


def evaluate(pipe: Any, code: str) -> Any:
    """The value of the last line."""
    import diffusers

    names = {"pipe": pipe, "torch": torch, "diffusers": diffusers}
    body = ast.parse(code).body
    scheduler = pipe.scheduler
    try:
        exec(compile(ast.Module(body[:-1], []), "reproduce", "exec"), names)
        return eval(compile(ast.Expression(body[-1].value), "reproduce", "eval"), names)
    finally:
        pipe.scheduler = scheduler


@with_own_calls
def test_run_to_the_last_step_it_equals_the_stock_pipeline(name):
    sampler = sampler_of(name)
    done = sampler.advance(sampler.advance(sampler.start([A, B], [7, 8]), 1), 3)
    images = sampler.decode(done.x0)
    for row, (prompt, seed) in enumerate([(A, 7), (B, 8)]):
        rows = slice(row, row + 1)
        latents = stock(sampler, prompt, seed, "latent")
        largest = max(1.0, float(latents.abs().max()))  # of a random model that predicts noise, far above 1
        torch.testing.assert_close(done.latents[rows], latents, atol=2e-5 * largest, rtol=1e-4)
        torch.testing.assert_close(images[rows], stock(sampler, prompt, seed, "pt"), atol=2e-5, rtol=1e-4)
    picture = evaluate(sampler.pipe, sampler.reproduce(B, 8)).images[0]
    assert np.abs(np.asarray(picture).astype(int) - to_uint8(images)[1]).max() <= 1


@with_own_calls
def test_the_last_x0_estimate_is_the_finished_latent(name):
    sampler = sampler_of(name)
    begun = sampler.advance(sampler.start([A], [1]), 1)
    assert (begun.x0 - begun.latents.float()).abs().max() > 1e-3
    done = sampler.advance(begun, 3)
    torch.testing.assert_close(done.x0, done.latents.float())


@with_own_calls
def test_in_half_precision_one_candidate_is_the_stock_one_bit_by_bit(name):
    sampler = sampler_of(name, torch.bfloat16)
    done = sampler.advance(sampler.advance(sampler.start([A], [3]), 1), 3)
    assert (done.latents.dtype, done.x0.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(done.latents, stock(sampler, A, 3, "latent"))
    assert torch.equal(sampler.decode(done.x0), stock(sampler, A, 3, "pt").float())


@with_own_calls
def test_a_candidate_does_not_depend_on_its_batch(name):
    """Within 1e-5, times what guidance multiplies: other batch sizes may choose kernels that round differently."""
    alone, together = sampler_of(name, max_batch=1), sampler_of(name, max_batch=8)
    prompts, seeds = [A, B, A, B, A], [0, 1, 2, 3, 4]
    a = alone.advance(alone.start(prompts, seeds), 2).x0
    guidance, largest = alone.guidance_scale if alone.passes == 2 else 1.0, float(a.abs().max())
    close = {"atol": 1e-5 * max(1.0, guidance, largest), "rtol": 1e-5}
    torch.testing.assert_close(together.advance(together.start(prompts, seeds), 2).x0, a, **close)
    some = together.advance(together.start(prompts, seeds).select([3, 2]), 2).x0
    torch.testing.assert_close(some, a[[3, 2]], **close)


@every
def test_a_prompt_is_encoded_once_and_the_negative_one_for_all(name, monkeypatch):
    sampler = sampler_of(name, max_batch=2)
    pipe, calls = sampler.pipe, []
    encode = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda *a, **k: calls.append(1) or encode(*a, **k))
    sampler.advance(sampler.advance(sampler.start([A, B] * 2, [0, 1, 2, 3]), 1), 2)
    once = len(calls)
    assert 2 <= once <= 3
    sampler.forget_prompts()
    sampler.text(A)
    assert len(calls) > once


@with_own_calls
def test_noise_levels_fall_and_timesteps_lie_in_0_to_1000(name):
    sampler = sampler_of(name, num_steps=7)
    assert len(sampler.sigmas) == len(sampler.timesteps) == 7
    assert all(a > b > 0 for a, b in zip(sampler.sigmas, sampler.sigmas[1:], strict=False))
    assert all(1000 >= a > b >= 0 for a, b in zip(sampler.timesteps, sampler.timesteps[1:], strict=False))


@every
def test_wrong_sizes_and_options_are_refused_and_long_prompts_warned_about(name):
    unit = CASES[name].unit
    with pytest.raises(ValueError, match=f"must be multiples of {unit}, got 48 x {32 + unit // 2}"):
        sampler_of(name, height=32 + unit // 2)
    with pytest.raises(ValueError, match=r"no option 'magic'; it has .*num_steps, height, width, "):
        sampler_of(name, magic=1)
    sampler = sampler_of(name)
    with pytest.warns(UserWarning, match=f"{CASES[name].reads} reads .* tokens, the prompt has"):
        sampler.text(LONG)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sampler.text(B)


@pytest.mark.parametrize("name", ["flux", "sd", "sdxl", "sd3"])
def test_operations_are_counted_without_data(name, monkeypatch):
    from ttsnap.samplers import flops

    sampler = sampler_of(name)
    assert sampler.passes == CASES[name].passes
    counted = flops._count_parts(flops._twin(sampler, {}))
    assert min(counted) > 0
    twin, with_copies = flops._twin, []
    monkeypatch.setattr(
        flops, "_twin", lambda sampler, models: with_copies.append(bool(models)) or twin(sampler, models)
    )
    assert flops._count(sampler) == counted
    assert with_copies[-1]  # the last try needed no data
