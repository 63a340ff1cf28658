"""What the Stable Diffusion families have beyond what every sampler has (see test_conformance.py)."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.samplers import tiny_sd
from tests.samplers.tiny import Redness
from ttsnap import samplers
from ttsnap.samplers import Declined

A, B = "a red circle", "a blue square"


def equals_stock(sampler, atol=2e-5):
    done = sampler.advance(sampler.start([A], [5]), sampler.num_steps)
    call = sampler.call_options() | {"prompt": A}
    for kind, ours in (("latent", done.latents), ("pt", sampler.decode(done.x0))):
        stock = sampler.pipe(**call, generator=torch.Generator("cpu").manual_seed(5), output_type=kind).images
        if atol == 0:
            assert torch.equal(ours, stock.to(ours.dtype))
        torch.testing.assert_close(ours, stock.to(ours.dtype), atol=atol, rtol=1e-4)
    return done


def sampler_of(pipe, **options):
    return samplers.for_pipeline(pipe, **{"num_steps": 2, "height": 32, "width": 48} | options)


TOLD = {
    "original_size": (64, 96),
    "crops_coords_top_left": (4, 8),
    "target_size": (48, 32),
    "negative_original_size": (16, 16),
    "negative_crops_coords_top_left": (1, 2),
    "negative_target_size": (512, 512),
}


def test_sdxl_is_told_sizes():
    pipe = tiny_sd.sdxl()
    plain = equals_stock(sampler_of(pipe))
    told = equals_stock(sampler_of(pipe, **TOLD))
    assert (plain.latents - told.latents).abs().max() > 1e-4
    together = sampler_of(pipe, **TOLD)
    many = together.advance(together.start([A, "a blue square", A], [4, 1, 5]), 2)
    torch.testing.assert_close(many.latents[2:], told.latents, atol=1e-5, rtol=1e-5)
    assert sampler_of(pipe, **TOLD).call_options().items() >= TOLD.items()
    with pytest.raises(ValueError, match="take effect together"):
        sampler_of(pipe, negative_target_size=(1, 2))
    with pytest.raises(ValueError, match=r"target_size is \(height, width\) or \(top, left\), got \(1, 2, 3\)"):
        sampler_of(pipe, target_size=(1, 2, 3))


def test_sdxl_without_a_negative_prompt_leads_away_from_zeros_or_from_the_empty_prompt():
    zeros, empty = (equals_stock(sampler_of(tiny_sd.sdxl(zeros=zeros))).latents for zeros in (True, False))
    assert not torch.equal(zeros, empty)


@pytest.mark.parametrize(
    "statistics", [{}, {"latents_mean": [0.1, 0.2, -0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 0.7]}]
)
def test_sdxl_in_fp16_decodes_in_fp32(statistics):
    pipe = tiny_sd.sdxl(force_upcast=True, **statistics).to(dtype=torch.float16)
    equals_stock(sampler_of(pipe), atol=0)
    assert pipe.vae.dtype == torch.float16
    seen = []
    pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    sampler = sampler_of(pipe)
    sampler.decode(sampler.advance(sampler.start([A], [0]), 1).x0)
    assert seen == [torch.float32]


def test_operations_in_fp16_are_counted_without_data(monkeypatch):
    from ttsnap.samplers import flops

    sampler = sampler_of(tiny_sd.sdxl(force_upcast=True).to(dtype=torch.float16))
    twin, with_copies = flops._twin, []
    monkeypatch.setattr(flops, "_twin", lambda one, models: with_copies.append(bool(models)) or twin(one, models))
    assert min(flops._count(sampler)) > 0
    assert with_copies[-1]  # the last try needed no data
    assert sampler.pipe.vae.dtype == torch.float16


def test_sd_1_5_as_it_is_published_names_a_scheduler_that_works():
    pipe = tiny_sd.stable_diffusion(tiny_sd.scheduler("PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False))
    with pytest.raises(Declined, match=r"PNDMScheduler is not .* choose the scheduler euler, euler-karras, ddim"):
        sampler_of(pipe, sampler="adapter")
    assert "so the pipeline runs with its own call" in sampler_of(pipe).notes[0]
    own = pipe.scheduler
    sampler = sampler_of(pipe, scheduler="euler-karras")
    assert pipe.scheduler is own
    assert sampler.reproduce(A, 3).splitlines()[0] == (
        "pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)"
    )


def test_models_with_v_prediction():
    """As Stable Diffusion 2.1 has it."""
    for kind, options in (("EulerDiscreteScheduler", {}), ("DDIMScheduler", {"set_alpha_to_one": False})):
        schedule = tiny_sd.scheduler(kind, prediction_type="v_prediction", **options)
        equals_stock(sampler_of(tiny_sd.stable_diffusion(schedule)))


def object_to(checker, threshold):
    """The checker objects to everything below a cosine; 1.1: to nothing, -1.1: to all."""
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(1.1)


KINDS = pytest.mark.parametrize("kind", ["adapter", "fallback"])


@KINDS
def test_the_safety_checker_sees_finished_images_alone_and_does_to_them_what_it_does_in_the_pipeline(kind):
    pipe = tiny_sd.stable_diffusion(safety_checker=True)
    sampler = sampler_of(pipe, sampler=kind)
    seen = []
    pipe.safety_checker.register_forward_pre_hook(lambda *_: seen.append(1))
    for threshold in (1.1, -1.1):
        object_to(pipe.safety_checker, threshold)
        state = sampler.advance(sampler.start([A, B], [7, 8]), 1)
        assert sampler.look(state).max() > 0
        assert not seen
        state = sampler.advance(state, sampler.num_steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            images = sampler.look(state)
        assert seen
        said = [str(one.message) for one in caught if "safety checker" in str(one.message)]
        assert len(said) == (2 if threshold < 0 else 0)
        if said:
            assert f"the finished image of prompt {B!r}, seed 8 black" in said[1]
        for row, (prompt, seed) in enumerate([(A, 7), (B, 8)]):
            line = sampler.reproduce(prompt, seed).removesuffix(")") + ", output_type='pt')"
            torch.testing.assert_close(
                images[row], eval(line, {"pipe": pipe, "torch": torch}).images[0], atol=2e-5, rtol=1e-4
            )
        assert (images.max() == 0) == (threshold < 0)
        seen.clear()


@KINDS
def test_what_the_safety_checker_computes_is_charged_to_finished_images(kind, tmp_path, monkeypatch):
    from ttsnap.samplers import flops

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(flops, "_memory", {})
    with_checker, without = (
        flops.cost_model(
            sampler_of(tiny_sd.stable_diffusion(safety_checker=one), sampler=kind, num_steps=3), {"red": Redness()}
        )
        for one in (True, False)
    )
    more = with_checker.look(3).picture_tflop - without.look(3).picture_tflop
    assert more > 0
    assert with_checker.decode_tflop - without.decode_tflop == pytest.approx(more)
    assert with_checker.look(1).tflop == pytest.approx(without.look(1).tflop)
    assert with_checker.look(2).source == "full"
    assert without.early == ()


@KINDS
def test_the_record_of_a_search_says_which_images_were_made_black(kind):
    import ttsnap

    pipe = tiny_sd.stable_diffusion(safety_checker=True)
    object_to(pipe.safety_checker, -1.1)
    options = {"num_steps": 3, "height": 32, "width": 32, "sampler": kind, "candidates": 2, "policy": "best-of-n"}
    with pytest.warns(UserWarning, match="safety checker"):
        found = ttsnap.search(pipe, A, reward=Redness(), seed=4, **options)
    notes = [note for note in found.to_dict()["notes"] if "safety checker" in note]
    assert [f"seed {seed} black" in note for seed, note in zip((4, 5), notes, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("build", "options"),
    [
        ({"dynamic_shifting": True}, {}),
        ({"shift": 1.0}, {"negative_prompt": "a cyan square"}),
        ({"t5": False}, {"guidance_scale": 1.0}),
    ],
)
def test_sd3_with_its_schedules_and_without_t5(build, options):
    equals_stock(sampler_of(tiny_sd.sd3(**build), max_sequence_length=12, **options))


def test_sd3_without_t5_warns_where_clip_ends():
    sampler = sampler_of(tiny_sd.sd3(t5=False), max_sequence_length=12)
    with pytest.warns(UserWarning, match="CLIP reads 16 tokens, the prompt has"):
        sampler.text("a red circle left of a blue square above a green circle below a cyan square")
    with pytest.raises(ValueError, match="has no option 'skip_guidance_layers'; it has"):
        sampler_of(tiny_sd.sd3(), skip_guidance_layers=[1])
