"""More model options of the page: as on the command line, and nothing that is not offered."""

from __future__ import annotations

import re
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ttsnap
from tests.pipelines import conditioned, tiny, tiny_sd
from tests.pipelines.test_quantization import write_gguf
from ttsnap.app.form import restored
from ttsnap.app.options import Offered
from ttsnap.app.queue import Request
from ttsnap.app.searches import Searches
from ttsnap.live import session
from ttsnap.pipelines import loading

LOAD = loading.load
REWARD = "tests.pipelines.tiny:redness"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with pictures, a Stable Diffusion model, and what can be added to it."""
    folder = tmp_path_factory.mktemp("options")
    conditioned.picture(folder, "a.png", 0)
    conditioned.picture(folder, "b.png", 1)
    conditioned.mask(folder)
    tiny_sd.save(tiny_sd.stable_diffusion, folder / "sd")
    pipe = tiny_sd.stable_diffusion()
    torch.manual_seed(9)
    diffusers.AutoencoderKL.from_config(pipe.vae.config).save_pretrained(folder / "other-vae")
    conditioned.control_of(pipe).save_pretrained(folder / "edges")
    conditioned.ip_adapter(pipe, folder)
    type(pipe.text_encoder)(pipe.text_encoder.config).eval().save_pretrained(folder / "other-text")
    width = pipe.text_encoder.get_input_embeddings().weight.shape[-1]
    save_file({"<kitten>": torch.randn(2, width)}, folder / "kitten.safetensors")
    flux = tiny.flux()
    flux.save_pretrained(folder / "flux")
    write_gguf(flux.transformer.state_dict(), folder / "flux.gguf")
    return folder


@pytest.fixture(scope="module")
def searches(here):
    offered = Offered(
        vae=(str(here / "other-vae"),),
        text_encoder=(str(here / "other-text"),),
        embedding=(str(here / "kitten.safetensors"),),
        config=(str(here / "flux"),),
        control=(str(here / "edges"),),
        ip_adapter_weights=(str(here / "ip-adapter.safetensors"),),
    )
    models = [str(here / name) for name in ("sd", "flux", "flux.gguf")]
    return Searches(here / "out", models, [REWARD], device="cpu", offered=offered)


def asked(searches, here, options, pictures=(), model="sd", **more):
    names = tuple(str(here / name) for name in pictures)
    given = {"policy": "best-of-N", "candidates": 2, "steps": 2, "size": "32"} | more
    request = Request("a red <kitten>", str(here / model), (REWARD,), options=options, pictures=names, **given)
    return searches.check(request)


CASES = {
    "scheduler": ("--scheduler DDIM", {"scheduler": "DDIM"}, ()),
    "call": (
        "--call eta=.5 --scheduler=ddim",
        {"scheduler": "ddim", "eta": 0.5},
        (),
    ),
    "vae by its last part": ("--vae other-vae", {"vae": "other-vae"}, ()),
    "preview and tiles": ("--preview linear --vae-tiling", {"preview": "linear", "vae_tiling": True}, ()),
    "control": ("--control 'a.png:edges:.7'", {"control": "a.png:edges:.7"}, ("a.png",)),
    "mask and image": (
        "--image b.png --mask mask.png",
        {"image": "b.png", "mask_image": "mask.png", "strength": 0.8},
        ("b.png", "mask.png"),
    ),
    "ip-adapter": (
        "--ip-adapter a.png:.6 --ip-adapter-weights ip-adapter.safetensors",
        {"ip_adapter": "a.png:.6", "ip_adapter_weights": "ip-adapter.safetensors"},
        ("a.png",),
    ),
}
FILES = ("vae", "image", "mask_image", "ip_adapter", "ip_adapter_weights")


@pytest.mark.parametrize("case", CASES)
def test_options_of_the_page_make_what_the_library_makes_of_them(searches, here, case):
    text, keywords, pictures = CASES[case]
    request = asked(searches, here, text, pictures, strength=keywords.get("strength"))
    made = searches.models.searcher(request).search(request.prompt)
    keywords = {name: str(here / value) if name in FILES else value for name, value in keywords.items()}
    if "control" in keywords:
        keywords["control"] = f"{here / 'a.png'}:{here / 'edges'}:.7"
    call = {"num_inference_steps": 2, "height": 32, "width": 32}
    same = ttsnap.search(
        str(here / "sd"),
        request.prompt,
        reward=REWARD,
        candidates=2,
        policy="best-of-n",
        device="cpu",
        **call,
        **keywords,
    )
    assert np.array_equal(np.asarray(made.image), np.asarray(same.image))
    plain = searches.models.searcher(asked(searches, here, "")).search(request.prompt)
    assert (case == "preview and tiles") or not np.array_equal(np.asarray(made.image), np.asarray(plain.image))
    own = same.origin.settings.keys() - {"device"}
    assert made.origin.settings.keys() == own
    assert str(here / "a.png") not in made.reproduce


LOADED = {  # the model, what the page is told, the library's keywords
    "text encoder": ("sd", "--text-encoder other-text", {"text_encoder": "other-text"}),
    "embedding": ("sd", "--embedding kitten.safetensors", {"embedding": "kitten.safetensors"}),
    "config": ("flux.gguf", "--config flux", {"config": "flux"}),
    "cache": ("flux", "--cache FirstBlock,threshold=.5", {"cache": "FirstBlock,threshold=.5"}),
    "draft cache": ("flux", "--draft-cache FirstBlock,threshold=.9", {"draft_cache": "FirstBlock,threshold=.9"}),
    "attention": ("flux", "--attention _native_math", {"attention": "_native_math"}),
    "quantize fp8-cast": ("flux", "--quantize fp8-cast", {"quantize": "fp8-cast"}),
    "quantize int8": ("flux", "--quantize int8", {"quantize": "int8"}),
    "offload group": ("flux", "--offload group", {"offload": "group"}),
}


@pytest.mark.parametrize("case", LOADED)
def test_a_search_of_the_page_with_a_model_option_is_that_of_the_library(searches, here, case, monkeypatch):
    """Whole rewards and pictures of a search that drops candidates, not only its settings."""
    model, text, keywords = LOADED[case]
    if case == "quantize int8":
        pytest.importorskip("torchao", reason="needs torchao")
    if case == "offload group":
        for module in (loading, session):
            monkeypatch.setattr(module, "load", onto_the_cpu)
    files = {name: str(here / value) for name, value in keywords.items() if (here / value).exists()}
    call = {"num_inference_steps": 4, "width": 32, "height": 32}
    halving = {"policy": "successive halving", "candidates": 4, "steps": 4, "model": model}
    made = searches.models.searcher(asked(searches, here, text, **halving)).search("a red <kitten>")
    plain = {"reward": REWARD, "candidates": 4, "policy": "halving", "device": "cpu", **call}
    same = ttsnap.search(str(here / model), "a red <kitten>", **plain, **keywords | files)
    assert np.array_equal(np.asarray(made.image), np.asarray(same.image))
    assert (made.seed, made.reward, made.cost.nfe) == (same.seed, same.reward, same.cost.nfe)
    assert made.cost.nfe < 4 * 4
    assert made.reproduce == same.reproduce
    assert made.origin.settings.keys() == same.origin.settings.keys() - {"device"}
    if case not in ("config", "draft cache", "attention"):  # no model without it, whole calls at the end, rounding
        other = ttsnap.search(str(here / model), "a red <kitten>", **plain).image
        assert np.array_equal(np.asarray(made.image), np.asarray(other)) == (case == "offload group")


def onto_the_cpu(model, asked, pictures=None):
    """Loads, and lets layers come from the CPU to the CPU: the machine of the tests has no accelerator."""
    made = LOAD(model, replace(asked, offload="none"), pictures)
    loading.place(made.pipe, torch.device("cpu"), asked.offload)
    return made


def test_a_pipeline_with_options_is_kept_and_does_not_touch_the_plain_one(searches, here):
    plain = searches.models.searcher(asked(searches, here, "")).sampler.pipe
    first, second = (searches.models.searcher(asked(searches, here, "--vae other-vae")).sampler.pipe for _ in range(2))
    assert first.vae is second.vae
    assert first.vae is not plain.vae
    searches.models.searcher(asked(searches, here, "--vae-slicing"))
    kept = [model for model, _ in searches.models._pipes if model == str(here / "sd")]
    assert len(kept) == 2  # the plain one, and the last of the others


def test_what_was_noted_when_a_model_was_loaded_is_said_of_each_search(searches, here, monkeypatch):
    def noted(model, asked, pictures=None):
        made = LOAD(model, asked, pictures)
        made.notes.append("a part of it has no place")
        return made

    monkeypatch.setattr(loading, "load", noted)
    for _ in range(2):
        made = searches.models.searcher(asked(searches, here, "--vae-tiling --vae other-vae"))
        assert "a part of it has no place" in made.sampler.notes


BAD = {
    "--vae /etc/passwd": "there is no --vae '/etc/passwd' here; there is other-vae",
    "--vae owner/name": "there is no --vae 'owner/name' here",
    "--text-encoder x": "there is no --text-encoder 'x' here; there is other-text",
    "--embedding style.safetensors": "there is no --embedding 'style.safetensors' here; there is kitten.safetensors",
    "--config owner/name": "there is no --config 'owner/name' here; there is flux",
    "--control a.png:/etc": "there is no --control '/etc' here; there is edges",
    "--control /etc/passwd:edges": "there is no picture '/etc/passwd' here; there is a.png",
    "--mask ../b.png": "there is no picture '../b.png' here",
    "--image b.png": "there is no picture 'b.png' here",
    "--ip-adapter a.png": "--ip-adapter needs --ip-adapter-weights here",
    "--ip-adapter a.png --ip-adapter-weights o/n/w.safetensors": "there is no --ip-adapter-weights",
    "--attention flash_hub": "is fetched from a hub",
    "--preview tiny": "--preview is auto, full",
    "--preview tiny=/etc": "--preview is auto, full",
    "--call image=/etc/passwd": "--call takes numbers",
    "--call lora=x": "--call takes numbers",
    "--call num_inference_steps=5000": "--call takes numbers",
    "--call num_images_per_prompt=64": "--call takes numbers",
    "--call eta=1e9": "--call takes numbers up to 1000",
    "--call prompt_embeds=[1]": "--call takes numbers",
    "--call eta": "--call takes an argument such as true_cfg_scale=4",
    "--lora x": "--lora has a field of its own",
    "--steps 500": "--steps has a field of its own",
    "--device cuda": "this form takes no --device; it takes --scheduler",
    "--trust-remote-code": "this form takes no --trust-remote-code",
    "euler": "options are written such as",
    "--scheduler 'x": "the options cannot be read",
    "--scheduler": "--scheduler needs a value",
    "--scheduler euler --scheduler ddim": "--scheduler is given twice",
    "--scheduler nonsense": "unknown scheduler 'nonsense'",
    "--cache Nonsense": "unknown cache 'Nonsense'",
    "--cache PAB --draft-cache PAB": "give one of them",
    "--offload everything": "offload is none, model, sequential, group",
    "--vae-tiling=yes": "--vae-tiling takes no value",
    "--max-batch many": "--max-batch takes a number",
    "--max-batch 0": "--max-batch must be at least 1",
    "--scheduler " + "x" * 700: "the options are longer than 600 characters",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_not_offered_or_is_wrong_is_one_sentence_and_nothing_is_loaded(searches, here, text, monkeypatch):
    monkeypatch.setattr(type(searches.models), "_loaded", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=re.escape(BAD[text])):
        asked(searches, here, text, ("a.png",))


def test_what_is_offered_is_checked_when_the_page_starts(here):
    with pytest.raises(ValueError, match=r"there is no vae '\./nowhere'"):
        Searches(here / "out", [str(here / "sd")], [REWARD], offered=Offered(vae=("./nowhere",)))


def test_a_picture_sets_the_options_that_are_offered_and_names_the_others(searches, here):
    options = "--vae other-vae --scheduler 'UniPCMultistep,solver_order=2' --call eta=0.5"
    made = searches.models.searcher(asked(searches, here, options, policy="best-of-N")).search("a red circle")
    made.save(here / "kept")
    from ttsnap.files import metadata

    values, said = restored(metadata.read(here / "kept" / "best.png").own, searches)
    text = values[13]
    assert searches.models.offered.read(text) == searches.models.offered.read(options + " --preview full")
    assert said == "These are the settings of the picture"
    elsewhere = Searches(here / "out", [str(here / "sd")], [REWARD])
    values, said = restored(metadata.read(here / "kept" / "best.png").own, elsewhere)
    assert said.endswith("but for the vae, which this page cannot set")
    assert "--scheduler" in values[13]
