"""What is added to a loaded pipeline or put in the place of its parts: LoRAs, textual inversions, VAE, text encoders.

Each is done by the pipeline's own methods, and tells the line of Python that does the same to the stock pipeline. What
can be seen to be wrong in the files is said before a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttsnap.pipelines.added_files import (
    check_source,
    check_takes,
    folder_of,
    listed,
    read_json,
    split,
    unfit,
    weights_in,
)
from ttsnap.pipelines.embeddings import add_embedding, embeddings_in
from ttsnap.pipelines.loras import Lora, add_loras, denoiser_of
from ttsnap.pipelines.single_file import DENOISERS, Loaded, check_safetensors

ALIKE = ("latent_channels", "z_dim", "hidden_size", "d_model", "vocab_size", "projection_dim")


@dataclass(frozen=True, kw_only=True)
class Additions:
    """What is added to a model that is named, or put in the place of its parts.

    Attributes:
        lora: LoRA to add: FILE, directory or hub id, with :WEIGHT at its end or not (may be repeated).
        embedding: Textual inversion to add, FILE or FILE:TOKEN (may be repeated).
        vae: VAE in place of the model's own: directory, hub id or .safetensors file.
        text_encoder: Text encoder in place of its own: DIR, or such as text_encoder_2=DIR (may be repeated).
    """

    lora: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    vae: str | None = None
    text_encoder: tuple[str, ...] = ()

    def loras(self) -> list[Lora]:
        """The LoRAs."""
        return [Lora.read(text) for text in listed(self.lora)]

    def embeddings(self) -> list[tuple[str, str | None]]:
        """Source and token, if one is given, of each textual inversion."""
        return [split(text) for text in listed(self.embedding)]

    def swaps(self) -> list[tuple[str, str]]:
        """Part and source of each part that takes the place of another."""
        vae = [("vae", self.vae)] if self.vae else []
        return vae + [_named_encoder(text) for text in listed(self.text_encoder)]

    def sources(self) -> dict[str, str]:
        """Files, directories and hub ids, by what they are."""
        found = {f"lora {lora.source}": lora.source for lora in self.loras()}
        found |= {f"embedding {source}": source for source, _ in self.embeddings()}
        return found | {f"{part} {source}": source for part, source in self.swaps()}

    def check_files(self) -> None:
        """ValueError about what can be wrong without a model."""
        for lora in self.loras():
            lora.check()
        for source, _ in self.embeddings():
            check_source(source, "textual inversion")
            if file := weights_in(Path(source), "learned_embeds.safetensors"):
                embeddings_in(file)
        for part, source in self.swaps():
            check_source(source, part)

    def check_against(self, model: str) -> None:
        """ValueError about what does not fit the model of a diffusers directory; nothing is loaded."""
        import diffusers

        index = read_json(Path(model) / "model_index.json")
        name = str(index.get("_class_name"))
        kind = getattr(diffusers, name, None)
        if kind is None:
            return  # what a model of the hub or a file cannot do shows when it is loaded
        denoiser = next((part for part in DENOISERS if part in index), None)
        for lora in self.loras():
            check_takes(kind, "load_lora_weights", "LoRA")
            of = denoiser_of(check_safetensors(lora.file)) if lora.file else None
            if of and denoiser and of != denoiser:
                raise ValueError(f"{lora.source} is a LoRA of a model with a {of}; {model} has a {denoiser} ({name})")
        if self.embeddings():
            check_takes(kind, "load_textual_inversion", "textual inversion")
        for part, source in self.swaps():
            if not isinstance(index.get(part), list) or index[part][0] is None:
                have = [key for key in index if key.startswith(("vae", "text_encoder")) and index[key][0]]
                raise ValueError(f"{name} has no {part} to replace; it has {', '.join(have)}")
            own, other = (read_json(folder_of(place, part) / "config.json") for place in (model, source))
            _check_alike(part, source, own, other)

    def add(self, loaded: Loaded, dtype: Any) -> None:
        """Add to a pipeline on the CPU: parts first, then what is added to them.

        Raises:
            ValueError: what does not fit, and why.
        """
        for part, source in self.swaps():
            _replace(loaded, part, source, dtype)
        for source, token in self.embeddings():
            add_embedding(loaded, source, token)
        add_loras(loaded, self.loras())


def _replace(loaded: Loaded, part: str, source: str, dtype: Any) -> None:
    pipe = loaded.pipe
    old = getattr(pipe, part, None)
    if old is None:
        raise ValueError(f"{type(pipe).__name__} has no {part} to replace")
    kind = type(old)
    library = kind.__module__.partition(".")[0]
    folder = folder_of(source, part)
    options: dict[str, Any] = {"use_safetensors": True}
    method, place = "from_pretrained", source
    if Path(source).is_file():
        method, place, options = "from_single_file", str(Path(source).absolute()), {}
        if (own := Path(str(pipe.name_or_path)) / part).is_dir():
            options = {"config": str(own.absolute())}
    elif Path(source).is_dir():
        place = str(folder.absolute())
    try:
        new = getattr(kind, method)(place, torch_dtype=dtype, **options)
    except Exception as error:
        raise unfit(source, pipe, error) from error
    _check_alike(part, source, dict(_plain(old.config)), dict(_plain(new.config)))
    pipe.register_modules(**{part: new.eval()})
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    loaded.lines.append(f"pipe.{part} = {library}.{kind.__name__}.{method}({place!r}, torch_dtype=pipe.dtype{given})")


def _plain(config: Any) -> Mapping[str, Any]:
    plain: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else config
    return plain


def _check_alike(part: str, source: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """ValueError where a part cannot take the place of another."""
    for name in ALIKE:
        if name in old and name in new and old[name] != new[name]:
            raise ValueError(
                f"{source} does not fit as {part}: its {name} is {new[name]}, and the model needs {old[name]}"
            )
    scales = [len(config["block_out_channels"]) for config in (old, new) if "block_out_channels" in config]
    if len(set(scales)) > 1:
        raise ValueError(f"{source} does not fit as {part}: its pictures have another size than the model's own")


def _named_encoder(text: str) -> tuple[str, str]:
    """Part and source of `DIR`, or of `text_encoder_2=DIR`."""
    name, equals, source = text.partition("=")
    if not equals:
        return "text_encoder", text
    if not re.fullmatch(r"text_encoder(_\d)?", name):
        raise ValueError(f"--text-encoder takes DIR, or such as text_encoder_2=DIR, got {text!r}")
    return name, source
