"""Stock pipelines from a hub id, a diffusers directory or a single file, and how they use device and memory.

Whatever is wrong with a model is one sentence that says what to do. Weights are read from safetensors only: a pickle
can run code when it is opened.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Any

from ttsnap.pipelines.additions import Additions
from ttsnap.pipelines.conditions import Pictures
from ttsnap.pipelines.hub_errors import explain
from ttsnap.pipelines.models import MODELS
from ttsnap.pipelines.quantization import (
    KINDS,
    cast,
    check_place,
    check_quantize,
    config_of,
    notes_of,
    parts_of,
    read_quantize,
)
from ttsnap.pipelines.single_file import (
    GGUF,
    PICKLES,
    Loaded,
    Refused,
    check_directory,
    check_gguf,
    check_weights,
    first_line,
    load_file,
    load_gguf,
    parts_in,
    variant,
)

MODULAR = "modular_model_index.json"  # describes a pipeline that is made of blocks
DEVICE_MAPS = ("balanced",)  # diffusers' own for a whole pipeline; its models may be dispatched otherwise before
OFFLOADS = ("none", "model", "sequential", "group")


@dataclass(frozen=True, kw_only=True)
class Loading(Additions):
    """How a model that is named is loaded.

    Attributes:
        device: Where it runs: cpu, cuda, cuda:1, mps (default: the best there is).
        dtype: float32, bfloat16 or float16 (default: bfloat16 on accelerators, float32 on the CPU).
        offload: model: keep models that do not run in main memory; sequential: every layer; group: every layer, the
            next one on its way while one runs; none.
        device_map: balanced: the parts of a directory or hub id spread over all GPUs.
        quantize: Weights in fewer bits: nf4, bnb-int8 (bitsandbytes), int8, fp8 (torchao), fp8-cast; of the denoiser,
            or such as int8:transformer,text_encoder_2.
        compile: Compile the denoiser's repeated blocks (torch.compile).
        attention: How attention is computed: a backend of diffusers, such as flash, sage, xformers or native.
        attention_slicing: Attention in slices (UNets), for less memory.
        vae_slicing: Decode image by image, for less memory.
        vae_tiling: Decode large images in tiles.
        config: Directory or hub id of the pipeline that a single .safetensors or .gguf file belongs to.
    """

    device: str | None = None
    dtype: str | None = None
    offload: str = "none"
    device_map: str | None = None
    quantize: str | None = None
    compile: bool = False
    attention: str | None = None
    attention_slicing: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    config: str | None = None

    def check(self) -> None:
        """ValueError about what can be wrong without a model."""
        if self.offload not in OFFLOADS:
            raise ValueError(f"offload is {', '.join(OFFLOADS)}, got {self.offload!r}")
        if self.compile and self.offload in ("sequential", "group"):
            raise ValueError(
                f"compile does not go with offload {self.offload}; use offload model, or leave out compile"
            )
        if self.device_map not in (None, *DEVICE_MAPS):
            raise ValueError(f"device-map is {', '.join(DEVICE_MAPS)}, got {self.device_map!r}")
        others = {"device": self.device, "offload": self.offload != "none"}
        if self.device_map and (wrong := [name for name, value in others.items() if value]):
            raise ValueError(f"device-map says where a model is, as {wrong[0]} does; leave one of them out")
        if self.quantize is not None:
            check_quantize(self.quantize)
        if self.attention is not None:
            check_attention(self.attention)
        self.check_files()


def load_model(model: str, loading: Loading | None = None) -> Any:
    """A stock pipeline: `shapes`, a diffusers directory, a hub id, or a single .safetensors file; see `load`."""
    return load(model, loading or Loading()).pipe


def load(model: str, loading: Loading, pictures: Pictures | None = None) -> Loaded:
    """A stock pipeline with what is to be added to it, and the lines that make the stock pipeline this one.

    Args:
        model: see `check_model`.
        loading: device, dtype and so on.
        pictures: that it is to take; it becomes the variant of the model that does.

    Raises:
        ValueError: no such model, device, dtype or option; the message says what would work.
    """
    import torch

    loading.check()
    where = find_device(loading.device)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if loading.dtype is not None and loading.dtype not in kinds:
        raise ValueError(f"unknown dtype {loading.dtype!r}; known are {', '.join(kinds)}")
    if loading.offload != "none" and where.type == "cpu":
        raise ValueError(f"offload {loading.offload} needs an accelerator to load from the CPU to; leave it out here")
    if loading.quantize is not None:
        check_place(loading.quantize, where)
    if loading.device_map and (model in MODELS or Path(model).is_file()):
        raise ValueError(f"device-map {loading.device_map} is for a diffusers directory or hub id, not for {model}")
    if loading.device_map and (found := torch.accelerator.device_count()) < 2:
        raise ValueError(
            f"device-map {loading.device_map} spreads a model over several GPUs, this machine has {found}; leave it out"
        )
    usual = torch.float32 if where.type == "cpu" else torch.bfloat16
    dtype = kinds[loading.dtype] if loading.dtype else usual
    if model in MODELS:
        if loading.quantize and KINDS[read_quantize(loading.quantize)[0]].package:
            raise ValueError(f"--quantize {loading.quantize} is for a diffusers directory or hub id, not for {model}")
        loaded = Loaded(MODELS[model].load(loading.dtype and dtype))
    else:
        check_model(model)
        loading.check_against(model)
        if pictures:
            pictures.check_against(model)
        loaded = _load(model, dtype, loading)
        loaded.pipe.set_progress_bar_config(disable=True)
    loading.add(loaded, loaded.pipe.dtype)
    if pictures:
        pictures.dress(loaded)
    pipe = loaded.pipe
    if loading.quantize and not KINDS[read_quantize(loading.quantize)[0]].package:
        loaded.lines += cast(pipe, parts_of(loading.quantize, _model_names(pipe)))
    if not loading.device_map:
        place(pipe, where, loading.offload)
    save_memory(pipe, loading)
    if loading.attention:
        loaded.lines += set_attention(pipe, loading.attention)
    if loading.compile:
        compile_denoiser(pipe)
    return loaded


def quiet_libraries() -> None:
    """No loading bars and notes of diffusers and transformers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)  # older versions know no other
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity(CRITICAL)  # what they log as errors, tracebacks and all, is raised as well
        logging.disable_progress_bar()


def check_model(model: str) -> None:
    """ValueError where a model can be neither `shapes`, a diffusers directory, a single file, nor a hub id."""
    path = Path(model)
    if model in MODELS:
        return
    if path.suffix in PICKLES and (path.is_file() or not path.exists()):
        raise ValueError(
            f"{model} is a pickle, which can run code when it is opened; get the model as .safetensors, or convert it "
            "where you trust it"
        )
    if path.is_file():
        if path.suffix not in (".safetensors", GGUF):
            raise ValueError(
                f"{model} is a file; a model file ends with .safetensors or .gguf, else give its directory"
            )
        if path.suffix == GGUF:
            check_gguf(path)
        return
    if path.is_dir() and not any((path / name).is_file() for name in ("model_index.json", MODULAR)):
        raise ValueError(f"{model} is not a diffusers directory: it has no model_index.json{_instead(path)}")
    if not path.exists() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise ValueError(
            f"unknown model {model!r}; it can be {', '.join(map(repr, MODELS))}, a diffusers directory, a .safetensors "
            "file, or a hub id such as owner/name"
        )


def _instead(path: Path) -> str:
    """What a directory that is no pipeline may be."""
    names = {file.name for file in path.iterdir()}
    if "adapter_config.json" in names or any("lora" in name.lower() for name in names):
        return "; it seems to be a LoRA: give its base as --model, and it as --lora"
    if "config.json" in names:
        return "; it holds one part of a pipeline: give the directory that holds them all"
    return ""


def find_device(device: str | None) -> Any:
    """The torch device of that name, or the best there is; ValueError names those that are there."""
    import torch

    if device is None:
        backends = (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True))
        return torch.device(next(name for name, there in backends if there))
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"device {device!r} is not there; this machine has {', '.join(here)}") from error
    return where


def read_devices(text: str | Sequence[Any]) -> list[str]:
    """Devices such as `0,1,2,3` (GPUs by number), `cuda:0,cuda:1` or `cpu,cpu`.

    Raises:
        ValueError: that is none.
    """
    names = [str(name).strip() for name in (text.split(",") if isinstance(text, str) else text)]
    if not names or not all(names):
        raise ValueError(f"--devices takes devices such as 0,1,2,3 or cpu,cpu, got {text!r}")
    return [f"cuda:{name}" if name.isdigit() else name for name in names]


def place(pipe: Any, device: Any, offload: str = "none") -> None:
    """Put a pipeline on a device, or let its models, or their layers one by one, come there when they run."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")
    else:
        pipe.to(device)


def save_memory(pipe: Any, loading: Loading) -> None:
    """Attention and VAE in slices and tiles, as far as asked for.

    Raises:
        ValueError: the model's VAE cannot do that.
    """
    if loading.attention_slicing:
        pipe.enable_attention_slicing()
    for wanted, name in ((loading.vae_slicing, "slicing"), (loading.vae_tiling, "tiling")):
        if wanted:
            enable = getattr(getattr(pipe, "vae", None), f"enable_{name}", None)
            if enable is None:
                raise ValueError(f"{type(pipe).__name__} has no VAE {name}; leave it out")
            enable()


def check_attention(name: str) -> None:
    """ValueError where diffusers has no such attention backend, or its package is not here."""
    from diffusers.models import attention_dispatch
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        plain = ", ".join(one for one in known if not one.startswith("_"))
        raise ValueError(f"unknown attention {name!r}; diffusers has {plain}")
    check = getattr(attention_dispatch, "_check_attention_backend_requirements", None)  # else a loaded model says it
    try:
        if check is not None:
            check(AttentionBackendName(name))
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"attention {name!r} cannot be used here: {first_line(error)}") from error


def set_attention(pipe: Any, name: str) -> list[str]:
    """Let the denoisers compute attention by another backend; the lines of Python that do so.

    Raises:
        ValueError: it cannot be used here, or the denoiser's attention does not ask for one.
    """
    from diffusers.models.attention_dispatch import attention_backend

    lines = []
    for part in ("transformer", "transformer_2", "unet"):
        model = getattr(pipe, part, None)
        processors = getattr(model, "attn_processors", None)
        if model is None or processors is None:
            continue
        if not all(hasattr(one, "_attention_backend") for one in processors.values()):
            continue
        try:
            with attention_backend(name):  # the model's method sets it for all models of the process, too
                model.set_attention_backend(name)
        except (RuntimeError, ImportError, ValueError) as error:
            raise ValueError(f"attention {name!r} cannot be used here: {first_line(error)}") from error
        lines.append(f"pipe.{part}.set_attention_backend({name!r})")
    if not lines:
        raise ValueError(f"the denoiser of {type(pipe).__name__} takes no attention backend in diffusers; leave it out")
    return lines


def compile_denoiser(pipe: Any, **options: Any) -> None:
    """Compile the denoiser in place: its repeated blocks, if it names them, else as a whole.

    Args:
        pipe: a stock pipeline with a `transformer` or a `unet`.
        **options: of `torch.compile`.

    Raises:
        ValueError: the pipeline has no such denoiser.
    """
    model = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if model is None:
        raise ValueError(f"compile takes a transformer or a UNet; {type(pipe).__name__} has neither")
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(**options)
    else:
        model.compile(**options)


def warm_up(sampler: Any) -> None:
    """Let a compiled denoiser compile what a search needs, so that no measurement pays for it.

    From now on its batches are filled up to few sizes (`filled_size`). Each of them runs once here, and so do texts of
    two lengths: whatever comes after that runs without another compilation.

    Raises:
        ValueError: the compiler does not work here.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    from ttsnap.pipelines.running import filled_size

    sampler.compiled = frozenset({"transformer" if getattr(sampler.pipe, "transformer", None) is not None else "unet"})
    sizes = {filled_size(count, sampler.max_batch) for count in range(1, sampler.max_batch + 1)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the search itself will say that a prompt is cut
            for count in (*sorted(sizes - {1}), 1):  # a batch of one is always compiled apart
                for prompt in ("a", "a b c d e f g h") if count <= 2 else ("a",):
                    sampler.advance(sampler.start([prompt] * count, list(range(count))), 1)
    except (TorchDynamoException, InductorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the denoiser cannot be compiled here ({reason}); leave out compile") from error
    sampler.forget_prompts()


def _load(model: str, dtype: Any, loading: Loading) -> Loaded:
    """A pipeline on the CPU, or where `device_map` says."""
    from diffusers import DiffusionPipeline

    path, config, quantize = Path(model), loading.config, loading.quantize
    options = {"torch_dtype": dtype, "use_safetensors": True}
    modular = path.is_dir() and not (path / "model_index.json").is_file()
    try:
        if quantize and KINDS[read_quantize(quantize)[0]].package and (path.is_file() or modular):
            raise Refused(f"--quantize {quantize} is for a diffusers directory or hub id; {model} is none")
        if path.suffix == GGUF:
            return load_gguf(path, dtype, config)
        if path.is_file():
            return Loaded(load_file(path, dtype, config))
        if config is not None:
            raise ValueError("config belongs to a single .safetensors or .gguf file")
        if modular:
            return Loaded(_load_modular(model, dtype))
        if path.is_dir():
            check_directory(path)
        if loading.device_map:
            options["device_map"] = loading.device_map
        lines, notes = list[str](), list[str]()
        if quantize:
            index = parts_in(dict(DiffusionPipeline.load_config(model)))
            options["quantization_config"], written = config_of(quantize, parts_of(quantize, index), dtype)
            line = f"pipe = diffusers.DiffusionPipeline.from_pretrained({model!r}, torch_dtype={dtype}, "
            lines = [f"{line}quantization_config={written})"] if written else []
            notes = notes_of(quantize, parts_of(quantize, index))
        try:
            found = variant(path) if path.is_dir() else None
            return Loaded(DiffusionPipeline.from_pretrained(model, variant=found, **options), lines, notes)
        except OSError as error:
            if path.is_dir() or "model_index.json" not in str(error):
                raise
            return Loaded(_load_modular(model, dtype))
    except Refused:
        raise
    except Exception as error:
        raise ValueError(explain(model, error)) from error


def _model_names(pipe: Any) -> list[str]:
    """Names of the models of a pipeline."""
    import torch

    return [name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)]


def _load_modular(model: str, dtype: Any) -> Any:
    """A pipeline that is made of blocks; the parts of a directory are read from there, wherever it was saved."""
    from diffusers import ModularPipeline

    index = Path(model) / MODULAR
    pipe = ModularPipeline.from_pretrained(model)
    if not index.is_file():  # on the hub
        pipe.load_components(torch_dtype=dtype, use_safetensors=True)
        return pipe
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
        parts = {name: part[2] for name, part in data.items() if isinstance(part, list)}
    except (ValueError, IndexError, TypeError) as error:
        raise Refused(f"{index} is damaged; download the model again") from error
    here = {name: model for name, part in parts.items() if (index.parent / (part.get("subfolder") or name)).is_dir()}
    for folder in here:
        check_weights(index.parent / (parts[folder].get("subfolder") or folder))
    sources = {"pretrained_model_name_or_path": here} if here else {}
    pipe.load_components(torch_dtype=dtype, use_safetensors=dict.fromkeys(here, True), **sources)
    return pipe
