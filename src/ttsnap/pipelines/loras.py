"""LoRAs in the layouts of diffusers, kohya and peft, by the pipeline's own methods."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttsnap.pipelines.added_files import check_source, check_takes, split, unfit, weights_in
from ttsnap.pipelines.single_file import DENOISERS, LORA, Loaded, check_safetensors

PEFT = "base_model.model."  # how keys begin that peft itself saved


@dataclass(frozen=True)
class Lora:
    """A LoRA: a file, the directory of one, or a hub id with or without the file's name in it; and its weight."""

    source: str
    weight: float = 1.0

    @classmethod
    def read(cls, text: str) -> Lora:
        """Of `FILE` or `FILE:weight`."""
        source, weight = split(text)
        try:
            return cls(source, float(weight) if weight else 1.0)
        except ValueError:
            raise ValueError(f"--lora takes FILE or FILE:weight, such as style.safetensors:.8, got {text!r}") from None

    @property
    def file(self) -> Path | None:
        """The file of weights, where it is on this machine."""
        return weights_in(Path(self.source), "adapter_model.safetensors", "pytorch_lora_weights.safetensors")

    @property
    def name(self) -> str:
        """What the pipeline calls it."""
        place = Path(self.source)
        plain = place.stem if place.suffix == ".safetensors" else place.name
        return re.sub(r"\W+", "_", plain).strip("_") or "lora"

    def check(self) -> None:
        """ValueError where it cannot be one."""
        check_source(self.source, "LoRA")
        if self.file and not any(mark in key for key in check_safetensors(self.file) for mark in LORA):
            raise ValueError(f"{self.file} holds no LoRA: none of its keys has a name such as lora_A or lora_up")
        if importlib.util.find_spec("peft") is None:
            raise ValueError("LoRAs need the package peft: pip install peft")

    @property
    def by_peft(self) -> bool:
        """Whether peft saved it, for the denoiser alone, beside its configuration."""
        if self.file is None or not self.file.with_name("adapter_config.json").is_file():
            return False
        return all(key.startswith(PEFT) for key in check_safetensors(self.file))


def add_loras(loaded: Loaded, loras: Sequence[Lora]) -> None:
    """Add LoRAs to a pipeline, each with its weight.

    Raises:
        ValueError: one does not fit the pipeline.
    """
    pipe, names = loaded.pipe, list[str]()
    if loras:
        check_takes(type(pipe), "load_lora_weights", "LoRA")
    for lora in loras:
        name = _unused(lora.name, names)
        names.append(name)
        try:
            with _heard() as said:
                loaded.lines.append(_add_lora(pipe, lora, name))
        except Exception as error:
            raise unfit(lora.source, pipe, error) from error
        if not any(name in of_part for of_part in pipe.get_list_adapters().values()):
            raise ValueError(f"{lora.source} changes nothing of a {type(pipe).__name__}: it is made for another model")
        if any("unexpected keys" in text for text in said):
            loaded.notes.append(f"a part of {lora.source} has no place in {type(pipe).__name__} and was left out")
    if loras:
        weights = [lora.weight for lora in loras]
        pipe.set_adapters(names, weights)
        loaded.lines.append(f"pipe.set_adapters({names}, {weights})")


def _add_lora(pipe: Any, lora: Lora, name: str) -> str:
    """Load a LoRA; the line that does it."""
    if not lora.by_peft:
        source, options = lora.source, {"adapter_name": name, "use_safetensors": True}
        if lora.file:
            source = str(lora.file.absolute())
        elif source.count("/") > 1:  # of a repository that holds several
            owner, repository, file = source.split("/", 2)
            source, options = f"{owner}/{repository}", {"weight_name": file, **options}
        pipe.load_lora_weights(source, **options)
        return f"pipe.load_lora_weights({source!r}, {', '.join(f'{key}={value!r}' for key, value in options.items())})"
    import peft
    from safetensors.torch import load_file

    assert lora.file is not None
    part = next(part for part in DENOISERS if getattr(pipe, part, None) is not None)
    model, folder, file = getattr(pipe, part), str(lora.file.parent.absolute()), str(lora.file.absolute())
    model.add_adapter(peft.LoraConfig.from_pretrained(folder), adapter_name=name)
    weights = {key.removeprefix(PEFT): value for key, value in load_file(file).items()}
    missed = peft.set_peft_model_state_dict(model, weights, adapter_name=name)
    if missed.unexpected_keys:
        raise ValueError(f"it has no {missed.unexpected_keys[0]}")
    return (
        f"pipe.{part}.add_adapter(peft.LoraConfig.from_pretrained({folder!r}), adapter_name={name!r}); "
        f"peft.set_peft_model_state_dict(pipe.{part}, {{key.removeprefix({PEFT!r}): value for key, value in "
        f"safetensors.torch.load_file({file!r}).items()}}, adapter_name={name!r})"
    )


def denoiser_of(keys: Mapping[str, Any]) -> str | None:
    """Which kind of denoiser a LoRA's keys are of; None where they do not tell."""
    if any(
        key.startswith(("unet.", "lora_unet_down_blocks", "lora_unet_up_blocks", "lora_unet_input_b")) for key in keys
    ):
        return "unet"
    if any(key.startswith("transformer.") or "double_blocks" in key or "joint_blocks" in key for key in keys):
        return "transformer"
    return None


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """What diffusers' log warns of."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("diffusers")
    handlers, level = log.handlers, log.level
    log.handlers = [handler]
    log.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        log.handlers = handlers
        log.setLevel(level)


def _unused(name: str, names: Sequence[str]) -> str:
    return (
        name
        if name not in names
        else next(f"{name}_{i}" for i in range(2, len(names) + 3) if f"{name}_{i}" not in names)
    )
