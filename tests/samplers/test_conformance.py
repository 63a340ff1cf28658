"""What every sampler must do, whatever its family: the same as its stock pipeline, for any mix of candidates."""

from __future__ import annotations

import ast
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.samplers import tiny, tiny_any, tiny_flow, tiny_sd
from ttsnap import samplers
from ttsnap.environments.live import to_uint8

A, B = "a red circle", "a blue square left of a green circle"  # of different lengths
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
        size: height and width of the images.
        kept: dtype of latents in a pipeline in bfloat16.
        slow: a variant of a family that is among the fast ones.
    """

    build: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    unit: int = 8
    reads: str = "CLIP"
    passes: int = 2
    size: tuple[int, int] = (32, 48)
    kept: torch.dtype = torch.bfloat16
    slow: bool = False


def flow(build: Callable[..., Any], reads: str, unit: int = 4, passes: int = 2, **more: Any) -> Case:
    """A newer family: images twice as wide as high; `made` are options of the pipeline, all others of the sampler."""
    made = more.pop("made", {})
    own = {key: more.pop(key) for key in ("kept", "slow") if key in more}
    return Case(lambda: build(**made), more, unit, reads, passes, (32, 64), **own)


T5 = {"max_sequence_length": 12}
WORDS = {"max_sequence_length": 128}
CASES = {
    "flux": Case(lambda: tiny.flux(guidance_embeds=True, dynamic_shifting=True), T5, 4, "T5", 1),
    "flux, guided": Case(tiny.flux, T5 | {"negative_prompt": "a cyan square", "true_cfg_scale": 3.0}, 4, "T5"),
    "sd": Case(tiny_sd.stable_diffusion),
    "sd, unguided": Case(tiny_sd.stable_diffusion, {"guidance_scale": 1.0}, passes=1, slow=True),
    "sd, ddim": Case(tiny_sd.stable_diffusion, {"scheduler": "ddim", "negative_prompt": "a cyan square"}),
    "sd, dpm karras": Case(tiny_sd.stable_diffusion, {"scheduler": "dpm-karras"}),
    "sdxl": Case(tiny_sd.sdxl),
    "sdxl, karras": Case(
        tiny_sd.sdxl, {"scheduler": "euler-karras", "negative_prompt": "a cyan square", "guidance_rescale": 0.5}
    ),
    "sd3": Case(tiny_sd.sd3, T5, 4, "T5"),
    "FLUX.2": flow(tiny_flow.flux2, "Mistral3", passes=1, guidance_scale=2.0, max_sequence_length=64),
    "FLUX.2 Klein": flow(tiny_flow.flux2_klein, "Qwen3", guidance_scale=3.0, max_sequence_length=96),
    "FLUX.2 Klein distilled": flow(
        tiny_flow.flux2_klein, "Qwen3", passes=1, slow=True, made={"distilled": True}, max_sequence_length=96
    ),
    "Qwen-Image": flow(tiny_flow.qwen_image, "Qwen2.5-VL", true_cfg_scale=3.0, negative_prompt="blurred"),
    "Qwen-Image, unguided": flow(tiny_flow.qwen_image, "Qwen2.5-VL", passes=1, slow=True, guidance_scale=1.0),
    "Z-Image": flow(
        tiny_flow.z_image, "Qwen3", kept=torch.float32, guidance_scale=4.0, negative_prompt="blurred", **WORDS
    ),
    "Z-Image, bounded guidance": flow(
        tiny_flow.z_image,
        "Qwen3",
        kept=torch.float32,
        slow=True,
        cfg_normalization=0.9,
        cfg_truncation=0.3,
        **WORDS,
    ),
    "Z-Image Turbo": flow(tiny_flow.z_image, "Qwen3", passes=1, kept=torch.float32, guidance_scale=0.0, **WORDS),
    "Sana": flow(tiny_flow.sana, "Gemma", 32, kept=torch.float32, max_sequence_length=48, negative_prompt="blurred"),
    "Sana, Euler": flow(
        tiny_flow.sana, "Gemma", 32, kept=torch.float32, slow=True, made={"scheduler": "flow"}, max_sequence_length=48
    ),
    "PixArt-Sigma": flow(tiny_flow.pixart, "T5", 8, negative_prompt="a cyan square", **T5),
    "PixArt-Sigma, Euler": flow(
        tiny_flow.pixart, "T5", 8, passes=1, slow=True, made={"scheduler": "euler"}, guidance_scale=1.0, **T5
    ),
    "PixArt-Sigma, DDIM": flow(tiny_flow.pixart, "T5", 8, slow=True, made={"scheduler": "ddim"}, **T5),
}
OWN_CALLS = {
    "own call, dpm++": Case(tiny_any.stable_diffusion, {"sampler": "fallback"}),
    "own call, flux": Case(lambda: tiny.flux(guidance_embeds=True), T5 | {"sampler": "fallback"}),
}
CASES_AND_OWN_CALLS = CASES | OWN_CALLS


def named(cases: dict[str, Case]) -> Any:
    """Cases by name, those that are slow marked so."""
    marks = {True: [pytest.mark.slow], False: []}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[case.slow]) for name, case in cases.items()])


every, with_own_calls = named(CASES), named(CASES_AND_OWN_CALLS)
DEEP = ("FLUX.2", "FLUX.2 Klein", "Qwen-Image", "Z-Image Turbo")  # with many layers, or as Z-Image
families = named(
    {n: replace(case, slow=n in DEEP) for n, case in CASES.items() if "," not in n and "distilled" not in n}
)


@functools.cache
def pipeline(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return CASES_AND_OWN_CALLS[name].build().to(dtype=dtype)


def sampler_of(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    case = CASES_AND_OWN_CALLS[name]
    options = {"num_steps": 3, "height": case.size[0], "width": case.size[1]} | case.options | options
    return samplers.for_pipeline(pipeline(name, dtype), **options)


def given_out(sampler: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the pipeline returns them: FLUX.2 Klein unpacks them first."""
    klein = type(sampler.pipe).__name__ == "Flux2KleinPipeline"
    return sampler.unnormalised(sampler.spatial(latents)) if klein else latents


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
    assert sampler.passes == CASES_AND_OWN_CALLS[name].passes or name in OWN_CALLS
    done = sampler.advance(sampler.advance(sampler.start([A, B], [7, 8]), 1), 3)
    images = sampler.decode(done.x0)
    for row, (prompt, seed) in enumerate([(A, 7), (B, 8)]):
        rows = slice(row, row + 1)
        latents = stock(sampler, prompt, seed, "latent")
        largest = max(1.0, float(latents.abs().max()))  # of a random model that predicts noise, far above 1
        torch.testing.assert_close(given_out(sampler, done.latents[rows]), latents, atol=2e-5 * largest, rtol=1e-4)
        torch.testing.assert_close(images[rows], stock(sampler, prompt, seed, "pt"), atol=5e-5, rtol=1e-4)
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
    assert (done.latents.dtype, done.x0.dtype) == (CASES_AND_OWN_CALLS[name].kept, torch.float32)
    assert torch.equal(given_out(sampler, done.latents), stock(sampler, A, 3, "latent"))
    assert torch.equal(sampler.decode(done.x0), stock(sampler, A, 3, "pt").float())


@with_own_calls
def test_a_candidate_does_not_depend_on_its_batch(name):
    """Within 1e-5, times what guidance multiplies: other batch sizes may choose kernels that round differently."""
    alone, together = sampler_of(name, max_batch=1), sampler_of(name, max_batch=8)
    prompts, seeds = [A, B, A, B, A], [0, 1, 2, 3, 4]
    a = alone.advance(alone.start(prompts, seeds), 2).x0
    scales = (getattr(alone, scale, 1.0) for scale in ("guidance_scale", "true_cfg_scale"))
    guidance = max(scales) if alone.passes == 2 else 1.0
    close = {"atol": 1e-5 * max(1.0, guidance, float(a.abs().max())), "rtol": 1e-5}
    torch.testing.assert_close(together.advance(together.start(prompts, seeds), 2).x0, a, **close)
    some = together.advance(together.start(prompts, seeds).select([3, 2]), 2).x0
    torch.testing.assert_close(some, a[[3, 2]], **close)
    other = together.advance(together.start([B], [0]), 2).x0
    assert (other - a[:1]).abs().max() > 1e-4  # the prompt matters


@every
def test_prompts_are_encoded_once_and_alone_and_the_negative_one_for_all(name, monkeypatch):
    sampler = sampler_of(name, max_batch=2)
    pipe, calls = sampler.pipe, []
    encode = pipe.encode_prompt

    def counted(*arguments, **options):
        prompt = arguments[0] if arguments else options["prompt"]
        calls.append(prompt if isinstance(prompt, str) else prompt[0])
        return encode(*arguments, **options)

    monkeypatch.setattr(pipe, "encode_prompt", counted)
    sampler.advance(sampler.advance(sampler.start([A, B] * 2, [0, 1, 2, 3]), 1), 2)
    assert len(calls) == len(set(calls)) == 2 + (sampler.passes == 2)
    assert {A, B} <= set(calls)
    sampler.forget_prompts()
    sampler.text(A)
    assert calls.count(A) == 2


@with_own_calls
def test_noise_levels_fall_and_timesteps_lie_in_0_to_1000(name):
    sampler = sampler_of(name, num_steps=7)
    assert len(sampler.sigmas) == len(sampler.timesteps) == 7
    assert all(a > b > 0 for a, b in zip(sampler.sigmas, sampler.sigmas[1:], strict=False))
    assert all(1000 >= a > b >= 0 for a, b in zip(sampler.timesteps, sampler.timesteps[1:], strict=False))


@every
def test_wrong_sizes_and_options_are_refused_and_long_prompts_warned_about(name):
    unit = CASES[name].unit
    with pytest.raises(ValueError, match=rf"must be multiples of {unit}, got \d+ x {32 + unit // 2}"):
        sampler_of(name, height=32 + unit // 2)
    with pytest.raises(ValueError, match=r"no option 'magic'; it has .*num_steps, height, width, "):
        sampler_of(name, magic=1)
    sampler = sampler_of(name)
    with pytest.warns(UserWarning, match=rf"{CASES[name].reads}\w* reads .* tokens, the prompt has \d+; not read: '"):
        sampler.text(LONG)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sampler.text(B)


@families
def test_operations_are_counted_without_data_and_leave_the_model_alone(name):
    from torch._subclasses.fake_tensor import FakeTensor

    from ttsnap.samplers import flops

    sampler = sampler_of(name)
    before = sampler.advance(sampler.start([A], [1]), 1).x0
    ran = []

    def note(model, *_):
        ran.append(isinstance(next(model.parameters()), FakeTensor))

    denoiser = getattr(sampler.pipe, "transformer", None) or sampler.pipe.unet
    with denoiser.register_forward_pre_hook(note):
        counted = flops._count(sampler)
    assert ran == [True] * len(ran)  # without data, always
    assert min(counted) > 0
    assert counted == flops._count_parts(flops._twin(sampler, {}))
    assert torch.equal(sampler.advance(sampler.start([A], [1]), 1).x0, before)
