"""Each newer family against its stock pipeline, on tiny random models of the same classes."""

from __future__ import annotations

import warnings
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch

from tests.samplers import tiny_flow
from tests.samplers.tiny import Redness
from ttsnap import samplers

PROMPTS = ["a red circle", "a blue square left of a green circle", "two yellow stars"]
SIZE = {"height": 32, "width": 64}


class Case(NamedTuple):
    """A tiny pipeline, options of its sampler, how many passes a call is made of, and options of the pipeline."""

    build: str
    options: dict
    passes: int = 1
    made: dict = MappingProxyType({})


CASES = {
    "FLUX.2": Case("flux2", {"guidance_scale": 2.0, "max_sequence_length": 64}),
    "FLUX.2 Klein": Case("flux2_klein", {"guidance_scale": 3.0, "max_sequence_length": 96}, 2),
    "FLUX.2 Klein distilled": Case("flux2_klein", {"max_sequence_length": 96}, 1, {"distilled": True}),
    "Qwen-Image": Case("qwen_image", {"true_cfg_scale": 3.0, "negative_prompt": "blurred"}, 2),
    "Qwen-Image without guidance": Case("qwen_image", {"guidance_scale": 1.0}),
    "Z-Image": Case("z_image", {"guidance_scale": 4.0, "negative_prompt": "blurred", "max_sequence_length": 128}, 2),
    "Z-Image, bounded guidance": Case(
        "z_image", {"cfg_normalization": 0.9, "cfg_truncation": 0.3, "max_sequence_length": 128}, 2
    ),
    "Z-Image Turbo": Case("z_image", {"guidance_scale": 0.0, "max_sequence_length": 128}),
    "Sana": Case("sana", {"max_sequence_length": 48, "negative_prompt": "blurred"}, 2),
    "Sana, Euler": Case("sana", {"max_sequence_length": 48}, 2, {"scheduler": "flow"}),
    "PixArt-Sigma": Case("pixart", {"max_sequence_length": 12, "negative_prompt": "a cyan square"}, 2),
    "PixArt-Sigma, Euler": Case(
        "pixart", {"max_sequence_length": 12, "guidance_scale": 1.0}, 1, {"scheduler": "euler"}
    ),
    "PixArt-Sigma, DDIM": Case("pixart", {"max_sequence_length": 12}, 2, {"scheduler": "ddim"}),
}
FAMILIES = ["FLUX.2", "FLUX.2 Klein", "Qwen-Image", "Z-Image", "Sana", "PixArt-Sigma"]


@cache
def pipeline(build: str, dtype=torch.float32, **made):
    return getattr(tiny_flow, build)(**made).to(dtype=dtype)


def sampler_of(case: Case, **options):
    pipe = pipeline(case.build, **case.made)
    return samplers.for_pipeline(pipe, **{"num_steps": 4, **SIZE, **case.options, **options})


def stock(sampler, prompt: str, seed: int, output_type: str):
    """What the pipeline itself makes with the line that reproduces a winner."""
    line = sampler.reproduce(prompt, seed).removesuffix(")") + f", output_type={output_type!r})"
    return eval(line, {"pipe": sampler.pipe, "torch": torch}).images


def latents_of(sampler, latents):
    """Latents as the pipeline returns them: FLUX.2 Klein unpacks them first."""
    klein = type(sampler.pipe).__name__ == "Flux2KleinPipeline"
    return sampler.unnormalised(sampler.spatial(latents)) if klein else latents


def check_close(found, expected, tolerance):
    """Within a tolerance of the largest value: latents of a random model that predicts noise are in the hundreds."""
    torch.testing.assert_close(found, expected, atol=tolerance * max(1.0, float(expected.abs().max())), rtol=0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_run_to_the_last_step_it_equals_the_stock_pipeline(case):
    sampler = sampler_of(case, max_batch=3)
    assert sampler.passes == case.passes
    mixed = sampler.start([*PROMPTS, PROMPTS[0]], [7, 8, 9, 10])
    mixed = sampler.advance(sampler.advance(mixed, 2), 4)
    images = sampler.decode(mixed.x0)
    torch.testing.assert_close(mixed.x0, mixed.latents)  # the last x0 estimate is the finished latent
    for row, (prompt, seed) in enumerate(zip(mixed.prompts, mixed.seeds, strict=True)):
        finished = latents_of(sampler, mixed.latents[row : row + 1])
        check_close(finished, stock(sampler, prompt, seed, "latent"), 2e-5)
        check_close(images[row : row + 1], stock(sampler, prompt, seed, "pt"), 5e-5)
    assert (mixed.latents[0] - mixed.latents[3]).abs().max() > 0.1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_candidate_does_not_depend_on_its_batch_nor_on_the_other_prompts(case):
    alone, together = sampler_of(case, max_batch=1), sampler_of(case, max_batch=8)
    prompts, seeds = [PROMPTS[i % 3] for i in range(5)], list(range(5))
    a = alone.advance(alone.start(prompts, seeds), 3)
    b = together.advance(together.start(prompts, seeds), 3)
    check_close(a.x0, b.x0, 1e-5)
    c = together.advance(together.start(prompts, seeds).select([4, 2]), 3)
    check_close(a.x0[[4, 2]], c.x0, 1e-5)
    other = together.advance(together.start([PROMPTS[1]], [0]), 3)
    assert (other.x0 - a.x0[:1]).abs().max() > 1e-4  # the prompt matters


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_prompts_are_encoded_once_and_alone(case, monkeypatch):
    sampler = sampler_of(case, max_batch=2)
    calls = []
    encode = sampler.pipe.encode_prompt

    def counted(*arguments, **options):
        calls.append(arguments[0] if arguments else options["prompt"])
        return encode(*arguments, **options)

    monkeypatch.setattr(sampler.pipe, "encode_prompt", counted)
    state = sampler.advance(sampler.start(PROMPTS * 2, list(range(6))), 1)
    sampler.advance(state, 2)
    assert len(calls) == len(set(calls)) == 3 + (case.passes == 2)
    assert set(PROMPTS) <= set(calls)


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_are_counted_without_weights_and_leave_the_model_alone(name):
    from torch._subclasses.fake_tensor import FakeTensor

    from ttsnap.samplers import flops

    sampler = sampler_of(CASES[name])
    before = sampler.advance(sampler.start(PROMPTS[:1], [1]), 1).x0
    ran = []

    def note(model, *_):
        ran.append(isinstance(next(model.parameters()), FakeTensor))

    with sampler.pipe.transformer.register_forward_pre_hook(note):
        counted = flops._count(sampler)
    assert ran == [True] * len(ran)  # without data, always
    assert min(counted) > 0
    assert counted == flops._count_parts(flops._twin(sampler, {}))
    torch.testing.assert_close(sampler.advance(sampler.start(PROMPTS[:1], [1]), 1).x0, before, atol=0, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_one_candidate_equals_the_stock_pipeline_bit_by_bit(name):
    case = CASES[name]
    pipe = pipeline(case.build, torch.bfloat16, **case.made)
    sampler = samplers.for_pipeline(pipe, num_steps=3, **SIZE, **case.options)
    done = sampler.advance(sampler.advance(sampler.start([PROMPTS[0]], [3]), 2), 3)
    assert done.x0.dtype == torch.float32
    assert torch.equal(latents_of(sampler, done.latents), stock(sampler, PROMPTS[0], 3, "latent"))
    assert torch.equal(sampler.decode(done.x0), stock(sampler, PROMPTS[0], 3, "pt").float())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_long_prompt_is_warned_about(name):
    case = CASES[name]
    sampler = sampler_of(case, max_sequence_length=case.options.get("max_sequence_length", 256))
    with pytest.warns(UserWarning, match=r"reads .* tokens, the prompt has 60\d; not read: 'x"):
        sampler.text("x" * 600)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.text(PROMPTS[0])


def test_other_schedulers_and_sizes_are_declined_in_one_sentence():
    from diffusers import FlowMatchHeunDiscreteScheduler

    for case in CASES.values():
        with pytest.raises(ValueError, match=r"multiples of \d+, got 34 x 32"):
            sampler_of(case, height=32, width=34)
    pipe = tiny_flow.z_image()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(samplers.Declined, match="needs a FlowMatchEulerDiscreteScheduler"):
        samplers.for_pipeline(pipe, sampler="adapter")


def test_a_whole_search_ends_in_an_image_that_the_stock_pipeline_makes():
    """With a multistep scheduler, whose candidates are dropped and go on in other batches."""
    import numpy as np

    import ttsnap
    from ttsnap.policies import SuccessiveHalving

    case = CASES["Sana"]
    pipe = pipeline(case.build)
    options = {"num_steps": 4, "max_sequence_length": 48, "max_batch": 3, **SIZE}
    policy = SuccessiveHalving((1, 3), (0.5, 0.5))
    found = ttsnap.search(pipe, PROMPTS[1], reward={"red": Redness()}, policy=policy, candidates=5, **options)
    assert "use_resolution_binning=False" in found.reproduce
    made = eval(found.reproduce, {"pipe": pipe, "torch": torch}).images[0]
    assert np.abs(np.asarray(made).astype(int) - np.asarray(found.image)).max() <= 1
    assert found.cost.nfe == 5 + 2 * 2 + 1
