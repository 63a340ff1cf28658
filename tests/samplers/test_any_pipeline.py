"""The fallback: candidates interleaved at different steps end with what the plain call makes, to the last bit."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from tests.samplers import tiny, tiny_any
from ttsnap import samplers
from ttsnap.samplers.any_pipeline import AnyPipelineSampler

PROMPTS = ["a red circle", "a blue square"]
SMALL = {"height": 32, "width": 32}


def picture(seed=0):
    return Image.fromarray((np.random.default_rng(seed).random((32, 32, 3)) * 255).astype(np.uint8))


def mask():
    return Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8))


STABLE = {
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 5),
    "UniPC": ("UniPCMultistepScheduler", {}, 5),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}, 6),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, 5),
    "LCM": ("LCMScheduler", {}, 5),
    "DDPM": ("DDPMScheduler", {}, 5),
    "Heun": ("HeunDiscreteScheduler", {}, 9),
    "DPM++ SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 5),
}


def relative(kind, pipeline, unet=None, **arguments):
    return lambda: (tiny_any.stable_diffusion(kind, pipeline, unet), {"num_steps": 5, "arguments": arguments})


CASES = {
    **{
        name: lambda kind=kind, options=options: (tiny_any.stable_diffusion(kind, **options), {"num_steps": 5})
        for name, (kind, options, _) in STABLE.items()
    },
    "FLUX": lambda: (tiny.flux(guidance_embeds=True), {"num_steps": 5, "max_sequence_length": 12, **SMALL}),
    "image-to-image": relative(
        "UniPCMultistepScheduler", "StableDiffusionImg2ImgPipeline", image=picture(), strength=0.8
    ),
    "inpainting": relative(
        "DDIMScheduler", "StableDiffusionInpaintPipeline", image=picture(), mask_image=mask(), **SMALL
    ),
    "ControlNet": relative("UniPCMultistepScheduler", "StableDiffusionControlNetPipeline", image=picture()),
    "perturbed attention": relative("EulerAncestralDiscreteScheduler", "StableDiffusionPAGPipeline"),
    "PixArt-alpha": lambda: (
        tiny_any.pixart_alpha(),
        {"num_steps": 5, "arguments": {"use_resolution_binning": False, "clean_caption": False}},
    ),
    "Latent Diffusion": lambda: (tiny_any.latent_diffusion(), {"num_steps": 5, "guidance_scale": 3.0, **SMALL}),
    "AuraFlow": lambda: (tiny_any.aura_flow(), {"num_steps": 5, **SMALL}),
    "LTX-Video": lambda: (tiny_any.ltx(), {"num_steps": 5, **SMALL, "arguments": {"num_frames": 9}}),
    "Wan": lambda: (
        tiny_any.wan(),
        {"num_steps": 5, **SMALL, "max_sequence_length": 12, "arguments": {"num_frames": 9}},
    ),
    "Wan, UniPC": lambda: (
        tiny_any.wan("UniPCMultistepScheduler", **tiny_any.FLOW),
        {"num_steps": 5, **SMALL, "max_sequence_length": 12, "arguments": {"num_frames": 9}},
    ),
    "LTX-Video, noise in the decoder": lambda: (
        tiny_any.ltx(True),
        {"num_steps": 5, **SMALL, "arguments": {"num_frames": 9, "decode_timestep": 0.05}},
    ),
}
# Where something is done to the latents behind the scheduler's step, or they are not given out: images are compared.
BEHIND_THE_STEP = ("inpainting", "Latent Diffusion")


def stock(pipe, sampler, prompt, seed, output="np"):
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(prompt, generator=generator, output_type=output, **sampler.call_options())[0]


def numbers(images):
    return torch.from_numpy(np.asarray(images)).movedim(-1, -3)


SLOW = (
    *("DDPM", "DPM++ SDE", "UniPC", "FLUX", "inpainting", "AuraFlow", "Wan"),
    "LTX-Video, noise in the decoder",
)


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_interleaved_candidates_end_as_the_plain_calls_do(case):
    pipe, options = CASES[case]()
    sampler = AnyPipelineSampler(pipe, **options)
    last = sampler.num_steps
    rng = np.random.default_rng(list(map(ord, case)))
    who = [(PROMPTS[seed % 2], seed) for seed in range(3)]
    states = {seed: sampler.start([prompt], [seed]) for prompt, seed in who}
    # In random order, each from wherever it is to a random later step; one is dropped half-way.
    for _ in range(40):
        seed = int(rng.choice([seed for seed, state in states.items() if state.step < last]))
        states[seed] = sampler.advance(states[seed], int(rng.integers(states[seed].step + 1, last + 1)))
        if seed == 1 and states[seed].step > 1:
            del states[seed]
        if all(state.step == last for state in states.values()):
            break
    assert set(states) <= {0, 1, 2}
    for prompt, seed in who:
        if seed in states:
            state = states[seed]
            image = sampler.look(state)
            assert torch.equal(image, numbers(stock(pipe, sampler, prompt, seed)))
            assert torch.equal(state.x0.to(state.latents.dtype), state.latents)
            if case not in BEHIND_THE_STEP:
                assert torch.equal(state.latents, stock(pipe, sampler, prompt, seed, "latent"))
            if case not in (*BEHIND_THE_STEP, "LTX-Video, noise in the decoder"):  # these need the seed
                assert torch.equal(sampler.decode(state.x0), image)
            assert torch.equal(sampler.look(state), image)  # a second look, when the call has returned


@pytest.mark.parametrize("name", STABLE)
def test_steps_are_those_of_the_scheduler_and_all_of_them_are_counted(name):
    kind, options, steps = STABLE[name]
    pipe = tiny_any.stable_diffusion(kind, **options)
    sampler = AnyPipelineSampler(pipe, num_steps=5)
    assert sampler.num_steps == steps == len(sampler.sigmas)
    assert sampler.sigmas == sorted(sampler.sigmas, reverse=True)
    calls, forwards = [], []
    sampler.on_calls = calls.append
    with torch.no_grad():
        hook = pipe.unet.register_forward_hook(lambda *_: forwards.append(1))
        state = sampler.advance(sampler.advance(sampler.start(PROMPTS, [3, 4]), 2), steps)
        hook.remove()
    assert sum(calls) == len(forwards) == 2 * steps
    assert sampler.probe.passes == 1
    assert len(state) == 2


def test_a_candidate_does_not_depend_on_its_company_or_the_order():
    sampler = AnyPipelineSampler(tiny_any.stable_diffusion("EulerAncestralDiscreteScheduler"), num_steps=4)
    together = sampler.advance(sampler.start(PROMPTS * 2, [0, 1, 2, 3]), 3)
    apart = [sampler.advance(sampler.start([PROMPTS[seed % 2]], [seed]), 3).x0 for seed in (3, 1, 0, 2)]
    assert torch.equal(together.x0[[3, 1, 0, 2]], torch.cat(apart))
    chosen = sampler.advance(together.select([2, 1]), 4)
    again = sampler.advance(sampler.start([PROMPTS[0], PROMPTS[1]], [2, 1]), 4)
    assert torch.equal(chosen.latents, again.latents)
    # A state is a value: gone on from a second time, it gives the same.
    assert torch.equal(sampler.advance(together.select([2, 1]), 4).latents, chosen.latents)


def test_a_prompt_is_encoded_once_and_so_is_a_picture():
    pipe = tiny_any.stable_diffusion("DDIMScheduler", "StableDiffusionImg2ImgPipeline")
    sampler = AnyPipelineSampler(pipe, num_steps=4, arguments={"image": picture(), "strength": 1.0})
    texts, pictures = [], []
    pipe.text_encoder.register_forward_hook(lambda *_: texts.append(1))
    pipe.vae.encoder.register_forward_hook(lambda *_: pictures.append(1))
    state = sampler.advance(sampler.start(PROMPTS * 2, range(4)), 2)
    sampler.look(state)
    assert (len(texts), len(pictures)) == (4, 1)  # each prompt and its negative prompt
    sampler.forget_prompts()
    sampler.advance(sampler.start(PROMPTS[:1], [9]), 1)
    assert (len(texts), len(pictures)) == (6, 1)


def test_a_prompt_that_the_call_encodes_itself_is_encoded_once_and_charged():
    from ttsnap.samplers.flops import cost_model, count_tflop

    pipe = tiny_any.latent_diffusion()
    sampler = AnyPipelineSampler(pipe, num_steps=3, guidance_scale=3.0, **SMALL)
    texts = []
    hook = pipe.bert.register_forward_hook(lambda *_: texts.append(1))
    state = sampler.advance(sampler.start(PROMPTS * 2, range(4)), 2)
    sampler.look(state)
    assert len(texts) == 3  # both prompts, and none for guidance
    sampler.forget_prompts()
    sampler.advance(sampler.start(PROMPTS[:1], [9]), 1)
    assert len(texts) == 5
    hook.remove()
    once = count_tflop(lambda: pipe.bert(torch.zeros(1, 77, dtype=torch.long)))
    assert cost_model(sampler, {"red": tiny.Redness()}).prompt_tflop == pytest.approx(2 * once)


def test_what_is_dropped_frees_its_memory_and_leaves_gradients_as_they_were():
    sampler = AnyPipelineSampler(tiny_any.stable_diffusion(), num_steps=4)
    schedulers = []
    own = sampler._own
    sampler._own = lambda *a: schedulers.append(weakref.ref((made := own(*a)).scheduler)) or made
    state = sampler.advance(sampler.start(PROMPTS, [0, 1]), 2)
    assert all(scheduler() is not None for scheduler in schedulers)
    gc.disable()  # counted references alone must do
    try:
        kept = state.row(1)
        del state
        assert [scheduler() is None for scheduler in schedulers] == [True, False]
        assert torch.is_grad_enabled()
        sampler.advance(kept, 4)
    finally:
        gc.enable()


def test_an_error_reaches_the_caller_once_and_names_the_candidate():
    pipe = tiny_any.stable_diffusion()
    sampler = AnyPipelineSampler(pipe, num_steps=4)
    state = sampler.advance(sampler.start(PROMPTS, [0, 1]), 1)

    def broken(*_):
        raise ArithmeticError("no such number")

    hook = pipe.unet.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match=r"StableDiffusionPipeline, prompt 'a red circle', seed 0: no such number"):
        sampler.advance(state, 2)
    hook.remove()
    assert torch.is_grad_enabled()
    expected = sampler.advance(sampler.start(PROMPTS, [0, 1]), 4)
    assert torch.equal(sampler.advance(state, 4).latents, expected.latents)


def test_a_search_in_another_thread_and_one_that_changes_threads():
    sampler = AnyPipelineSampler(tiny_any.stable_diffusion(), num_steps=4)
    here = sampler.advance(sampler.start(PROMPTS, [0, 1]), 2)
    done = {}

    def work():
        done["mixed"] = sampler.advance(here, 4).latents
        done["whole"] = sampler.advance(sampler.start(PROMPTS, [0, 1]), 4).latents

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    expected = sampler.advance(here, 4).latents
    assert torch.equal(done["mixed"], expected)
    assert torch.equal(done["whole"], expected)


def test_the_pipeline_is_left_as_it_was():
    pipe = tiny_any.stable_diffusion("EulerAncestralDiscreteScheduler", "StableDiffusionPAGPipeline")
    before, scheduler, config = pipe.unet.attn_processors, pipe.scheduler, dict(pipe.config)
    sampler = AnyPipelineSampler(pipe, num_steps=3)
    state = sampler.advance(sampler.start(PROMPTS, [0, 1]), 2)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())
    del state
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())
    assert pipe.scheduler is scheduler
    assert scheduler.step_index is None
    assert dict(pipe.config) == config
    assert "_watch" not in vars(scheduler)


def test_cost_is_counted_by_the_first_call(tmp_path, monkeypatch):
    from ttsnap.samplers import flops

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(flops, "_memory", {})
    pipe = tiny.flux()
    options = {"num_steps": 4, "max_sequence_length": 12, **SMALL}
    adapter = flops.cost_model(samplers.for_pipeline(pipe, **options), {"red": tiny.Redness()})
    fallback = flops.cost_model(samplers.for_pipeline(pipe, sampler="fallback", **options), {"red": tiny.Redness()})
    assert fallback.call_tflop == pytest.approx(adapter.call_tflop)
    assert fallback.decode_tflop == pytest.approx(adapter.decode_tflop)
    assert fallback.prompt_tflop == pytest.approx(adapter.prompt_tflop)


def test_which_sampler_serves():
    pipe = tiny.flux()
    options = {"num_steps": 3, "max_sequence_length": 12, **SMALL}
    assert not isinstance(samplers.for_pipeline(pipe, **options), AnyPipelineSampler)
    forced = samplers.for_pipeline(pipe, sampler="fallback", **options)
    assert isinstance(forced, AnyPipelineSampler)
    assert forced.notes == []
    aura = samplers.for_pipeline(tiny_any.aura_flow(), num_steps=3, **SMALL)
    assert aura.notes[0].startswith("there is no adapter for AuraFlowPipeline; so the pipeline runs with its own call")
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="needs a FlowMatchEulerDiscreteScheduler"):
        samplers.for_pipeline(pipe, sampler="adapter", **options)
    with pytest.raises(ValueError, match="a sampler is one of auto, adapter, fallback, got 'magic'"):
        samplers.for_pipeline(pipe, sampler="magic")


def test_wrong_arguments_are_one_sentence():
    pipe = tiny_any.stable_diffusion()
    with pytest.raises(ValueError, match="StableDiffusionPipeline takes no strength; it takes height"):
        AnyPipelineSampler(pipe, arguments={"strength": 0.5})
    with pytest.raises(ValueError, match="generator cannot be set: the search gives a generator per candidate"):
        AnyPipelineSampler(pipe, arguments={"generator": torch.Generator()})
    with pytest.raises(ValueError, match="StableDiffusionPipeline does not run with these arguments: `height` and"):
        AnyPipelineSampler(pipe, num_steps=2, height=33, width=33)
    with pytest.raises(ValueError, match="a pipeline with a scheduler that takes prompt and generator; dict is none"):
        AnyPipelineSampler({})
    with pytest.raises(ValueError, match="look frames belong to videos"):
        AnyPipelineSampler(pipe, num_steps=2, look_frames=["first"])


def test_the_line_that_reproduces_a_winner_does(tmp_path):
    import PIL  # noqa: F401  (the line names it)

    file = tmp_path / "picture.png"
    picture().save(file)
    pipe = tiny_any.stable_diffusion("UniPCMultistepScheduler", "StableDiffusionImg2ImgPipeline")
    sampler = AnyPipelineSampler(
        pipe, num_steps=4, guidance_scale=3.0, arguments={"image": Image.open(file), "strength": 0.75}
    )
    state = sampler.advance(sampler.start(PROMPTS[:1], [5]), sampler.num_steps)
    line = sampler.reproduce(PROMPTS[0], 5)
    assert line.startswith("pipe('a red circle', num_inference_steps=4, guidance_scale=3.0, image=PIL.Image.open(")
    made = eval(line, {"pipe": pipe, "torch": torch, "PIL": __import__("PIL.Image")}).images[0]
    np.testing.assert_array_equal(
        np.asarray(made), (sampler.look(state)[0] * 255).round().byte().movedim(0, -1).numpy()
    )


def test_a_look_at_a_video_is_at_chosen_frames():
    options = {"num_steps": 3, **SMALL, "arguments": {"num_frames": 9}}
    sampler = AnyPipelineSampler(tiny_any.ltx(), **options, look_frames=["first", -1, 2])
    assert sampler.look_frames == [0, 2, 8]
    assert sampler.max_batch == 1
    images = sampler.look(sampler.advance(sampler.start(PROMPTS, [0, 1]), 1))
    assert images.shape == (2, 9, 3, 32, 32)
    assert torch.equal(sampler.shown(images), images[:, [0, 2, 8]])
    with pytest.raises(ValueError, match="look frames are first, middle, last or indices below 9, got 'end'"):
        AnyPipelineSampler(tiny_any.ltx(), **options, look_frames=["end"])


def test_a_search_on_a_video_pipeline(tmp_path):
    import ttsnap

    result = ttsnap.search(
        tiny_any.ltx(), "a red circle", reward=tiny.Redness(), candidates=3, num_steps=3, policy="halving",
        arguments={"num_frames": 9}, **SMALL,
    )  # fmt: skip
    assert any("own call" in note for note in result.notes)
    assert result.images[0].frames.shape == (9, 32, 32, 3)
    np.testing.assert_array_equal(np.asarray(result.image), result.images[0].frames[4])
    record = result.save(tmp_path)
    assert record["files"]["videos"] == ["best.webp"]
    with Image.open(tmp_path / "best.webp") as film:
        assert film.n_frames == 9
