"""LoRAs, textual inversions, other VAEs and text encoders: what the stock pipeline makes that was given the same."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from safetensors.torch import save_file

from tests.pipelines import tiny, tiny_sd
from ttsnap.live.session import load_sampler
from ttsnap.live.settings import ModelSettings, changes
from ttsnap.pipelines.loading import Loading, load

PROMPT, SEED = "a red circle", 3
CALLS = {
    "flux": {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 12},
    "sdxl": {"num_inference_steps": 2, "height": 32, "width": 32},
}
# Modules of the denoisers that get a LoRA, and their names in kohya's layout.
MODULES = {
    "flux": ("transformer_blocks.0.attn.to_out.0", "double_blocks_0_img_attn_proj"),
    "sdxl": ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",) * 2,
}
ENCODER = "text_model.encoder.layers.0.self_attn.out_proj"
WORLD = {
    "torch": torch, "diffusers": diffusers, "transformers": transformers, "peft": peft, "safetensors": safetensors,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.flux().save_pretrained(folder / "flux")
    tiny_sd.sdxl().save_pretrained(folder / "sdxl")
    return folder


def stock(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe, family, prompt=PROMPT):
    generator = torch.Generator("cpu").manual_seed(SEED)
    made = pipe(prompt, generator=generator, output_type="np", **CALLS[family]).images
    return torch.from_numpy(np.asarray(made)).movedim(-1, 1)


def searched(folder, family, prompt=PROMPT, **options):
    """The sampler with additions, and the image of the seed."""
    sampler = load_sampler(str(folder), "cpu", prompt=prompt, **CALLS[family], **options)
    return sampler, sampler.look(sampler.advance(sampler.start([prompt], [SEED]), sampler.num_steps))


def reproduced(sampler, folder, prompt=PROMPT):
    """What the reproduce line makes of the stock pipeline."""
    *before, last = sampler.reproduce(prompt, SEED).split("; ")
    world = WORLD | {"pipe": stock(folder)}
    exec("\n".join(before), world)
    made = eval(last.replace("pipe(", 'pipe(output_type="np", prompt=', 1), world).images
    return torch.from_numpy(np.asarray(made)).movedim(-1, 1)


def matrices(pipe, family, rank=4):
    """Random LoRA matrices of a module of the denoiser and one of the text encoder."""
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    random = torch.Generator().manual_seed(5)
    pairs = []
    for module in (
        denoiser.get_submodule(MODULES[family][0]),
        pipe.text_encoder.get_submodule(ENCODER.partition(".")[2]),
    ):
        down = torch.randn(rank, module.in_features, generator=random)
        pairs.append((down, torch.randn(module.out_features, rank, generator=random)))
    return pairs


def in_diffusers_layout(pipe, family, folder):
    (down, up), (text_down, text_up) = matrices(pipe, family)
    denoiser = f"{'transformer' if family == 'flux' else 'unet'}.{MODULES[family][0]}"
    weights = {f"{denoiser}.lora_A.weight": down, f"{denoiser}.lora_B.weight": up}
    weights |= {f"text_encoder.{ENCODER}.lora_A.weight": text_down, f"text_encoder.{ENCODER}.lora_B.weight": text_up}
    save_file(weights, folder / "style.safetensors")
    return folder / "style.safetensors"


def in_kohya_layout(pipe, family, folder):
    (down, up), (text_down, text_up) = matrices(pipe, family)
    names = {
        f"lora_unet_{MODULES[family][1].replace('.', '_')}": (down, up),
        f"lora_te1_{ENCODER.replace('.', '_')}": (text_down, text_up),
    }
    weights = {}
    for name, (one, other) in names.items():
        weights |= {
            f"{name}.lora_down.weight": one,
            f"{name}.lora_up.weight": other,
            f"{name}.alpha": torch.tensor(2.0),
        }
    save_file(weights, folder / "style.safetensors")
    return folder / "style.safetensors"


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("flux", in_kohya_layout),
        pytest.param("sdxl", in_diffusers_layout, marks=pytest.mark.slow),
        pytest.param("flux", in_diffusers_layout, marks=pytest.mark.slow),
        pytest.param("sdxl", in_kohya_layout, marks=pytest.mark.slow),
    ],
)
def test_a_lora_makes_what_the_stock_pipeline_makes_with_it(models, tmp_path, family, layout):
    theirs = stock(models / family)
    plain = image(theirs, family)
    file = layout(theirs, family, tmp_path)
    theirs.load_lora_weights(str(file), adapter_name="a")
    theirs.set_adapters(["a"], [0.5])
    expected = image(theirs, family)
    assert (expected - plain).abs().max() > 0.01
    sampler, made = searched(models / family, family, lora=f"{file}:.5")
    assert torch.equal(made, expected)
    assert torch.equal(reproduced(sampler, models / family), expected)


@pytest.mark.parametrize("family", ["flux", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_directory_that_peft_saved_is_a_lora_too(models, tmp_path, family):
    theirs = stock(models / family)
    part = "transformer" if family == "flux" else "unet"
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(getattr(theirs, part), config)
    wrapped.save_pretrained(tmp_path / "saved")
    expected = image(theirs, family)  # peft puts its layers into the model itself
    sampler, made = searched(models / family, family, lora=str(tmp_path / "saved"))
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(reproduced(sampler, models / family), made)


def test_several_loras_add_up_and_batches_are_exact(models, tmp_path):
    first = in_diffusers_layout(stock(models / "flux"), "flux", tmp_path)
    second = shutil.copy(first, tmp_path / "other.safetensors")
    theirs = stock(models / "flux")
    for name, file in (("a", first), ("b", second)):
        theirs.load_lora_weights(str(file), adapter_name=name)
    theirs.set_adapters(["a", "b"], [1.0, -0.5])
    sampler, made = searched(models / "flux", "flux", lora=[str(first), f"{second}:-.5"])
    assert torch.equal(made, image(theirs, "flux"))
    batch = sampler.look(sampler.advance(sampler.start([PROMPT] * 3, [SEED, 1, 2]), sampler.num_steps))
    torch.testing.assert_close(batch[:1], made, atol=1e-5, rtol=1e-5)


def test_a_textual_inversion_of_one_encoder_and_of_two(models, tmp_path):
    random = torch.Generator().manual_seed(1)
    vectors = {name: torch.randn(2, 128, generator=random) for name in ("clip_l", "clip_g")}
    save_file(vectors, tmp_path / "cat.safetensors")
    save_file({"<dog>": vectors["clip_l"]}, tmp_path / "dog.safetensors")
    theirs = stock(models / "sdxl")
    for vector, end in ((vectors["clip_l"], ""), (vectors["clip_g"], "_2")):
        parts = {"text_encoder": getattr(theirs, f"text_encoder{end}"), "tokenizer": getattr(theirs, f"tokenizer{end}")}
        theirs.load_textual_inversion(vector, token="<kitten>", **parts)
    prompt = "a red <kitten>"
    expected = image(theirs, "sdxl", prompt)
    assert (expected - image(stock(models / "sdxl"), "sdxl", prompt)).abs().max() > 1e-3
    options = {"embedding": f"{tmp_path / 'cat.safetensors'}:<kitten>"}
    sampler, made = searched(models / "sdxl", "sdxl", prompt, **options)
    assert torch.equal(made, expected)
    assert torch.equal(reproduced(sampler, models / "sdxl", prompt), expected)
    loaded = load(str(models / "flux"), Loading(device="cpu", embedding=(str(tmp_path / "dog.safetensors"),)))
    assert "<dog>_1" in loaded.pipe.tokenizer.get_vocab()


def test_parts_in_place_of_others(models, tmp_path):
    torch.manual_seed(7)
    vae = diffusers.AutoencoderKL.from_config(diffusers.AutoencoderKL.load_config(models / "flux", subfolder="vae"))
    vae.save_pretrained(tmp_path / "vae")
    theirs = stock(models / "flux")
    encoder = transformers.T5EncoderModel(theirs.text_encoder_2.config)
    encoder.save_pretrained(tmp_path / "t5")
    theirs.register_modules(vae=vae.eval(), text_encoder_2=encoder.eval())
    expected = image(theirs, "flux")
    options = {"vae": str(tmp_path / "vae"), "text_encoder": f"text_encoder_2={tmp_path / 't5'}"}
    sampler, made = searched(models / "flux", "flux", **options)
    assert torch.equal(made, expected)
    assert torch.equal(reproduced(sampler, models / "flux"), expected)


def test_the_key_of_a_run_knows_the_content_of_what_is_added(models, tmp_path):
    file = in_diffusers_layout(stock(models / "flux"), "flux", tmp_path)
    before = ModelSettings(model=str(models / "flux"), lora=(f"{file}:.5",)).key()
    assert before["lora"] == (f"{file}:.5",)
    weights = safetensors.torch.load_file(file)
    save_file({name: value + 1 for name, value in weights.items()}, file)
    after = ModelSettings(model=str(models / "flux"), lora=(f"{file}:.5",)).key()
    assert changes(before, after) == [f"the content of lora {file}"]


def test_what_does_not_fit_is_one_sentence_before_anything_is_loaded(models, tmp_path, monkeypatch):
    flux, sdxl = stock(models / "flux"), stock(models / "sdxl")
    file = in_diffusers_layout(flux, "flux", tmp_path)
    (tmp_path / "bad.ckpt").write_bytes(b"x")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    wide = diffusers.AutoencoderKL(latent_channels=16, block_out_channels=(8, 8), norm_num_groups=2,
                                   down_block_types=("DownEncoderBlock2D",) * 2,
                                   up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    wide.save_pretrained(tmp_path / "wide")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", None)
    for options, message in (
        ({"lora": f"{file}:x"}, "takes FILE or FILE:weight, such as style.safetensors:.8"),
        ({"lora": "nowhere.safetensors"}, "there is no LoRA 'nowhere.safetensors'; give a .safetensors file"),
        ({"lora": str(tmp_path / "bad.ckpt")}, "is a pickle, which can run code"),
        ({"lora": str(tmp_path / "two.safetensors")}, "holds no LoRA"),
        ({"embedding": str(file)}, "holds no textual inversion"),
        ({"vae": str(tmp_path / "wide")}, "does not fit as vae: its latent_channels is 16, and the model needs 4"),
        ({"text_encoder": f"text_encoder_3={tmp_path}"}, "has no text_encoder_3 to replace; it has"),
        ({"text_encoder": f"clip={tmp_path}"}, "takes DIR, or such as text_encoder_2=DIR"),
        ({"attention": "flash"}, "cannot be used here"),
        ({"image": "nowhere.png"}, "cannot read nowhere.png: it is not there"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load_sampler(str(models / "flux"), "cpu", **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"is a LoRA of a model with a transformer; .* has a unet"):
        load_sampler(str(models / "sdxl"), "cpu", lora=str(file))
    with pytest.raises(ValueError, match="lora is for a model that is named; a pipeline is used as it is"):
        load_sampler(sdxl, lora=str(file))


def test_a_lora_of_another_model_is_refused(models, tmp_path):
    other = {f"transformer.blocks.0.{name}.weight": torch.ones(4, 4) for name in ("lora_A", "lora_B")}
    save_file(other, tmp_path / "other.safetensors")
    wrong = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 32)}
    wrong["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.ones(40, 2)
    save_file(wrong, tmp_path / "wrong.safetensors")
    for name in ("other", "wrong"):
        with pytest.raises(ValueError, match=f"{name}.safetensors does not fit FluxPipeline"):
            load(str(models / "flux"), Loading(device="cpu", lora=(str(tmp_path / f"{name}.safetensors"),)))


def test_a_lora_that_is_not_here_is_told_apart_from_the_model(models, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = r"^repository 'owner/name/style\.safetensors' is not on this machine and HF_HUB_OFFLINE is set"
    with pytest.raises(ValueError, match=told):
        load(str(models / "flux"), Loading(device="cpu", lora=("owner/name/style.safetensors:.5",)))


def test_on_the_command_line(models, tmp_path, ttsnap):
    file = in_diffusers_layout(stock(models / "flux"), "flux", tmp_path)
    asked = ["generate", PROMPT, "--model", models / "flux", "--size", 32, "--steps", 2, "--candidates", 2]
    asked += ["--reward", "tests.pipelines.tiny:redness", "--policy", "best-of-n", "--call", "max_sequence_length=12"]
    code, out, err = ttsnap(*asked, "--lora", f"{file}:.5", "--lora", file, "--out", tmp_path / "o", "--json")
    assert code == 0, err
    line = json.loads(out)["reproduce"]
    assert f"pipe.load_lora_weights({str(file)!r}, adapter_name='style_2'" in line
    assert "pipe.set_adapters(['style', 'style_2'], [0.5, 1.0])" in line
    again = ["generate", "--from", tmp_path / "o" / "best.png", "--model", models / "flux", "--out", tmp_path / "p"]
    again += ["--reward", "tests.pipelines.tiny:redness"]
    code, _, err = ttsnap(*again)
    assert (code, "there is no LoRA 'style.safetensors'; give a .safetensors file" in err) == (2, True), err
    code, _, err = ttsnap(*again, "--lora", f"{file}:.5", "--lora", file)
    assert code == 0, err
    assert (tmp_path / "p" / "best.png").read_bytes() == (tmp_path / "o" / "best.png").read_bytes()
