from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from tests.samplers import tiny
from ttsnap import samplers

PROMPTS = ["a red circle", "a blue square left of a green circle"]
SIZE = {"height": 32, "width": 48}
SMALL = {"height": 32, "width": 32, "max_sequence_length": 12}
CASES = {
    "guidance-distilled": ({"guidance_embeds": True}, {"guidance_scale": 2.0}, 5),
    "dynamic shifting": ({"guidance_embeds": True, "dynamic_shifting": True}, {}, 5),
    "schnell": ({}, {}, 4),
    "static shift": ({"shift": 3.0}, {}, 4),
    "true CFG": ({}, {"negative_prompt": "a cyan triangle", "true_cfg_scale": 3.0}, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_run_to_the_last_step_it_equals_the_stock_pipeline(case):
    build, options, steps = CASES[case]
    pipe = tiny.flux(**build)
    sampler = samplers.for_pipeline(pipe, num_steps=steps, max_sequence_length=12, max_batch=3, **SIZE, **options)
    mixed = sampler.start(PROMPTS * 2, [7, 8, 9, 10])
    mixed = sampler.advance(sampler.advance(mixed, 2), steps)
    images = sampler.decode(mixed.x0)
    for row, (prompt, seed) in enumerate(zip(mixed.prompts, mixed.seeds, strict=True)):
        call = dict(num_inference_steps=steps, max_sequence_length=12, **SIZE, **options)
        stock = pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="latent", **call).images
        torch.testing.assert_close(mixed.latents[row : row + 1], stock, atol=2e-5, rtol=1e-4)
        stock = pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="pt", **call).images
        torch.testing.assert_close(images[row : row + 1], stock, atol=2e-5, rtol=1e-4)


def test_the_last_x0_estimate_is_the_finished_latent():
    sampler = samplers.for_pipeline(tiny.flux(), num_steps=4, **SMALL)
    done = sampler.advance(sampler.start(PROMPTS, [1, 2]), 4)
    torch.testing.assert_close(done.x0, done.latents)


def test_a_candidate_does_not_depend_on_its_batch():
    """Within 1e-5: other batch sizes may choose other kernels, which round differently."""
    pipe = tiny.flux()
    alone = samplers.for_pipeline(pipe, num_steps=4, **SMALL, max_batch=1)
    together = samplers.for_pipeline(pipe, num_steps=4, **SMALL, max_batch=8)
    prompts, seeds = [PROMPTS[i % 2] for i in range(8)], list(range(8))
    a = alone.advance(alone.start(prompts, seeds), 3)
    b = together.advance(together.start(prompts, seeds), 3)
    torch.testing.assert_close(a.x0, b.x0, atol=1e-5, rtol=1e-5)
    c = together.advance(together.start(prompts, seeds).select([5, 2]), 3)
    torch.testing.assert_close(a.x0[[5, 2]], c.x0, atol=1e-5, rtol=1e-5)


def test_a_prompt_is_encoded_once():
    pipe = tiny.flux()
    sampler = samplers.for_pipeline(pipe, num_steps=4, **SMALL, max_batch=2)
    calls = []
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda **options: calls.append(options["prompt"]) or encode(**options)
    state = sampler.advance(sampler.start(PROMPTS * 4, list(range(8))), 2)
    sampler.advance(state, 4)
    assert calls == [[prompt] for prompt in PROMPTS]


def test_out_of_memory_halves_the_batch_and_loses_nothing():
    sampler = samplers.for_pipeline(tiny.flux(), num_steps=3, **SMALL, max_batch=8)
    whole = sampler.advance(sampler.start(PROMPTS * 4, list(range(8))), 3)
    call = sampler.call
    sizes = []

    def small_machine(latents, encoded, index):
        if len(encoded) > 2:
            raise torch.OutOfMemoryError("full")
        sizes.append(len(encoded))
        return call(latents, encoded, index)

    sampler.call = small_machine
    with pytest.warns(UserWarning, match="at most 4 in a batch"), pytest.warns(UserWarning, match="at most 2 in a"):
        again = sampler.advance(sampler.start(PROMPTS * 4, list(range(8))), 3)
    torch.testing.assert_close(again.latents, whole.latents, atol=1e-5, rtol=1e-5)
    assert set(sizes) == {2}
    sampler.max_batch = 1
    sampler.call = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    with pytest.raises(MemoryError, match="one image of 32 x 32 does not fit"):
        sampler.advance(sampler.start(PROMPTS, [1, 2]), 3)


def test_a_long_prompt_is_warned_about():
    sampler = samplers.for_pipeline(tiny.flux(), num_steps=3, **SMALL)
    with pytest.warns(UserWarning, match="T5 reads 12 tokens, the prompt has"):
        sampler.text("a red circle left of a blue square above a green circle below a cyan square")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.text(PROMPTS[1])


def test_unknown_pipelines_and_schedulers_are_refused():
    with pytest.raises(ValueError, match="a pipeline with a scheduler that takes prompt and generator; dict is none"):
        samplers.for_pipeline({})
    pipe = tiny.flux()
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="needs a FlowMatchEulerDiscreteScheduler"):
        samplers.for_pipeline(pipe, sampler="adapter")
    with pytest.raises(ValueError, match="multiples of"):
        samplers.for_pipeline(tiny.flux(), height=33, width=32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_one_candidate_equals_the_stock_pipeline_bit_by_bit(dtype):
    pipe = tiny.flux(guidance_embeds=True, dynamic_shifting=True).to(dtype=dtype)
    sampler = samplers.for_pipeline(pipe, num_steps=4, **SMALL)
    done = sampler.advance(sampler.advance(sampler.start([PROMPTS[0]], [3]), 2), 4)
    assert (done.latents.dtype, done.x0.dtype) == (dtype, torch.float32)
    call = {"num_inference_steps": 4, **SMALL, "output_type": "latent"}
    stock = pipe(PROMPTS[0], generator=torch.Generator("cpu").manual_seed(3), **call).images
    assert torch.equal(done.latents, stock)
    stock = pipe(PROMPTS[0], generator=torch.Generator("cpu").manual_seed(3), **(call | {"output_type": "pt"})).images
    assert torch.equal(sampler.decode(done.x0), stock.float())


def test_the_negative_prompt_is_encoded_once_for_all_prompts():
    pipe = tiny.flux()
    sampler = samplers.for_pipeline(pipe, num_steps=2, **SMALL, negative_prompt="a cyan square", true_cfg_scale=2.0)
    calls = []
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda **options: calls.append(*options["prompt"]) or encode(**options)
    sampler.advance(sampler.start(PROMPTS, [0, 1]), 1)
    assert sorted(calls) == sorted([*PROMPTS, "a cyan square"])


def test_flops_are_counted_once(tmp_path, monkeypatch):
    from ttsnap.samplers import flops

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(flops, "_memory", {})
    pipe = tiny.flux()
    plain = samplers.for_pipeline(pipe, num_steps=4, **SMALL)
    model = flops.cost_model(plain, {"red": tiny.Redness()})
    assert min(model.call_tflop, model.decode_tflop, model.prompt_tflop) > 0
    guided = samplers.for_pipeline(pipe, num_steps=4, **SMALL, negative_prompt="a red circle", true_cfg_scale=2.0)
    twice = flops.cost_model(guided, {"red": tiny.Redness()})
    assert np.isclose(twice.call_tflop, 2 * model.call_tflop)
    monkeypatch.setattr(flops, "_memory", {})
    monkeypatch.setattr(flops, "_count", lambda sampler: pytest.fail("counted again"))
    assert flops.cost_model(plain, {"red": tiny.Redness()}) == model


def test_flops_without_data_are_those_of_the_real_model_and_leave_it_alone():
    from ttsnap.samplers import flops

    sampler = samplers.for_pipeline(tiny.flux(guidance_embeds=True), num_steps=4, **SMALL)
    before = sampler.advance(sampler.start(PROMPTS, [1, 2]), 1).x0
    monkey = []
    counted = flops._count(sampler)
    real = flops._twin(sampler, {})
    real.on_calls = monkey.append
    assert flops._count_parts(real) == counted
    assert monkey == [1]
    torch.testing.assert_close(sampler.advance(sampler.start(PROMPTS, [1, 2]), 1).x0, before, atol=0, rtol=0)


def test_attention_is_counted_on_every_device():
    from ttsnap.samplers import flops

    q, k = torch.zeros(2, 3, 50, 16), torch.zeros(2, 3, 70, 16)
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = 2 * (2 * 2 * 3 * 50 * 70 * 16) / 1e12  # two products, two operations per multiply-add
    assert flops.count_tflop(lambda: attention(q, k, k)) == pytest.approx(expected)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    assert flops.count_tflop(lambda: layer(torch.zeros(1, 10, 16))) > 2 * 10 * 16 * (3 * 16 + 16 + 64) / 1e12


def test_full_size_flux_is_counted_without_weights():
    """FLUX.1-dev at 512 x 512: 21.5 TFLOP a call."""
    from diffusers import FluxTransformer2DModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ttsnap.samplers import flops

    with FakeTensorMode(), torch.device("cpu"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        inputs = {
            "hidden_states": torch.zeros(1, 1024, 64),
            "timestep": torch.zeros(1),
            "guidance": torch.zeros(1),
            "pooled_projections": torch.zeros(1, 768),
            "encoder_hidden_states": torch.zeros(1, 512, 4096),
            "txt_ids": torch.zeros(512, 3),
            "img_ids": torch.zeros(1024, 3),
        }
        tflop = flops.count_tflop(lambda: transformer(**inputs))
    assert tflop == pytest.approx(21.50, abs=0.01)
