"""Textual inversions, of one text encoder or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ttsnap.pipelines.added_files import check_takes, unfit, weights_in
from ttsnap.pipelines.single_file import Loaded, Refused, check_safetensors

# Keys of textual inversions for several text encoders, and the parts that they belong to.
ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "T5", "t5xxl": "T5"}


def add_embedding(loaded: Loaded, source: str, token: str | None) -> None:
    """Add a textual inversion to the text encoders that it has vectors for, by a token or its own.

    Raises:
        ValueError: it does not fit the pipeline.
    """
    from safetensors.torch import load_file

    pipe = loaded.pipe
    check_takes(type(pipe), "load_textual_inversion", "textual inversion")
    file = weights_in(Path(source), "learned_embeds.safetensors")
    try:
        if file is None:
            pipe.load_textual_inversion(source, token=token, use_safetensors=True)
            loaded.lines.append(f"pipe.load_textual_inversion({source!r}, token={token!r}, use_safetensors=True)")
            return
        path, held = str(file.absolute()), load_file(file)
        for key, part in embeddings_in(file).items():
            word = token or (file.stem if key in (*ENCODERS, "emb_params") else key)
            part = _encoder(pipe, part)
            end = part.removeprefix("text_encoder")
            encoder, tokenizer = getattr(pipe, part), getattr(pipe, f"tokenizer{end}")
            width = encoder.get_input_embeddings().weight.shape[-1]
            if held[key].shape[-1] != width:
                raise ValueError(
                    f"its vectors have {held[key].shape[-1]} numbers, and those of the {part} have {width}"
                )
            pipe.load_textual_inversion(held[key], token=word, text_encoder=encoder, tokenizer=tokenizer)
            loaded.lines.append(
                f"pipe.load_textual_inversion(safetensors.torch.load_file({path!r})[{key!r}], token={word!r}, "
                f"text_encoder=pipe.{part}, tokenizer=pipe.tokenizer{end})"
            )
    except Exception as error:
        raise unfit(source, pipe, error) from error


def embeddings_in(file: Path) -> dict[str, str]:
    """The keys of a textual inversion's file, and the text encoders that they belong to.

    Raises:
        Refused: it is no textual inversion.
    """
    keys = check_safetensors(file)
    if keys and all(key in ENCODERS for key in keys):
        return {key: ENCODERS[key] for key in keys}
    if len(keys) == 1 and len(next(iter(keys.values()))["shape"]) in (1, 2):
        return dict.fromkeys(keys, "text_encoder")
    raise Refused(f"{file} holds no textual inversion: that has one tensor, or one for each of {', '.join(ENCODERS)}")


def _encoder(pipe: Any, part: str) -> str:
    """The text encoder of that name, or that is a T5."""
    names: list[str] = [
        name for name in pipe.components if name.startswith("text_encoder") and getattr(pipe, name) is not None
    ]
    found = next((name for name in names if name == part or type(getattr(pipe, name)).__name__.startswith(part)), None)
    if found is None:
        raise ValueError(f"it is also for a {part}, and this pipeline has {', '.join(names)}")
    return found
