"""More model options of the page: as on the command line, and nothing that is not offered."""

from __future__ import annotations

import re

import diffusers
import numpy as np
import pytest
import torch

import ttsnap
from tests.pipelines import conditioned, tiny_sd
from ttsnap.app.form import restored
from ttsnap.app.options import Offered
from ttsnap.app.queue import Request
from ttsnap.app.searches import Searches

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
    return folder


@pytest.fixture(scope="module")
def searches(here):
    offered = Offered(
        vae=(str(here / "other-vae"),),
        control=(str(here / "edges"),),
        ip_adapter_weights=(str(here / "ip-adapter.safetensors"),),
    )
    return Searches(here / "out", [str(here / "sd")], [REWARD], device="cpu", offered=offered)


def asked(searches, here, options, pictures=(), **more):
    names = tuple(str(here / name) for name in pictures)
    given = {"policy": "best-of-N", "candidates": 2, "steps": 2, "size": "32"} | more
    request = Request("a red circle", str(here / "sd"), (REWARD,), options=options, pictures=names, **given)
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


def test_a_pipeline_with_options_is_kept_and_does_not_touch_the_plain_one(searches, here):
    plain = searches.models.searcher(asked(searches, here, "")).sampler.pipe
    first, second = (searches.models.searcher(asked(searches, here, "--vae other-vae")).sampler.pipe for _ in range(2))
    assert first.vae is second.vae
    assert first.vae is not plain.vae
    searches.models.searcher(asked(searches, here, "--vae-slicing"))
    assert len(searches.models._pipes) == 2  # the plain one, and the last of the others


BAD = {
    "--vae /etc/passwd": "there is no --vae '/etc/passwd' here; there is other-vae",
    "--vae owner/name": "there is no --vae 'owner/name' here",
    "--text-encoder x": "there is no --text-encoder 'x' here; ttsnap app --text-encoder offers one",
    "--embedding style.safetensors": "ttsnap app --embedding offers one",
    "--config owner/name": "ttsnap app --config offers one",
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
