"""Single files in the layouts that models were published in, whole or in part, make the pipeline they came from."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests import original_layout
from tests.pipelines import tiny, tiny_flow, tiny_sd
from tests.pipelines.test_loading import ask
from ttsnap.pipelines.loading import Loading, load_model
from ttsnap.pipelines.sampler import Sampler

SMALL = {"num_inference_steps": 2, "height": 32, "width": 32}
PROMPTS = ["a red circle", "a blue square"]
WHOLE = {
    "SD 1.5": (tiny_sd.stable_diffusion, original_layout.stable_diffusion),
    "SDXL": (lambda: tiny_sd.sdxl(second_width=64), original_layout.sdxl),
}


def write(weights, path):
    save_file({key: value.contiguous().clone() for key, value in weights.items()}, path)
    return path


def load(path, config):
    return load_model(str(path), Loading(device="cpu", config=str(config)))


def check_same_weights(found, pipe):
    """The same parts with the same weights."""
    assert type(found) is type(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            expected, weights = part.state_dict(), getattr(found, name).state_dict()
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[key], value) for key, value in expected.items()), name


def check_same(found, pipe, **options):
    """The same weights, and the same finished latents."""
    check_same_weights(found, pipe)
    made = []
    for one in (found, pipe):
        sampler = Sampler(one, **SMALL, **options)
        made.append(sampler.advance(sampler.start(PROMPTS, [1, 2]), 2).latents)
    torch.testing.assert_close(*made, atol=1e-5, rtol=1e-5)  # weights lie elsewhere in memory: other kernels


@pytest.fixture(scope="module", params=WHOLE)
def whole(request, tmp_path_factory):
    """A pipeline, its single file in the original layout, and its directory without the weights."""
    build, layout = WHOLE[request.param]
    pipe, folder = build(), tmp_path_factory.mktemp("whole")
    pipe.save_pretrained(folder / "config")
    shutil.copytree(folder / "config", folder / "whole")
    for weights in (folder / "config").rglob("*.safetensors"):
        weights.unlink()
    return pipe, write(layout(pipe), folder / "model.safetensors"), folder


def test_a_whole_model_in_its_original_layout_is_the_model_of_the_directory(whole):
    pipe, file, folder = whole
    check_same(load(file, folder / "config"), pipe)
    assert (
        load_model(str(file), Loading(device="cpu", dtype="bfloat16", config=str(folder / "config"))).unet.dtype
        == torch.bfloat16
    )


def test_what_a_file_lacks_comes_from_the_directory_or_is_asked_for(whole, tmp_path):
    pipe, file, folder = whole
    weights = load_file(file)
    for begins in (original_layout.LATENT_VAE, ("cond_stage_model.", "conditioner.")):
        some = write(
            {key: value for key, value in weights.items() if not key.startswith(begins)}, tmp_path / "a.safetensors"
        )
        check_same(load(some, folder / "whole"), pipe)
        with pytest.raises(ValueError, match=r"(vae|text_encoder)") as caught:
            load(some, folder / "config")
        assert "\n" not in str(caught.value)
    for begins in ("model.diffusion_model.", "first_stage_model.", "cond"):  # the denoiser, the VAE, a text encoder
        one = max(key for key in weights if key.startswith(begins) and key.endswith("bias"))
        part = write({key: value for key, value in weights.items() if key != one}, tmp_path / "part.safetensors")
        with pytest.raises(
            ValueError, match=r"(some of the weights are not in it|does not hold all weights of).*; give"
        ):
            load(part, folder / "config")


def test_sd3_without_text_encoders_takes_these_from_the_directory(tmp_path):
    pipe = tiny_sd.sd3()
    pipe.save_pretrained(tmp_path / "sd3")
    file = write(original_layout.sd3(pipe), tmp_path / "sd3.safetensors")
    for part in ("transformer", "vae"):  # which the file holds
        for weights in (tmp_path / "sd3" / part).glob("*.safetensors"):
            weights.unlink()
    check_same(load(file, tmp_path / "sd3"), pipe, max_sequence_length=12)


def test_sd3_with_its_text_encoders_needs_their_configuration_alone(tmp_path):
    pipe = tiny_sd.sd3()
    narrow = {"hidden_size": pipe.text_encoder.config.hidden_size // 2}  # by which G and L are told apart
    torch.manual_seed(0)
    pipe.text_encoder_2 = CLIPTextModelWithProjection(
        CLIPTextConfig(**pipe.text_encoder.config.to_dict() | narrow)
    ).eval()
    projection = pipe.text_encoder.text_projection.weight
    projection.data = torch.eye(*projection.shape)  # as it is where a file has none
    pipe.save_pretrained(tmp_path / "sd3")
    file = write(original_layout.sd3_with_encoders(pipe), tmp_path / "sd3.safetensors")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        for weights in (tmp_path / "sd3" / part).glob("*.safetensors"):
            weights.unlink()
    check_same(load(file, tmp_path / "sd3"), pipe, max_sequence_length=12)


def test_a_file_of_another_model_does_not_fit(whole, tmp_path):
    _, file, _ = whole
    tiny.flux().save_pretrained(tmp_path / "flux")
    with pytest.raises(ValueError, match=r"does not fit the .*transformer.*; give its own") as caught:
        load(file, tmp_path / "flux")
    assert "\n" not in str(caught.value)


def test_a_denoiser_takes_the_rest_from_its_pipeline(tmp_path):
    other = tiny.flux()
    other.save_pretrained(tmp_path / "flux")
    for parameter in other.transformer.parameters():
        parameter.data.mul_(0.9)
    file = write(other.transformer.state_dict(), tmp_path / "finetuned.safetensors")
    check_same(load(file, tmp_path / "flux"), other, max_sequence_length=12)
    missing = load_file(file)
    missing.pop(next(iter(missing)))
    with pytest.raises(ValueError, match=r"does not (hold all weights of|fit) the transformer"):
        load(write(missing, tmp_path / "part.safetensors"), tmp_path / "flux")


DENOISERS = {  # as they are published for programs that are not diffusers
    "FLUX.2": (tiny_flow.flux2_klein, original_layout.flux2, {"max_sequence_length": 96}),
    "Qwen-Image": (tiny_flow.qwen_image, lambda model: model.state_dict(), {}),
    "Z-Image": (tiny_flow.z_image, original_layout.z_image, {"max_sequence_length": 128}),
}


@pytest.mark.parametrize("family", DENOISERS)
def test_a_published_denoiser_takes_the_rest_from_its_pipeline(tmp_path, family):
    build, layout, options = DENOISERS[family]
    other = build()
    other.save_pretrained(tmp_path / "model")
    for parameter in other.transformer.parameters():
        parameter.data.mul_(0.9)
    file = write(layout(other.transformer), tmp_path / "finetuned.safetensors")
    check_same(load(file, tmp_path / "model"), other, **options)


@pytest.mark.slow
def test_flux_in_the_layout_of_black_forest_labs(tmp_path):
    """With the width of the released models, which diffusers' conversion takes for granted: 1 GB in bfloat16."""
    from diffusers import FluxTransformer2DModel

    pipe = tiny.flux(guidance_embeds=True).to(torch.bfloat16)
    config = dict(pipe.transformer.config) | {"num_attention_heads": 24, "attention_head_dim": 128}
    config |= {"axes_dims_rope": (16, 56, 56)}
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        pipe.register_modules(transformer=FluxTransformer2DModel.from_config(config).eval().requires_grad_(False))
    finally:
        torch.set_default_dtype(default)
    pipe.save_pretrained(tmp_path / "flux")
    for weights in (tmp_path / "flux" / "transformer").glob("*.safetensors*"):
        weights.unlink()
    file = write(original_layout.flux(pipe.transformer, "model.diffusion_model."), tmp_path / "flux.safetensors")
    check_same_weights(
        load_model(str(file), Loading(device="cpu", dtype="bfloat16", config=str(tmp_path / "flux"))), pipe
    )
    with pytest.raises(ValueError, match="holds a FluxPipeline without its vae, text_encoder, text_encoder_2; give"):
        load_model(str(file), Loading(device="cpu"))


def test_a_flux_file_without_text_encoders_says_what_to_do(tmp_path):
    file = write({"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(4)}, tmp_path / "flux.safetensors")
    with pytest.raises(
        ValueError, match=r"holds a FluxPipeline without its .*text_encoder.*; give the directory or hub"
    ):
        load_model(str(file), Loading(device="cpu"))


@pytest.mark.slow
def test_a_known_layout_asks_the_hub_for_its_configuration(tmp_path):
    """Keys of Stable Diffusion 1; offline their configuration cannot be had."""
    keys = (
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        "first_stage_model.x",
        "cond_stage_model.x",
    )
    file = write({key: torch.ones(4) for key in keys}, tmp_path / "sd.safetensors")
    told = ask("http://127.0.0.1:9", [str(file)], HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "HF_HUB_OFFLINE is set" in told[str(file)]
