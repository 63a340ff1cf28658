"""Files of models: what may be read, and pipelines from a single .safetensors file.

A single file holds a whole model, a denoiser alone, or something between. What it lacks comes from the directory or hub
id of a pipeline (`config`), which also says what the parts look like.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# Pipelines of single files, by the kind that diffusers finds in their keys (by the prefix of its name).
SINGLE_FILES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "playground-v2-5": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
}
LORA = ("lora_A", "lora_B", "lora_up", "lora_down", "lora.up", "lora.down", "hada_w1", "lokr_w1")
# How keys of parts begin in the layouts of single files; all other keys are the denoiser's.
CLIPS = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
}
T5 = ("text_encoders.t5xxl.",)
VAE = ("first_stage_model.", "vae.")
DENOISERS = ("transformer", "unet")
GGUF = ".gguf"  # ends a file of a denoiser that is quantized


@dataclass
class Loaded:
    """A stock pipeline with what was added to it.

    Attributes:
        pipe: the pipeline.
        lines: of Python that do the same to the pipeline of the model alone.
        notes: for who sees the result.
    """

    pipe: Any
    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Refused(ValueError):
    """A model that cannot be used; the message says why and what would work."""


def check_directory(path: Path, without: Collection[str] = ()) -> None:
    """Refuse a directory whose description, class or weights cannot be used.

    Args:
        path: of the pipeline.
        without: parts that are not needed.

    Raises:
        Refused: what is wrong with it.
    """
    import diffusers

    index = path / "model_index.json"
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
        name = data["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{index} is damaged; download the model again") from error
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise Refused(
            f"{path} is a {name}, which diffusers {diffusers.__version__} does not have (code that comes with a model "
            "is not run); a newer diffusers may"
        )
    for part in sorted(set(parts_in(data)) - set(without)):
        folder = path / part
        if not folder.is_dir():
            raise Refused(f"{path} lacks its folder {part}; download the model again")
        check_weights(folder)


def check_weights(folder: Path) -> None:
    """Refuse a part of a pipeline whose weights are pickles, or damaged."""
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        check_safetensors(file)
    if not weights and (pickles := [file for file in folder.iterdir() if file.suffix in PICKLES]):
        raise Refused(
            f"{folder} holds its weights as a pickle only ({pickles[0].name}), which can run code when it is "
            "opened; get the model as safetensors, or convert it where you trust it"
        )


def variant(path: Path) -> str | None:
    """The variant, such as `fp16`, that a pipeline's directory holds where it does not hold the plain weights."""
    for folder in sorted(file.parent for file in path.glob("*/config.json")):
        names = [file.name.removesuffix(".safetensors") for file in folder.glob("*.safetensors")]
        found = sorted(name.split(".", 1)[1].split("-")[0] for name in names if "." in name)
        if found and len(found) == len(names):
            return found[0]
    return None


def check_safetensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: name -> dtype, shape, offsets.

    Raises:
        Refused: it is truncated, or no safetensors file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path} is truncated or no safetensors file; download it again") from error
    if needed != size:
        raise Refused(f"{path} is truncated: {size} of {needed} bytes are there; download it again")
    return dict(header)


def load_file(path: Path, dtype: Any, config: str | None) -> Any:
    """A pipeline from a single file, with what the file lacks from `config`.

    Raises:
        Refused: it is no model, or together they are no pipeline.
    """
    header = check_safetensors(path)
    if any(mark in key for key in header for mark in LORA):
        raise Refused(f"{path} is a LoRA, not a whole model: give its base as --model, and it as --lora")
    pipe = _as_its_keys_say(path, header, dtype) if config is None else _as_config_says(path, header, dtype, config)
    for name, model in _models(pipe):
        if any(tensor.is_meta for tensor in model.parameters()):
            where = f" of {config}" if config else ""
            raise Refused(
                f"{path} does not hold all weights of the {name}{where}; give the pipeline it belongs to as config"
            )
    return pipe


def check_gguf(path: Path) -> None:
    """Refuse a file that is no GGUF, or where the package that reads it is not installed."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise Refused(f"{path} is no GGUF file; download it again")
    if importlib.util.find_spec("gguf") is None:
        raise Refused(f"{path} needs the package gguf: pip install gguf")


def load_gguf(path: Path, dtype: Any, config: str | None) -> Loaded:
    """The pipeline that `config` describes, with the denoiser of a GGUF file, which computes in a dtype.

    Raises:
        Refused: there is no config, or they do not fit.
    """
    import diffusers

    if config is None:
        raise Refused(f"{path} holds a denoiser alone; give the directory or hub id of its pipeline as config")
    parts = parts_in(dict(diffusers.DiffusionPipeline.load_config(config)))
    part = next((name for name in DENOISERS if name in parts), "")
    kind: Any = getattr(diffusers, parts[part][1]) if part else None
    if not hasattr(kind, "from_single_file"):
        raise Refused(f"diffusers reads no denoiser of {config} from a single file; give another model")
    if Path(config).is_dir():
        check_directory(Path(config), without=[part])
    options = {"config": config, "subfolder": part, "torch_dtype": dtype}
    try:
        quantized = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
        model = kind.from_single_file(str(path), quantization_config=quantized, **options)
    except Exception as error:
        if not Path(config).is_dir():  # the hub may have had its say
            raise
        raise Refused(f"{path} does not fit the {part} of {config} ({first_line(error)})") from error
    given = {part: model, "torch_dtype": dtype, "use_safetensors": True}
    pipe = diffusers.DiffusionPipeline.from_pretrained(config, **given)
    written = ", ".join(f"{name}={value!r}" for name, value in options.items())
    line = f"pipe.{part} = diffusers.{kind.__name__}.from_single_file({str(path.absolute())!r}, "
    return Loaded(pipe, [f"{line}quantization_config=diffusers.GGUFQuantizationConfig({dtype}), {written})"])


def _as_its_keys_say(path: Path, header: Mapping[str, Any], dtype: Any) -> Any:
    """A whole model of a known layout; diffusers gets its configuration from the hub."""
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, infer_diffusers_model_type

    keys = {key: torch.empty(entry["shape"], device="meta") for key, entry in header.items()}
    kind = infer_diffusers_model_type(keys)  # `v1` also where nothing is known of the keys
    name = next((name for prefix, name in SINGLE_FILES.items() if kind.startswith(prefix)), None)
    if name is None or (kind == "v1" and CHECKPOINT_KEY_NAMES["v1"] not in keys):
        known = ", ".join(dict.fromkeys(SINGLE_FILES.values()))
        raise Refused(
            f"{path} is not a whole model of a known layout ({known}); give the directory or hub id of its pipeline as "
            "config"
        )
    pipeline = getattr(diffusers, name)
    needed = {part: getattr(kinds[0], "__name__", "") for part, kinds in pipeline._get_signature_types().items()}
    if lacking := [part for part, kind in needed.items() if _begins(part, kind) and not _holds(header, part, kind)]:
        raise Refused(
            f"{path} holds a {name} without its {', '.join(lacking)}; give the directory or hub id of a whole pipeline "
            "of that kind as config, which they are taken from"
        )
    return pipeline.from_single_file(str(path), torch_dtype=dtype)


def _as_config_says(path: Path, header: Mapping[str, Any], dtype: Any, config: str) -> Any:
    """The pipeline that `config` describes, with every part that the file holds from the file."""
    import diffusers

    index = dict(diffusers.DiffusionPipeline.load_config(config))
    parts = parts_in(index)
    denoiser = next((name for name in DENOISERS if name in parts), None)
    if denoiser is None:
        raise Refused(f"a single file holds a transformer or a UNet; {config} ({index['_class_name']}) has neither")
    held = [name for name, (_, kind) in parts.items() if name == denoiser or _holds(header, name, kind)]
    if Path(config).is_dir():
        check_directory(Path(config), without=held)
    options = {"torch_dtype": dtype, "use_safetensors": True}
    try:
        if held == [denoiser]:
            kind = getattr(diffusers, parts[denoiser][1])
            model = kind.from_single_file(str(path), config=config, subfolder=denoiser, torch_dtype=dtype)
            return diffusers.DiffusionPipeline.from_pretrained(config, **{denoiser: model}, **options)
        rest = diffusers.DiffusionPipeline.from_pretrained(config, **dict.fromkeys(held), **options)
        lacking = {name: model for name, model in _models(rest) if name not in held}
        pipeline = getattr(diffusers, index["_class_name"])
        return pipeline.from_single_file(str(path), config=config, torch_dtype=dtype, **lacking)
    except Exception as error:
        if not Path(config).is_dir():  # the hub may have had its say
            raise
        what = " and the ".join(held)
        why = "some of the weights are not in it" if "meta tensor" in str(error) else first_line(error)
        raise Refused(f"{path} does not fit the {what} of {config} ({why}); give its own pipeline as config") from error


def parts_in(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of the parts that a model_index.json names."""
    named = {key: value for key, value in index.items() if isinstance(value, list | tuple) and len(value) == 2}
    return {key: (str(value[0]), str(value[1])) for key, value in named.items() if value[0] is not None}


def _begins(part: str, kind: str) -> tuple[str, ...]:
    """How the keys of a part begin in single files; () for what no layout holds, or for the denoiser."""
    if part == "vae":
        return VAE
    if part.startswith("text_encoder"):
        return T5 if kind == "T5EncoderModel" else CLIPS.get(part, ())
    return ()


def _holds(header: Iterable[str], part: str, kind: str) -> bool:
    """Whether a file has weights of a part."""
    begins = _begins(part, kind)
    return bool(begins) and any(key.startswith(begins) for key in header)


def _models(pipe: Any) -> list[tuple[str, Any]]:
    """Name and module of the models of a pipeline."""
    import torch

    return [(name, part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)]


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
