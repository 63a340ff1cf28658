"""Stock pipelines from a hub id, a diffusers directory or a single file, and how they use device and memory.

Whatever is wrong with a model is one sentence that says what to do. Weights are read from safetensors only: a pickle
can run code when it is opened.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OFFLOADS = ("none", "model")
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


@dataclass(frozen=True)
class Loading:
    """How a model that is named is loaded.

    Attributes:
        device: where it runs (default: the best there is).
        dtype: float32, bfloat16 or float16 (default: bfloat16 on accelerators, float32 on the CPU).
        offload: `model`: whole models wait in main memory until they run; `none`.
        compile: compile the denoiser's repeated blocks with `torch.compile`.
        attention_slicing: attention of UNets in slices, for less memory.
        vae_slicing: decode image by image.
        vae_tiling: decode in tiles.
        config: the directory or hub id of the pipeline that a single file belongs to.
    """

    device: str | None = None
    dtype: str | None = None
    offload: str = "none"
    compile: bool = False
    attention_slicing: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    config: str | None = None

    def check(self) -> None:
        """ValueError about what can be wrong without a model."""
        if self.offload not in OFFLOADS:
            raise ValueError(f"offload is {', '.join(OFFLOADS)}, got {self.offload!r}")


def load_model(model: str, loading: Loading | None = None) -> Any:
    """A stock pipeline: `shapes`, a diffusers directory, a hub id, or a single .safetensors file.

    Raises:
        ValueError: no such model, device, dtype or option; the message says what would work.
    """
    import torch

    loading = loading or Loading()
    loading.check()
    where = find_device(loading.device)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if loading.dtype is not None and loading.dtype not in kinds:
        raise ValueError(f"unknown dtype {loading.dtype!r}; known are {', '.join(kinds)}")
    if loading.offload != "none" and where.type == "cpu":
        raise ValueError(f"offload {loading.offload} needs an accelerator to load from the CPU to; leave it out here")
    if model == "shapes":
        from ttsnap.shapes.pipeline import load_pipeline

        pipe = load_pipeline(loading.dtype and kinds[loading.dtype])
    else:
        check_model(model)
        usual = torch.float32 if where.type == "cpu" else torch.bfloat16
        pipe = _load(model, kinds[loading.dtype] if loading.dtype else usual, loading.config)
        pipe.set_progress_bar_config(disable=True)
    place(pipe, where, loading.offload)
    save_memory(pipe, loading)
    if loading.compile:
        compile_denoiser(pipe)
    return pipe


def check_model(model: str) -> None:
    """ValueError where a model can be neither `shapes`, a diffusers directory, a single file, nor a hub id."""
    path = Path(model)
    if model == "shapes":
        return
    if path.suffix in PICKLES and (path.is_file() or not path.exists()):
        raise ValueError(
            f"{model} is a pickle, which can run code when it is opened; get the model as .safetensors, or convert it "
            "where you trust it"
        )
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{model} is a file; a model file ends with .safetensors, else give its directory")
        return
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(f"{model} is not a diffusers directory: it has no model_index.json{_instead(path)}")
    if not path.exists() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise ValueError(
            f"unknown model {model!r}; it can be 'shapes', a diffusers directory, a .safetensors file, or a hub id "
            "such as owner/name"
        )


def _instead(path: Path) -> str:
    """What a directory that is no pipeline may be."""
    names = {file.name for file in path.iterdir()}
    if "adapter_config.json" in names or any("lora" in name.lower() for name in names):
        return "; it seems to be a LoRA: load its base in Python, call load_lora_weights, and give ttsnap that pipeline"
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


def place(pipe: Any, device: Any, offload: str = "none") -> None:
    """Put a pipeline on a device, or let its models come there when they run."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
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

    The second batch size makes the compiler treat the batch as variable; a batch of one is always apart. Whatever comes
    after that runs without another compilation.

    Raises:
        ValueError: the compiler does not work here.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        for count in (2, 3, 1):
            if count <= sampler.max_batch:
                sampler.advance(sampler.start(["a"] * count, list(range(count))), 1)
    except (TorchDynamoException, InductorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the denoiser cannot be compiled here ({reason}); leave out compile") from error
    sampler.forget_prompts()


def _load(model: str, dtype: Any, config: str | None) -> Any:
    """A pipeline on the CPU."""
    from diffusers import DiffusionPipeline

    path = Path(model)
    try:
        if path.is_file():
            return _load_file(path, dtype, config)
        if config is not None:
            raise ValueError("config belongs to a single .safetensors file")
        if path.is_dir():
            check_directory(path)
        return DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, use_safetensors=True)
    except Refused:
        raise
    except Exception as error:
        raise ValueError(explain(model, error)) from error


class Refused(ValueError):
    """A model that cannot be used; the message says why and what would work."""


def check_directory(path: Path) -> None:
    """Refuse a directory whose description, class or weights cannot be used.

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
    for part in sorted(key for key, value in data.items() if isinstance(value, list) and value[0] is not None):
        folder = path / part
        if not folder.is_dir():
            raise Refused(f"{path} lacks its folder {part}; download the model again")
        weights = sorted(folder.glob("*.safetensors"))
        for file in weights:
            check_safetensors(file)
        if not weights and (pickles := [file for file in folder.iterdir() if file.suffix in PICKLES]):
            raise Refused(
                f"{folder} holds its weights as a pickle only ({pickles[0].name}), which can run code when it is "
                "opened; get the model as safetensors, or convert it where you trust it"
            )


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


def _load_file(path: Path, dtype: Any, config: str | None) -> Any:
    """A pipeline from a single file: whole, or a denoiser with the rest from `config`."""
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, infer_diffusers_model_type

    header = check_safetensors(path)
    if any(mark in key for key in header for mark in LORA):
        raise Refused(
            f"{path} is a LoRA, not a whole model: load its base in Python, call load_lora_weights, and give ttsnap "
            "that pipeline"
        )
    if config is not None and (Path(config) / "model_index.json").is_file():
        pipe = _with_denoiser(path, Path(config), header, dtype)
        if pipe is not None:
            return pipe
    keys = {key: torch.empty(entry["shape"], device="meta") for key, entry in header.items()}
    kind = infer_diffusers_model_type(keys)  # `v1` also where nothing is known of the keys
    names = [name for prefix, name in SINGLE_FILES.items() if kind.startswith(prefix)]
    if not names or (kind == "v1" and CHECKPOINT_KEY_NAMES["v1"] not in keys):
        known = ", ".join(dict.fromkeys(SINGLE_FILES.values()))
        raise Refused(
            f"{path} is not a whole model of a known layout ({known}); give a diffusers directory, or with a denoiser "
            "alone the directory of its pipeline as config"
        )
    options = {"config": config} if config else {}
    return getattr(diffusers, names[0]).from_single_file(str(path), torch_dtype=dtype, **options)


def _with_denoiser(path: Path, base: Path, header: dict[str, Any], dtype: Any) -> Any:
    """The pipeline of a directory with the denoiser of a file; None if the file is a whole model."""
    import diffusers

    if any(key.startswith(("first_stage_model.", "vae.", "conditioner.", "cond_stage_model.")) for key in header):
        return None
    check_directory(base)
    data = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    part = next((name for name in ("transformer", "unet") if name in data), None)
    if part is None:
        return None
    kind = getattr(diffusers, data[part][1])
    try:
        denoiser = kind.from_single_file(str(path), config=str(base), subfolder=part, torch_dtype=dtype)
    except Exception as error:
        raise Refused(
            f"{path} does not fit the {part} of {base} ({_first_line(error)}); give the directory of its own pipeline"
        ) from error
    if any(parameter.is_meta for parameter in denoiser.parameters()):
        raise Refused(f"{path} does not hold all weights of the {part} of {base}; give its own pipeline as config")
    return diffusers.DiffusionPipeline.from_pretrained(
        base, torch_dtype=dtype, use_safetensors=True, **{part: denoiser}
    )


def explain(model: str, error: BaseException) -> str:
    """One sentence about why a model could not be loaded, and what to do."""
    from huggingface_hub import constants, errors

    chain = list(_chain(error))

    def met(*kinds: type[BaseException]) -> Any:
        return next((one for one in chain if isinstance(one, kinds)), None)

    def status() -> int | None:
        codes = (getattr(getattr(one, "response", None), "status_code", None) for one in chain)
        return next((code for code in codes if code), None)

    if met(errors.GatedRepoError) or status() == 403:
        return (
            f"model {model!r} is gated: accept its terms on its page on the hub, then log in with `hf auth login` or "
            "set HF_TOKEN"
        )
    if met(errors.RepositoryNotFoundError) or status() == 401:
        return (
            f"there is no model {model!r} on the hub, or it is private: check the name, or log in with `hf auth login`"
        )
    if met(errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError) or status() == 404:
        return f"model {model!r} on the hub is no diffusers pipeline: it lacks a file such as model_index.json"
    if (code := status()) is not None and code >= 429:
        return f"the hub answers {code} for model {model!r}; try again later, or give a local directory"
    text = " ".join(str(one) for one in chain)
    if "safetensors" in text and "not" in text and "find" in text:
        return (
            f"model {model!r} has no safetensors weights, only pickles, which can run code; choose another copy of it"
        )
    offline = met(errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE
    if offline or met(errors.LocalEntryNotFoundError, ConnectionError) or _is_connection(chain):
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        return f"model {model!r} is not on this machine and {why}; connect, or give the directory of a copy"
    return f"cannot load model {model!r}: {_first_line(error)}"


def _is_connection(chain: Sequence[BaseException]) -> bool:
    return any(type(one).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError") for one in chain)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
