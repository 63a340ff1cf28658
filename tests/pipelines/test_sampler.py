"""Any pipeline: candidates interleaved at different steps, in batches, end with what the plain call makes."""

from __future__ import annotations

import functools
import gc
import re
import threading
import warnings
import weakref

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import ttsnap
from tests.pipelines import tiny, tiny_any, tiny_flow, tiny_sd
from ttsnap.pipelines.call import own_arguments
from ttsnap.pipelines.outputs import to_uint8
from ttsnap.pipelines.sampler import Sampler
from ttsnap.pipelines.standing import Standing
from ttsnap.policies import SuccessiveHalving

A, B = "a red circle", "a blue square left of a green circle"  # of different lengths
LONG = " ".join(["a red circle left of a blue square above a green circle"] * 30)
SMALL = {"height": 32, "width": 32}
T5 = {"max_sequence_length": 12}


def picture(seed=0):
    return Image.fromarray((np.random.default_rng(seed).random((32, 32, 3)) * 255).astype(np.uint8))


def mask():
    return Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8))


def relative(pipeline, kind="DDIMScheduler", unet=None, **arguments):
    return lambda: tiny_any.stable_diffusion(kind, pipeline, unet), arguments


# Pipeline, arguments; steps are 3 unless they are given.
CASES = {
    "FLUX": (lambda: tiny.flux(guidance_embeds=True, dynamic_shifting=True), {**SMALL, **T5}),
    "FLUX, guided": (tiny.flux, {**SMALL, **T5, "negative_prompt": "a cyan square", "true_cfg_scale": 3.0}),
    "SD 3": (tiny_sd.sd3, {**SMALL, **T5}),
    "SDXL": (tiny_sd.sdxl, {**SMALL, "negative_prompt": "a cyan square", "guidance_rescale": 0.5}),
    "FLUX.2 Klein": (tiny_flow.flux2_klein, {**SMALL, "guidance_scale": 3.0, "max_sequence_length": 96}),
    "Qwen-Image": (tiny_flow.qwen_image, {**SMALL, "true_cfg_scale": 3.0, "negative_prompt": "blurred"}),
    "Z-Image": (tiny_flow.z_image, {**SMALL, "guidance_scale": 4.0, "cfg_truncation": 0.3, "max_sequence_length": 128}),
    "Sana": (tiny_flow.sana, {**SMALL, "max_sequence_length": 48, "use_resolution_binning": False}),
    "PixArt-Sigma": (tiny_flow.pixart, {**SMALL, **T5, "use_resolution_binning": False}),
    "image-to-image": relative(
        "StableDiffusionImg2ImgPipeline",
        "UniPCMultistepScheduler",
        image=picture(),
        strength=0.8,
        num_inference_steps=5,
    ),
    "inpainting": relative("StableDiffusionInpaintPipeline", image=picture(), mask_image=mask(), **SMALL),
    "ControlNet": relative("StableDiffusionControlNetPipeline", "UniPCMultistepScheduler", image=picture()),
    "perturbed attention": relative("StableDiffusionPAGPipeline", "EulerAncestralDiscreteScheduler"),
    "Latent Diffusion": (tiny_any.latent_diffusion, {**SMALL, "guidance_scale": 3.0}),
    "AuraFlow": (tiny_any.aura_flow, SMALL),
    "Wan": (tiny_any.wan, {**SMALL, **T5, "num_frames": 9}),
    "LTX-Video, noise in the decoder": (
        lambda: tiny_any.ltx(True),
        {**SMALL, "num_frames": 9, "decode_timestep": 0.05},
    ),
}
SLOW = ("PixArt-Sigma", "Qwen-Image", "AuraFlow", "inpainting", "LTX-Video, noise in the decoder")
ALONE = ("LTX-Video, noise in the decoder",)  # its decoder draws
some = pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])


@functools.cache
def sampler_of(name):
    build, arguments = CASES[name]
    return Sampler(build(), **{"num_inference_steps": 3} | arguments)


def stock(sampler, prompt, seed, **more):
    """What the line that reproduces a candidate makes, as numbers."""
    line = sampler.reproduce(prompt, seed)
    for name, value in sampler.arguments.items():
        if isinstance(value, Image.Image):
            line = line.replace(f"{name}={name}", f"{name}=given[{name!r}]")
    names = {"pipe": sampler.pipe, "torch": torch, "given": sampler.arguments, "diffusers": diffusers}
    *before, call = re.split(r"; (?=pipe|torch)", line)
    for statement in before:
        exec(statement, names)
    made = eval(f"{call[:-1]}, output_type='np', **{more!r})", names)[0]
    return torch.from_numpy(np.asarray(made)).movedim(-1, -3)


def counted(model):
    """Batch sizes of a model's calls."""
    sizes = []

    def note(module, args, kwargs):
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor | list))
        sizes.append(len(first))

    return sizes, model.register_forward_pre_hook(note, with_kwargs=True)


def denoiser(pipe):
    return getattr(pipe, "transformer", None) or pipe.unet


@some
def test_interleaved_candidates_end_as_the_plain_calls_do(name):
    sampler = sampler_of(name)
    last = sampler.num_steps
    rng = np.random.default_rng(list(map(ord, name)))
    who = [((A, B)[seed % 2], seed) for seed in range(3)]
    states = {seed: sampler.start([prompt], [seed]) for prompt, seed in who}
    while any(state.step < last for state in states.values()):  # in random order, each to a random later step
        seed = int(rng.choice([seed for seed, state in states.items() if state.step < last]))
        states[seed] = sampler.advance(states[seed], int(rng.integers(states[seed].step + 1, last + 1)))
    together = sampler.advance(sampler.start([p for p, _ in who], [s for _, s in who]), last)
    images = sampler.look(together)
    for row, (prompt, seed) in enumerate(who):
        expected = stock(sampler, prompt, seed)
        assert torch.equal(sampler.look(states[seed]), expected)
        torch.testing.assert_close(images[row : row + 1], expected, atol=1e-4, rtol=1e-4)
        if name not in ALONE:
            torch.testing.assert_close(sampler.decode(states[seed].x0), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(together.x0.to(together.latents.dtype), together.latents)


@pytest.mark.parametrize("name", ["FLUX", "FLUX, guided", "SD 3", "SDXL", "FLUX.2 Klein", "perturbed attention", "Wan"])
def test_the_batch_of_one_prompt_is_the_stock_batch_to_the_last_bit(name):
    sampler = sampler_of(name)
    count = next(key for key in ("num_images_per_prompt", "num_videos_per_prompt") if key in sampler.taken)
    images = sampler.look(sampler.advance(sampler.start([A] * 4, range(4)), sampler.num_steps))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(4)]
    made = sampler.pipe(prompt=A, **sampler.arguments, **{count: 4}, generator=generators, output_type="np")[0]
    assert torch.equal(images, torch.from_numpy(np.asarray(made)).movedim(-1, -3))


@pytest.mark.parametrize("name", ["FLUX", "SDXL", "Z-Image", "ControlNet"])
def test_candidates_of_several_prompts_and_steps_share_batches(name):
    sampler = sampler_of(name)
    ahead = sampler.advance(sampler.start([A], [7]), 1)
    behind = sampler.start([A, A, B] if name == "Z-Image" else [A, A, A], [1, 2, 3])
    calls = [*ahead.calls, *(sampler.begin(p, s) for p, s in zip(behind.prompts, behind.seeds, strict=True))]
    sampler.aim(calls, 3)
    sizes, hook = counted(denoiser(sampler.pipe))
    with torch.no_grad():
        sampler.bring(calls)
    hook.remove()
    rows = 2 if name in ("SDXL", "ControlNet") else 1
    assert sum(sizes) == rows * 11 or name == "Z-Image"
    assert len(sizes) == 3
    torch.testing.assert_close(sampler.look(sampler.gather(calls[:1], 3)), stock(sampler, A, 7), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("heeded", [True, False])
@torch.no_grad()
def test_texts_of_unequal_length_share_batches_where_the_model_heeds_their_mask(heeded):
    pipe = tiny_flow.qwen_image()
    plain = pipe.transformer.forward
    if not heeded:
        pipe.transformer.forward = lambda encoder_hidden_states_mask=None, **given: plain(**given)
    sampler = Sampler(pipe, num_inference_steps=3, **SMALL)
    texts = ["a fox", "a fox in the snow", "a fox"]
    sampler.advance(sampler.start(texts[:1], [0]), 1)  # what it is asked for the first time is tried
    sampler.advance(sampler.start(texts[:2], [0, 1]), 1)
    sizes, hook = counted(pipe.transformer)
    finished = sampler.look(sampler.advance(sampler.start(texts, [1, 2, 3]), 3))
    hook.remove()
    assert sizes == ([3, 3, 3] if heeded else [2, 2, 2, 1, 1, 1])
    for text, seed, image in zip(texts, [1, 2, 3], finished, strict=True):
        torch.testing.assert_close(image, stock(sampler, text, seed)[0].float(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("build", [tiny.flux, tiny_sd.stable_diffusion], ids=["flux", "sd"])
def test_in_half_precision_one_candidate_is_the_stock_one_bit_by_bit(build):
    more = T5 if build is tiny.flux else {}
    sampler = Sampler(build().to(dtype=torch.bfloat16), num_inference_steps=3, **SMALL, **more)
    done = sampler.advance(sampler.advance(sampler.start([A], [3]), 1), 3)
    assert (done.latents.dtype, done.x0.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(sampler.look(done), stock(sampler, A, 3))


def test_early_pictures_are_what_the_pipeline_makes_of_the_estimates():
    """By operations that were taken down, and by a call whose steps are not made."""
    sampler = sampler_of("FLUX")
    begun = sampler.advance(sampler.start([A, B], [1, 2]), 1)
    assert (begun.x0 - begun.latents.float()).abs().max() > 1e-3
    taken_down = sampler.look(begun)
    tail, sampler.probe.tail = sampler.probe.tail, None
    assert tail is not None
    assert torch.equal(sampler.look(begun), taken_down)
    sampler.probe.tail = tail


# Prompts and pictures.


def test_a_prompt_is_encoded_once_and_so_is_a_picture():
    pipe = tiny_any.stable_diffusion("DDIMScheduler", "StableDiffusionImg2ImgPipeline")
    sampler = Sampler(pipe, num_inference_steps=4, image=picture(), strength=1.0)
    texts, pictures = [], []
    pipe.text_encoder.register_forward_hook(lambda *_: texts.append(1))
    pipe.vae.encoder.register_forward_hook(lambda *_: pictures.append(1))
    sampler.look(sampler.advance(sampler.start([A, B] * 2, range(4)), 2))
    assert (len(texts), len(pictures)) == (4, 1)  # each prompt and its negative prompt
    sampler.forget_prompts()
    sampler.advance(sampler.start([A], [9]), 1)
    assert (len(texts), len(pictures)) == (6, 1)


def test_a_prompt_that_the_call_encodes_itself_is_encoded_once_and_charged():
    from ttsnap.pipelines.flops import cost_model, count_tflop

    pipe = tiny_any.latent_diffusion()
    sampler = Sampler(pipe, num_inference_steps=3, guidance_scale=3.0, **SMALL)
    texts = []
    hook = pipe.bert.register_forward_hook(lambda *_: texts.append(1))
    sampler.look(sampler.advance(sampler.start([A, B] * 2, range(4)), 2))
    assert len(texts) == 3  # both prompts, and none for guidance
    hook.remove()
    once = count_tflop(lambda: pipe.bert(torch.zeros(1, 77, dtype=torch.long)))
    assert cost_model(sampler, {"red": tiny.Redness()}).prompt_tflop == pytest.approx(2 * once)


@pytest.mark.parametrize("name", ["SDXL", "FLUX", "Sana"])
def test_the_end_of_a_prompt_that_is_not_read_is_told(name):
    sampler = sampler_of(name)
    sampler.forget_prompts()
    with pytest.warns(UserWarning, match=r"reads \d+ tokens, the prompt has \d+; not read: '"):
        sampler.advance(sampler.start([LONG], [0]), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sampler.advance(sampler.start([B], [0]), 1)
    sampler.forget_prompts()


def test_a_negative_prompt_that_is_ignored_is_noted():
    sampler = Sampler(tiny.flux(), num_inference_steps=2, **SMALL, **T5, negative_prompt="blurred")
    assert "ignores the negative prompt with these arguments; a true_cfg_scale above 1 would use it" in sampler.notes[0]
    assert not sampler_of("FLUX, guided").notes
    unguided = Sampler(tiny_sd.sdxl(), num_inference_steps=2, **SMALL, negative_prompt="blurred", guidance_scale=0.0)
    assert "a guidance_scale above 1 would use it" in unguided.notes[0]


def test_embeddings_take_the_place_of_the_prompt():
    pipe = tiny_sd.stable_diffusion()
    embeds, negative = pipe.encode_prompt(A, "cpu", 1, True)
    sampler = Sampler(pipe, num_inference_steps=3, **SMALL, prompt_embeds=embeds, negative_prompt_embeds=negative)
    asked = []

    def reward(images, prompts, *, sigma):
        asked.extend(prompts)
        return images.mean((1, 2, 3))

    made = sampler.look(sampler.advance(sampler.start([B] * 2, [1, 2]), 3))
    plain = Sampler(pipe, num_inference_steps=3, **SMALL)
    torch.testing.assert_close(made, plain.look(plain.advance(plain.start([A] * 2, [1, 2]), 3)), atol=1e-4, rtol=1e-4)
    arguments = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    found = ttsnap.search(pipe, B, reward={"r": reward}, candidates=2, num_inference_steps=3, **SMALL, **arguments)
    assert set(asked) >= {B}
    assert "prompt_embeds=prompt_embeds" in found.reproduce


def test_every_call_has_arguments_of_its_own():
    given = {"mask": torch.zeros(2), "scales": [torch.zeros(2), {"half": np.zeros(2)}], "name": "a"}
    own = own_arguments(given)
    own["mask"] += 1
    own["scales"][0] += 1
    own["scales"][1]["half"] += 1
    own["scales"].append(1)
    assert not given["mask"].any()
    assert not given["scales"][0].any()
    assert not given["scales"][1]["half"].any()
    assert len(given["scales"]) == 2


def test_a_callback_is_called_for_every_candidate():
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(tensors["latents"].flatten()[0])))
        return {"latents": tensors["latents"] * 0.5} if step == 1 else {}

    pipe = tiny.flux()
    sampler = Sampler(pipe, num_inference_steps=3, **SMALL, **T5, callback_on_step_end=callback)
    seen.clear()
    images = sampler.look(sampler.advance(sampler.start([A] * 2, [1, 2]), 3))
    assert sorted(step for step, _ in seen) == [0, 0, 1, 1, 2, 2]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (1, 2)]
    made = pipe([A] * 2, **sampler.arguments, generator=generators, output_type="np")[0]
    torch.testing.assert_close(images, torch.from_numpy(made).movedim(-1, 1))


# Random numbers.


@pytest.mark.parametrize("kind", ["FlowMatchEuler", "DPMSolverSDE"])
def test_schedulers_that_draw_from_torch_follow_the_candidates_seed(kind):
    if kind == "FlowMatchEuler":
        pipe = tiny.flux()
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        sampler = Sampler(pipe, num_inference_steps=3, **SMALL, **T5)
    else:
        pytest.importorskip("torchsde")
        sampler = Sampler(tiny_any.stable_diffusion("DPMSolverSDEScheduler"), num_inference_steps=3)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    together = sampler.look(sampler.advance(sampler.start([A] * 3, [5, 6, 7]), sampler.num_steps))
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(10)
    for row, seed in enumerate((5, 6, 7)):
        alone = sampler.look(sampler.advance(sampler.start([A], [seed]), sampler.num_steps))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)
        assert sampler.reproduce(A, seed).startswith(f"torch.manual_seed({seed}); pipe(")
        torch.testing.assert_close(stock(sampler, A, seed), alone, atol=1e-5, rtol=1e-5)


# Candidates outside their calls.


@pytest.mark.parametrize("case", ["FLUX", "SDXL", "Z-Image", "image-to-image", "perturbed attention", "inpainting"])
def test_a_candidate_taken_out_of_its_call_goes_on_in_another(case, tmp_path):
    sampler = sampler_of(case)
    last = sampler.num_steps
    begun = sampler.advance(sampler.start([A], [3]), last - 2)
    begun.calls[0].standing().save(tmp_path / "candidate.safetensors")
    expected = sampler.look(sampler.advance(begun, last))
    sizes, hook = counted(denoiser(sampler.pipe))
    with torch.no_grad():
        call = sampler.begin(A, 3, standing=Standing.load(tmp_path / "candidate.safetensors"))
        sampler.aim([call], last)
        sampler.bring([call])
    hook.remove()
    assert len(sizes) == 2
    assert call.progress.paid == 2
    assert torch.equal(sampler.look(sampler.gather([call], last)), expected)
    with pytest.raises(ValueError, match="holds no candidate that was put away"):
        Standing.load(__file__)


def test_a_candidate_goes_on_in_another_thread_without_its_earlier_calls():
    sampler = Sampler(tiny_any.stable_diffusion(), num_inference_steps=4)
    here = sampler.advance(sampler.start([A, B], [0, 1]), 2)
    sizes, hook = counted(sampler.pipe.unet)
    done = {}

    def work():
        done["images"] = sampler.look(sampler.advance(here, 4))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(sizes) <= 4
    hook.remove()
    assert torch.equal(done["images"], sampler.look(sampler.advance(here, 4)))


def test_a_state_is_a_value():
    sampler = Sampler(tiny_any.stable_diffusion("EulerAncestralDiscreteScheduler"), num_inference_steps=4)
    together = sampler.advance(sampler.start([A, B] * 2, [0, 1, 2, 3]), 3)
    chosen = sampler.advance(together.select([2, 1]), 4)
    again = sampler.advance(together.select([2, 1]), 4)  # gone on from a second time, it gives the same
    assert torch.equal(chosen.latents, again.latents)


def test_what_is_dropped_frees_its_memory_and_leaves_gradients_as_they_were():
    sampler = Sampler(tiny_any.stable_diffusion(), num_inference_steps=4)
    state = sampler.advance(sampler.start([A, B], [0, 1]), 2)
    calls = [weakref.ref(call._greenlet) for call in state.calls]
    gc.disable()  # counted references alone must do
    try:
        kept = state.select([1])
        del state
        assert [call() is None for call in calls] == [True, False]
        assert torch.is_grad_enabled()
        sampler.advance(kept, 4)
    finally:
        gc.enable()


# What goes wrong.


def test_an_error_reaches_the_caller_once_and_names_the_candidate():
    pipe = tiny_any.stable_diffusion()
    sampler = Sampler(pipe, num_inference_steps=4)
    state = sampler.advance(sampler.start([A, B], [0, 1]), 1)

    def broken(*_):
        raise ArithmeticError("no such number")

    hook = pipe.unet.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match=r"StableDiffusionPipeline, prompt 'a red circle', seed 0: no such number"):
        sampler.advance(state, 2)
    hook.remove()
    assert torch.is_grad_enabled()


def test_running_out_of_memory_halves_that_kind_of_work_and_loses_nothing():
    pipe = tiny.flux()
    sampler = Sampler(pipe, num_inference_steps=3, **SMALL, **T5, max_batch=8)
    expected = sampler.look(sampler.advance(sampler.start([A] * 7, range(7)), 3))

    def full(module, args, kwargs):
        if len(kwargs["hidden_states"]) > 2:
            raise torch.OutOfMemoryError("full")

    hook = pipe.transformer.register_forward_pre_hook(full, with_kwargs=True)
    with pytest.warns(UserWarning, match="out of memory: going on with at most"):
        done = sampler.advance(sampler.start([A] * 7, range(7)), 3)
    hook.remove()
    assert sampler.max_batch <= 2
    assert sampler.limits.of("previews") == 8
    torch.testing.assert_close(sampler.look(done), expected, atol=1e-5, rtol=1e-5)
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(MemoryError, match="one image of 32 x 32 does not fit into memory"):
        sampler.advance(sampler.start([A], [0]), 1)
    hook.remove()


def test_a_decoder_that_overflows_never_makes_a_silent_black_picture():
    pipe = tiny.flux()
    sampler = Sampler(pipe, num_inference_steps=3, **SMALL, **T5)
    state = sampler.advance(sampler.start([A, B], [4, 5]), 2)
    pipe.vae.decoder.conv_out.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"prompt 'a red circle', seed 4: the picture at step 2 of 3 is not finite"):
        sampler.look(state)
    with pytest.raises(ValueError, match=r"seed 4: the picture at step 3 of 3 is not finite"):
        sampler.look(sampler.advance(state, 3))


def test_a_decoder_that_overflows_in_half_precision_is_mended_in_full():
    pipe = tiny.flux().to(dtype=torch.float16)
    sampler = Sampler(pipe, num_inference_steps=2, **SMALL, **T5)
    state = sampler.advance(sampler.start([A], [4]), 1)
    pipe.vae.decoder.conv_out.weight.data.fill_(20000.0)
    images = sampler.look(state)
    assert bool(torch.isfinite(images).all())
    assert any("overflows in float16; such pictures were decoded in fp32" in note for note in sampler.notes)
    assert pipe.vae.dtype == torch.float16


def test_what_cannot_be_merged_runs_alone_and_a_note_says_why():
    pipe = tiny.flux()
    sampler = Sampler(pipe, num_inference_steps=3, **SMALL, **T5)
    expected = sampler.look(sampler.advance(sampler.start([A] * 3, range(3)), 3))
    forward = pipe.transformer.forward

    def picky(*args, **kwargs):
        if len(kwargs["hidden_states"]) > 1:
            raise RuntimeError("one at a time")
        return forward(*args, **kwargs)

    pipe.transformer.forward = picky
    images = sampler.look(sampler.advance(sampler.start([A] * 3, range(3)), 3))
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)
    assert sampler.notes == [
        "FluxPipeline runs one candidate at a time: its transformer does not run in batches (one at a time)"
    ]


def test_the_pipeline_is_left_as_it_was():
    pipe = tiny_any.stable_diffusion("EulerAncestralDiscreteScheduler", "StableDiffusionPAGPipeline")
    before, scheduler, config = pipe.unet.attn_processors, pipe.scheduler, dict(pipe.config)
    sampler = Sampler(pipe, num_inference_steps=3)
    state = sampler.advance(sampler.start([A, B], [0, 1]), 2)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())
    del state
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())
    assert pipe.scheduler is scheduler
    assert scheduler.step_index is None
    assert "step" not in vars(scheduler)
    assert dict(pipe.config) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strengh": 0.5}, "StableDiffusionPipeline takes no strengh; it takes height"),
        ({"guidence_scale": 2.0}, "takes no guidence_scale; did you mean guidance_scale"),
        ({"generator": torch.Generator()}, "generator cannot be set: the search gives a generator per candidate"),
        ({"latents": torch.zeros(1)}, "latents cannot be set"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt cannot be set: a candidate is one image"),
        ({"output_type": "pil"}, "output_type cannot be set"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"num_inference_steps": 2, "height": 33, "width": 33}, "does not run with these arguments: `height` and"),
        ({"num_inference_steps": 2, "look_frames": ["first"]}, "look frames belong to videos"),
        ({"max_batch": 0}, "max batch must be at least 1"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampler(_plain(), **arguments)


@functools.cache
def _plain():
    return tiny_any.stable_diffusion()


def test_what_is_no_pipeline_is_refused_and_another_size_noted():
    with pytest.raises(ValueError, match="a pipeline with a scheduler that takes prompt and generator; dict is none"):
        Sampler({})
    odd = Sampler(tiny.flux(), num_inference_steps=2, height=33, width=32, **T5)
    assert odd.notes == ["FluxPipeline makes images of 32 x 32 where 32 x 33 was asked for"]


# Videos, pictures, modular pipelines, costs.


def test_a_look_at_a_video_is_at_chosen_frames():
    options = {"num_inference_steps": 3, **SMALL, "num_frames": 9}
    sampler = Sampler(tiny_any.ltx(), **options, look_frames=["first", -1, 2])
    assert sampler.look_frames == [0, 2, 8]
    images = sampler.look(sampler.advance(sampler.start([A, B], [0, 1]), 1))
    assert images.shape == (2, 9, 3, 32, 32)
    assert torch.equal(sampler.shown(images), images[:, [0, 2, 8]])
    with pytest.raises(ValueError, match="look frames are first, middle, last or indices below 9, got 'end'"):
        Sampler(sampler.pipe, **options, look_frames=["end"])


def test_a_search_on_a_video_pipeline(tmp_path):
    result = ttsnap.search(
        tiny_any.ltx(), A, reward=tiny.Redness(), candidates=3, num_inference_steps=3, policy="halving",
        num_frames=9, **SMALL,
    )  # fmt: skip
    assert result.images[0].frames.shape == (9, 32, 32, 3)
    np.testing.assert_array_equal(np.asarray(result.image), result.images[0].frames[4])
    record = result.save(tmp_path)
    assert record["files"]["videos"] == ["best.webp"]
    with Image.open(tmp_path / "best.webp") as film:
        assert film.n_frames == 9


def test_the_line_that_reproduces_a_winner_names_its_picture(tmp_path):
    import PIL

    file = tmp_path / "picture.png"
    picture().save(file)
    pipe = tiny_any.stable_diffusion("UniPCMultistepScheduler", "StableDiffusionImg2ImgPipeline")
    sampler = Sampler(pipe, num_inference_steps=4, guidance_scale=3.0, image=Image.open(file), strength=0.75)
    state = sampler.advance(sampler.start([A], [5]), sampler.num_steps)
    line = sampler.reproduce(A, 5)
    assert line.startswith("pipe('a red circle', num_inference_steps=4, guidance_scale=3.0, image=PIL.Image.open(")
    made = eval(line, {"pipe": pipe, "torch": torch, "PIL": PIL}).images[0]
    np.testing.assert_array_equal(np.asarray(made), to_uint8(sampler.look(state))[0])


def test_a_whole_search_ends_in_an_image_that_the_stock_pipeline_makes():
    """With a multistep scheduler, whose candidates are dropped and go on in other batches."""
    options = {"num_inference_steps": 4, "max_sequence_length": 48, "max_batch": 3, "height": 32, "width": 64}
    options |= {"use_resolution_binning": False}
    policy, pipe = SuccessiveHalving((1, 3), (0.5, 0.5)), tiny_flow.sana()
    found = ttsnap.search(pipe, B, reward={"red": tiny.Redness()}, policy=policy, candidates=5, **options)
    made = eval(found.reproduce, {"pipe": pipe, "torch": torch}).images[0]
    assert np.abs(np.asarray(made).astype(int) - np.asarray(found.image)).max() <= 1
    assert found.cost.nfe == 5 + 2 * 2 + 1


def test_a_modular_pipeline_is_searched_and_loaded_by_the_same_means(tmp_path):
    from diffusers.modular_pipelines import Flux2KleinAutoBlocks

    from ttsnap.pipelines.loading import Loading, load_model

    parts = tiny_flow.flux2_klein().components
    pipe = Flux2KleinAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in parts.items() if name in pipe.components})
    options = {**SMALL, "num_inference_steps": 3, "max_sequence_length": 96}
    sampler = Sampler(pipe, **options)
    images = sampler.look(sampler.advance(sampler.start([A] * 2, [1, 2]), 3))
    assert sampler.notes == []
    for row, seed in enumerate((1, 2)):
        made = eval(sampler.reproduce(A, seed), {"pipe": pipe, "torch": torch})[0]
        assert np.abs(np.asarray(made).astype(int) - to_uint8(images)[row]).max() <= 1
    pipe.save_pretrained(str(tmp_path / "saved"))
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = Sampler(load_model(str(tmp_path / "moved"), Loading(device="cpu")), **options)
    torch.testing.assert_close(again.look(again.advance(again.start([A] * 2, [1, 2]), 3)), images)
    with pytest.raises(ValueError, match="takes no strength; it takes "):
        Sampler(pipe, strength=0.5)


def test_calls_are_counted_and_so_is_what_they_cost():
    pipe = tiny_any.stable_diffusion("HeunDiscreteScheduler")
    sampler = Sampler(pipe, num_inference_steps=5)
    assert sampler.num_steps == 9 == len(sampler.sigmas)
    assert sampler.sigmas == sorted(sampler.sigmas, reverse=True)
    calls = []
    sampler.on_calls = calls.append
    sizes, hook = counted(pipe.unet)
    sampler.advance(sampler.advance(sampler.start([A] * 2, [3, 4]), 2), 9)
    hook.remove()
    assert sum(calls) == sum(sizes) / 2 == 18
    from ttsnap.pipelines.flops import count_tflop
    from ttsnap.pipelines.probe import zeros

    once = next(forward.ask for forward in sampler.probe.forwards if forward.name == "unet")
    arguments = zeros(once.tree)
    given = [arguments.pop(place) for place in range(len(once.args))]
    assert sampler.counted()[0] == pytest.approx(count_tflop(lambda: pipe.unet(*given, **arguments)), rel=1e-3)


def test_a_pipeline_that_fails_of_itself_is_told_in_one_sentence(monkeypatch):
    def broken(*args, **kwargs):
        raise AttributeError("'CLIPTextModel' object has no attribute 'text_model'")

    pipe = tiny_any.stable_diffusion()
    monkeypatch.setattr(pipe, "encode_prompt", broken)
    told = "StableDiffusionPipeline does not run with these arguments: AttributeError: 'CLIPTextModel'"
    with pytest.raises(ValueError, match=told):
        Sampler(pipe, num_inference_steps=2, height=32, width=32)
