"""Weights in fewer bits: bitsandbytes, torchao and layerwise casting, by diffusers' own means.

A GGUF file holds a denoiser that is quantized already: it is a model file like any other (`single_file`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ttsnap.pipelines.single_file import DENOISERS


@dataclass(frozen=True)
class Kind:
    """A way to keep weights in fewer bits.

    Attributes:
        package: that is needed; None: weights are cast.
        config: diffusers' (and transformers') class of its configuration; with `inner`, of torchao, for one of these.
        options: of the configuration.
        cuda: needs an NVIDIA GPU, but for text encoders on a CPU.
    """

    package: str | None = None
    config: str = ""
    inner: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    cuda: bool = False


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS = {
    "nf4": Kind("bitsandbytes", "BitsAndBytesConfig", options=NF4, cuda=True),
    "bnb-int8": Kind("bitsandbytes", "BitsAndBytesConfig", options={"load_in_8bit": True}, cuda=True),
    "int8": Kind("torchao", "TorchAoConfig", "Int8WeightOnlyConfig"),
    "fp8": Kind("torchao", "TorchAoConfig", "Float8WeightOnlyConfig"),
    "fp8-cast": Kind(),
}


def read_quantize(text: str) -> tuple[str, tuple[str, ...]]:
    """Kind, and parts where they are named, of `int8` or `int8:transformer,text_encoder_2`.

    Raises:
        ValueError: there is no such kind.
    """
    name, _, parts = text.partition(":")
    if name not in KINDS:
        raise ValueError(f"--quantize takes {', '.join(KINDS)}, with or without parts (int8:transformer), got {text!r}")
    return name, tuple(filter(None, parts.split(",")))


def check_quantize(text: str) -> None:
    """ValueError where there is no such kind, or its package is not installed."""
    name, _ = read_quantize(text)
    package = KINDS[name].package
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"--quantize {name} needs the package {package}: pip install {package}")


def check_place(text: str, device: Any) -> None:
    """ValueError where a device cannot run it."""
    name, parts = read_quantize(text)
    texts = bool(parts) and all(part.startswith("text_encoder") for part in parts)  # transformers runs them on a CPU
    if KINDS[name].cuda and device.type != "cuda" and not (texts and device.type == "cpu"):
        raise ValueError(
            f"--quantize {name} needs an NVIDIA GPU, and the model runs on {device.type}; there int8 works (torchao), "
            "and fp8-cast, which needs no package"
        )


def parts_of(text: str, index: Any) -> list[str]:
    """The parts of a pipeline that are quantized: those that are named, else its denoiser.

    Args:
        text: what is asked for.
        index: names of the pipeline's parts.

    Raises:
        ValueError: it has no such part.
    """
    _, named = read_quantize(text)
    if lacking := [part for part in named if part not in index]:
        raise ValueError(f"--quantize {text}: this pipeline has no {lacking[0]}; it has {', '.join(index)}")
    parts = list(named) or [part for part in DENOISERS if part in index][:1]
    if not parts:
        raise ValueError(f"--quantize takes a transformer or a UNet; name the parts, of {', '.join(index)}")
    return parts


def config_of(text: str, parts: Sequence[str], dtype: Any) -> tuple[Any, str]:
    """What `from_pretrained` is told, and the same in Python; (None, "") where weights are cast after it."""
    kind = KINDS[read_quantize(text)[0]]
    if kind.package is None:
        return None, ""
    import diffusers
    import transformers
    from diffusers.quantizers import PipelineQuantizationConfig

    options = dict(kind.options) | ({"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in kind.options else {})
    made, written = {}, []
    for part in parts:
        library = transformers if part.startswith("text_encoder") else diffusers
        if kind.inner:
            import torchao

            options = {"quant_type": getattr(torchao.quantization, kind.inner)()}
        made[part] = getattr(library, kind.config)(**options)
        given = ", ".join(f"{name}={value!r}" for name, value in options.items() if not kind.inner)
        given += f"torchao.quantization.{kind.inner}()" if kind.inner else ""
        written.append(f"{part!r}: {library.__name__}.{kind.config}({given})")
    line = f"diffusers.quantizers.PipelineQuantizationConfig(quant_mapping={{{', '.join(written)}}})"
    return PipelineQuantizationConfig(quant_mapping=made), line


def notes_of(text: str, parts: Sequence[str]) -> list[str]:
    """What is to be said of searches with these parts quantized."""
    name, _ = read_quantize(text)
    if name != "bnb-int8" or all(part.startswith("text_encoder") for part in parts):
        return []
    return [
        "bnb-int8 keeps the columns in 16 bits that have outliers anywhere in the batch, so a picture changes a little "
        "with those beside it; --max-batch 1 makes it alone"
    ]


def cast(pipe: Any, parts: Sequence[str]) -> list[str]:
    """Keep the weights of parts in 8 bits between their layers' calls; the lines that do it."""
    import torch

    lines = []
    for part in parts:
        model = getattr(pipe, part)
        if not hasattr(model, "enable_layerwise_casting"):
            raise ValueError(f"--quantize fp8-cast takes models of diffusers, and {part} is a {type(model).__name__}")
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=pipe.dtype)
        lines.append(
            f"pipe.{part}.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=pipe.dtype)"
        )
    return lines
