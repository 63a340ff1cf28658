"""Weights in fewer bits, as far as a CPU runs them: what the stock pipeline makes that was quantized alike."""

from __future__ import annotations

import importlib
import importlib.util
import json
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests import original_layout
from tests.pipelines import tiny, tiny_sd
from ttsnap.live.session import load_sampler
from ttsnap.live.settings import ModelSettings
from ttsnap.pipelines.loading import Loading, load, place

PROMPT, SEED = "a red circle", 3
SMALL = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux")
    tiny.flux().save_pretrained(path)
    return path


def stock(folder, **parts):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe, seed=SEED, kind="pt"):
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(PROMPT, generator=generator, output_type=kind, **SMALL).images


def searched(model, **options):
    sampler = load_sampler(str(model), "cpu", prompt=PROMPT, **SMALL, **options)
    return sampler, sampler.look(sampler.advance(sampler.start([PROMPT], [SEED]), sampler.num_steps))


def reproduced(sampler, folder):
    """What the reproduce line makes of the stock pipeline."""
    *before, last = sampler.reproduce(PROMPT, SEED).split("; ")
    world = {"torch": torch, "diffusers": diffusers, "pipe": stock(folder)}
    world |= {name: importlib.import_module(name) for name in ("torchao", "transformers") if name in "".join(before)}
    exec("\n".join(before), world)
    return eval(last.replace("pipe(", 'pipe(output_type="pt", prompt=', 1), world).images


def write_gguf(weights, path):
    """A GGUF file with matrices in 8 bits, as published ones have them; vectors as they are."""
    import gguf
    from gguf.quants import quantize

    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(path), "denoiser")
    for name, value in weights.items():
        array = value.float().numpy()
        if name.endswith(".weight") and value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LAYOUTS = {"as published": original_layout.sd3_transformer, "diffusers": lambda model: model.state_dict()}


@pytest.mark.parametrize("layout", ["as published", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_a_gguf_denoiser_with_the_rest_of_its_pipeline(tmp_path, layout):
    folder = tmp_path / "sd3"
    tiny_sd.save(tiny_sd.sd3, folder)
    weights = LAYOUTS[layout](stock(folder).transformer)
    file = write_gguf(weights, tmp_path / "sd3-Q8_0.gguf")
    transformer = diffusers.SD3Transformer2DModel.from_single_file(
        str(file), quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(folder), subfolder="transformer", torch_dtype=torch.float32,
    )  # fmt: skip
    expected = image(stock(folder, transformer=transformer))
    difference = (expected - image(stock(folder))).abs().max()
    assert 0 < difference < 0.1  # of 8 bits
    sampler, made = searched(file, config=str(folder))
    assert torch.equal(made, expected)
    assert torch.equal(reproduced(sampler, folder), expected)
    assert sampler.pipe.transformer.context_embedder.weight.dtype == torch.uint8
    key = ModelSettings(model=str(file), config=str(folder)).key()
    assert list(key["contents"]) == [f"model {file}", f"config {folder}"]


def test_weights_cast_to_8_bits_between_calls(folder):
    theirs = stock(folder)
    theirs.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = image(theirs)
    sampler, made = searched(folder, quantize="fp8-cast")
    assert torch.equal(made, expected)
    assert torch.equal(reproduced(sampler, folder), expected)
    assert sampler.pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.parametrize(
    ("kind", "config"), [("int8", "Int8WeightOnlyConfig"), ("fp8:transformer", "Float8WeightOnlyConfig")]
)
def test_weights_that_torchao_quantizes(folder, kind, config, ttsnap, tmp_path):
    from diffusers.quantizers import PipelineQuantizationConfig
    from torchao import quantization

    how = {"transformer": diffusers.TorchAoConfig(getattr(quantization, config)())}
    theirs = stock(folder, quantization_config=PipelineQuantizationConfig(quant_mapping=how), torch_dtype=torch.float32)
    expected = image(theirs)
    assert (expected - image(stock(folder))).abs().max() > 0
    sampler, made = searched(folder, quantize=kind)
    assert torch.equal(made, expected)
    assert torch.equal(reproduced(sampler, folder), expected)
    out = str(tmp_path / "out")
    asked = ["generate", PROMPT, "--model", str(folder), "--quantize", kind, "--device", "cpu", "--size", "32"]
    asked += ["--reward", "tests.pipelines.tiny:redness", "--candidates", "3", "--policy", "best-of-n", "--steps", "2"]
    asked += ["--max-batch", "1", "--call", "max_sequence_length=12"]  # a batch rounds its sums otherwise
    code, said, err = ttsnap(*asked, "--out", out, "--json")
    assert code == 0, err
    seed = json.loads(said)["seed"]
    assert np.array_equal(Image.open(tmp_path / "out" / "best.png"), image(theirs, seed, "pil")[0])


BITSANDBYTES = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
INT8 = {"load_in_8bit": True}


@contextmanager
def without_a_gpu():
    """Denoisers run by bitsandbytes' kernels for CPUs, where diffusers asks for a GPU, and so does ttsnap."""
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    from ttsnap.pipelines import quantization

    kinds = {kind: replace(quantization.KINDS[kind], cuda=False) for kind in ("nf4", "bnb-int8")}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(quantization.KINDS, kinds))
        for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
            stack.enter_context(mock.patch.object(quantizer, "validate_environment"))
            stack.enter_context(mock.patch.object(quantizer, "update_device_map", lambda self, device_map: device_map))
        yield


def stock_in_bits(folder, parts, options):
    """The stock pipeline whose parts bitsandbytes quantizes."""
    from diffusers.quantizers import PipelineQuantizationConfig

    libraries = {part: transformers if part.startswith("text_encoder") else diffusers for part in parts}
    how = {part: library.BitsAndBytesConfig(**options) for part, library in libraries.items()}
    return stock(folder, quantization_config=PipelineQuantizationConfig(quant_mapping=how), torch_dtype=torch.float32)


@BITSANDBYTES
@pytest.mark.parametrize(
    ("kind", "options"), [("nf4:text_encoder_2", NF4), ("bnb-int8:text_encoder,text_encoder_2", INT8)]
)
def test_text_encoders_that_bitsandbytes_quantizes_on_a_cpu(folder, kind, options):
    parts = kind.partition(":")[2].split(",")
    expected = image(stock_in_bits(folder, parts, options))
    assert (expected - image(stock(folder))).abs().max() > 0
    sampler, made = searched(folder, quantize=kind)
    assert torch.equal(made, expected)
    assert torch.equal(reproduced(sampler, folder), expected)


@BITSANDBYTES
@pytest.mark.parametrize(("kind", "options", "layer"), [("nf4", NF4, "Linear4bit"), ("bnb-int8", INT8, "Linear8bitLt")])
def test_a_denoiser_that_bitsandbytes_quantizes_by_its_kernels_for_cpus(folder, kind, options, layer):
    with without_a_gpu():
        expected = image(stock_in_bits(folder, ["transformer"], options))
        assert (expected - image(stock(folder))).abs().max() > 0
        sampler, made = searched(folder, quantize=kind)
        assert type(sampler.pipe.transformer.transformer_blocks[0].attn.to_q).__name__ == layer
        assert torch.equal(made, expected)
        assert torch.equal(reproduced(sampler, folder), expected)
        assert any("--max-batch 1" in note for note in sampler.notes) == (kind == "bnb-int8")
        batch = sampler.look(sampler.advance(sampler.start([PROMPT] * 3, [SEED, 4, 5]), sampler.num_steps))
        assert (batch[:1] - expected).abs().max() < 2e-4  # sums of a batch are rounded otherwise


@pytest.mark.slow
def test_layers_that_come_when_they_run(folder):
    pipe = stock(folder)
    place(pipe, torch.device("cpu"), "group")
    from ttsnap.pipelines.sampler import Sampler

    sampler = Sampler(pipe, **SMALL)
    made = sampler.look(sampler.advance(sampler.start([PROMPT], [SEED]), sampler.num_steps))
    assert torch.equal(made, image(stock(folder)))


def test_what_cannot_run_here_is_one_sentence_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    none, every = (lambda name: None), (lambda name: object())
    (tmp_path / "bad.gguf").write_bytes(b"nothing")
    (tmp_path / "good.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", None)
    for model, options, there, message in (
        (folder, {"quantize": "nf5"}, find, "takes nf4, bnb-int8, int8, fp8, fp8-cast"),
        (folder, {"quantize": "nf4"}, none, "needs the package bitsandbytes: pip install bitsandbytes"),
        (folder, {"quantize": "nf4"}, every, "needs an NVIDIA GPU, and the model runs on cpu; there int8 works"),
        (folder, {"quantize": "nf4:text_encoder_2,transformer"}, every, "needs an NVIDIA GPU"),
        (folder, {"quantize": "int8"}, none, "needs the package torchao: pip install torchao"),
        ("shapes", {"quantize": "int8"}, every, "is for a diffusers directory or hub id, not for shapes"),
        (folder, {"quantize": "int8:unet"}, every, "has no unet; it has"),
        (tmp_path / "bad.gguf", {"config": str(folder)}, find, "is no GGUF file"),
        (tmp_path / "good.gguf", {"config": str(folder)}, none, "needs the package gguf: pip install gguf"),
        (tmp_path / "good.gguf", {}, find, "holds a denoiser alone; give the directory or hub id of its pipeline"),
        (folder, {"offload": "group"}, find, "offload group needs an accelerator"),
    ):
        monkeypatch.setattr(importlib.util, "find_spec", there)
        with pytest.raises(ValueError, match=message) as caught:
            load(str(model), Loading(device="cpu", **options))
        assert "\n" not in str(caught.value)


def test_a_gguf_file_of_another_model_does_not_fit(tmp_path, folder):
    tiny_sd.stable_diffusion().save_pretrained(tmp_path / "sd")
    file = write_gguf({"a.weight": torch.ones(32, 32)}, tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"other.gguf does not fit the unet of .*sd"):
        load(str(file), Loading(device="cpu", config=str(tmp_path / "sd")))
