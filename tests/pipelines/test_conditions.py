"""Pictures and the models that read them: the pipeline that takes them, its arguments, and the line that repeats it."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

import ttsnap
from tests.pipelines import conditioned, tiny, tiny_flow, tiny_sd
from ttsnap.pipelines.conditions import Control, Pictures
from ttsnap.pipelines.single_file import Loaded

CALL = {"num_inference_steps": 4, "height": 32, "width": 32}
SEARCH = {"reward": tiny.redness, "candidates": 3, "policy": "best-of-n"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with pictures, a Stable Diffusion model, a ControlNet and an IP-Adapter of it."""
    folder = tmp_path_factory.mktemp("conditions")
    for number, name in enumerate(("a.png", "b.png")):
        conditioned.picture(folder, name, number, (48, 32))
    pipe = tiny_sd.stable_diffusion()
    tiny_sd.save(tiny_sd.stable_diffusion, folder / "sd")
    conditioned.control_of(pipe).save_pretrained(folder / "control")
    conditioned.adapter_of(pipe).save_pretrained(folder / "adapter")
    conditioned.ip_adapter(pipe, folder)
    return folder


def again(result, pipe):
    """Of 255, how far the line of a result leads from its picture."""
    *before, call = result.reproduce.split("; ")
    names = {"pipe": pipe, "torch": torch, "PIL": PIL, "diffusers": diffusers, "ttsnap": ttsnap}
    exec("; ".join(before), names)
    made = eval(call, names).images[0]
    return np.abs(np.asarray(made).astype(int) - np.asarray(result.image)).max()


def test_control_image_and_ip_adapter_together_make_one_pipeline_which_the_line_makes_again(here):
    result = ttsnap.search(
        str(here / "sd"),
        "a red circle",
        image=here / "a.png",
        strength=0.8,
        control=f"{here / 'b.png'}:{here / 'control'}:.7",
        ip_adapter=[f"{here / 'a.png'}:.6", f"{here / 'b.png'}:.2"],
        ip_adapter_weights=str(here / "ip-adapter.safetensors"),
        **SEARCH,
        **CALL,
    )
    assert "StableDiffusionControlNetImg2ImgPipeline.from_pipe(" in result.reproduce
    assert "pipe.set_ip_adapter_scale([0.6, 0.2])" in result.reproduce
    assert again(result, diffusers.DiffusionPipeline.from_pretrained(here / "sd")) <= 1
    assert {"control", "image", "ip_adapter"} <= set(result.origin.local)
    assert str(here) not in json.dumps(result.origin.settings)


def test_options_of_a_settings_file_lead_and_another_picture_is_another_run(here, tmp_path, monkeypatch, ttsnap):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ttsnap.toml").write_text(f'[generate]\ncontrol = ["{here / "a.png"}:{here / "adapter"}"]\n')
    options = ["--model", here / "sd", "--reward", "tests.pipelines.tiny:redness", "--candidates", 2, "--steps", 2,
               "--size", 32, "--out", "o", "--json"]  # fmt: skip
    code, out, err = ttsnap("generate", "a red circle", *options)
    assert code == 0, err
    assert "StableDiffusionAdapterPipeline.from_pipe(" in json.loads(out)["reproduce"]
    code, _, err = ttsnap("generate", "a red circle", *options, "--control", f"{here / 'b.png'}:{here / 'adapter'}")
    assert (code, "other settings (control differ)" in err) == (2, True), err


def test_a_pipeline_of_ones_own_stays_as_it_is_and_its_pictures_may_be_objects(here):
    pipe = tiny.flux()
    before = dict(pipe.config)
    result = ttsnap.search(pipe, "a", image=str(here / "a.png"), strength=0.6, **SEARCH, **CALL)
    assert type(pipe).__name__ == "FluxPipeline"
    assert dict(pipe.config) == before
    assert again(result, pipe) <= 1
    variant = diffusers.FluxImg2ImgPipeline(**pipe.components)
    photo = PIL.Image.open(here / "a.png").resize((32, 32))
    same = ttsnap.search(variant, "a", image=photo, strength=0.6, **SEARCH, **CALL)
    assert np.array_equal(np.asarray(same.image), np.asarray(result.image))


def test_several_references_go_to_models_that_take_several(here):
    names = (here / "a.png", here / "b.png")
    flux = tiny.flux()
    kontext = diffusers.FluxKontextPipeline(**flux.components)
    given = Pictures(image=names).arguments(kontext, {"width": 32, "height": 32})
    assert given["image"].size == (96, 32)  # side by side, and not squeezed to the size that is painted
    assert np.array_equal(np.asarray(given["image"])[:, 48:], np.asarray(PIL.Image.open(names[1])))
    klein = tiny_flow.flux2_klein()
    assert [picture.size for picture in Pictures(image=names).arguments(klein, {})["image"]] == [(48, 32)] * 2
    loaded = Loaded(klein)
    Pictures(image=names, mask=names[0]).dress(loaded)
    assert type(loaded.pipe).__name__ == "Flux2KleinInpaintPipeline"
    assert {"image", "image_reference", "mask_image"} <= set(
        Pictures(image=names, mask=names[0]).arguments(loaded.pipe, {})
    )


@pytest.mark.slow
def test_kontext_with_two_references_is_the_stock_call(here):
    torch.manual_seed(0)
    flux = tiny.flux(guidance_embeds=True)
    kontext = diffusers.FluxKontextPipeline(**flux.components)
    kontext.set_progress_bar_config(disable=True)
    call = {**CALL, "_auto_resize": False, "max_area": 32 * 32}
    result = ttsnap.search(kontext, "a", image=[str(here / "a.png"), str(here / "b.png")], **SEARCH, **call)
    assert "ttsnap.beside([" in result.reproduce
    assert again(result, kontext) <= 1


def test_control_texts_are_read():
    assert Control.read("a.png:owner/model") == ("a.png", "owner/model", None)
    assert Control.read("a.png:owner/model:.5") == ("a.png", "owner/model", 0.5)


def test_what_does_not_fit_is_one_sentence_before_a_model_is_loaded(here):
    picture, folder = here / "a.png", here / "sd"
    for given, message in (
        ({"control": ("a.png",)}, "--control takes IMAGE:MODEL or IMAGE:MODEL:SCALE"),
        ({"control": (f"{picture}:{here / 'nowhere'}",)}, "there is no control model"),
        ({"control": (f"{picture}:{folder / 'unet'}",)}, "is no ControlNet or T2I adapter that diffusers has"),
        ({"mask": picture}, "a mask needs an image to start from"),
        ({"ip_adapter": (str(picture),), "ip_adapter_weights": ("a/b/c.bin",)}, "is a pickle"),
        ({"control": (f"{picture}:{here / 'control'}", f"{picture}:{here / 'adapter'}")}, "of one kind go together"),
    ):
        with pytest.raises(ValueError, match=message):
            Pictures(**given).check_against(str(folder))
    for pipe, given, message in (
        (tiny.flux(), {"control": (f"{picture}:{here / 'control'}",)}, "is a ControlNetModel; FluxControlNetPipeline"),
        (
            tiny.flux(),
            {"control": (f"{picture}:{here / 'adapter'}",)},
            "no variant of FluxPipeline that is led by a T2I",
        ),
        (tiny_flow.pixart(), {"image": (picture,)}, "no variant of PixArtSigmaPipeline that starts from an image"),
    ):
        with pytest.raises(ValueError, match=message):
            Pictures(**given).dress(Loaded(pipe))
    with pytest.raises(ValueError, match="Flux2KleinPipeline takes no strength"):
        Pictures(image=(picture,), strength=0.5).arguments(tiny_flow.flux2_klein(), {})
    with pytest.raises(ValueError, match="ip_adapter is for a model that is named"):
        ttsnap.search(tiny.flux(), "a", ip_adapter=str(picture), **SEARCH)
