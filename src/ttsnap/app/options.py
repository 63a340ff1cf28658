"""More model options: one text of the form, as on the command line, within what visitors may name.

They name no file of the server but those that are offered, nothing of a hub, and of pictures their own alone.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ttsnap.live.settings import ModelSettings, read_call
from ttsnap.pipelines.added_files import check_source
from ttsnap.pipelines.conditions import ARGUMENTS, Control, Pictures
from ttsnap.pipelines.models import MODELS

EXAMPLE = "--scheduler UniPCMultistep --cache FirstBlock,threshold=.1"
MOST = 1000  # of the numbers of a call: its time and memory may depend on them
PLAIN = (  # name no file
    "scheduler",
    "cache",
    "draft_cache",
    "attention",
    "quantize",
    "offload",
    "preview",
    "diversity",
    "diversity_options",
    "call",
    "look_frames",
    "max_batch",
    "attention_slicing",
    "vae_slicing",
    "vae_tiling",
)
PICTURES = ("image", "mask", "control_image", "control", "ip_adapter")
FIELDS = ("model", "steps", "size", "guidance", "negative_prompt", "strength", "lora")  # of the form


@dataclass(frozen=True)
class Offered:
    """Files, directories and hub ids that the options of visitors may name, whole or by their last part."""

    vae: tuple[str, ...] = ()
    text_encoder: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    config: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    ip_adapter_weights: tuple[str, ...] = ()

    def check(self) -> None:
        """ValueError about one that cannot be loaded."""
        ModelSettings(text_encoder=self.text_encoder, embedding=self.embedding)
        for name in ("vae", "control", "ip_adapter_weights"):
            for source in getattr(self, name):
                check_source(source, name.replace("_", " "))

    def names(self) -> dict[str, list[str]]:
        """How each can be named, by the option."""
        offers = {field.name: getattr(self, field.name) for field in fields(self)}
        return {_flag(name): [_short(source) for source in given] for name, given in offers.items() if given}

    def read(self, text: str, files: Sequence[str] = ()) -> dict[str, Any]:
        """The options of a text, by the names that settings have for them.

        Args:
            text: such as `--vae DIR --cache FirstBlock,threshold=.1`.
            files: pictures that the options may name by the last part.

        Raises:
            ValueError: no such option, or it names what is not offered.
        """
        found: dict[str, Any] = {}
        for name, value in _options(text):
            if name == "control":
                value = self._control(value, files)
            elif name == "ip_adapter":
                picture, colon, scale = value.partition(":")
                value = f"{_picture(picture, files)}{colon}{scale}"
            elif name in PICTURES:
                value = _picture(value, files)
            elif name not in PLAIN:
                value = self._offer(name, value)
            if name in SEVERAL:
                found[name] = (*found.get(name, ()), value)
            elif name in found:
                raise ValueError(f"{_flag(name)} is given twice")
            else:
                found[name] = value
        _check(found)
        return found

    def _offer(self, name: str, value: str) -> str:
        """What is offered by this name."""
        offers = getattr(self, name)
        for source in offers:
            if value in (source, _short(source)):
                return str(source)
        here = f"there is {', '.join(map(_short, offers))}" if offers else f"ttsnap app {_flag(name)} offers one"
        raise ValueError(f"there is no {_flag(name)} {value!r} here; {here}")

    def _control(self, value: str, files: Sequence[str]) -> str:
        picture, model, scale = Control.read(value)
        end = "" if scale is None else f":{scale:g}"
        return f"{_picture(picture, files)}:{self._offer('control', model)}{end}"


def as_text(settings: Mapping[str, Any], model: str, offered: Offered) -> tuple[str, list[str]]:
    """The text of a picture's settings, and what it cannot say.

    Args:
        settings: options of `ttsnap generate`, by their names.
        model: that they are for.
        offered: what may be named.
    """
    own = MODELS[model].arguments if model in MODELS else {}
    said, missing = list[str](), list[str]()
    for name in KINDS:
        given = settings.get(name)
        if name in PICTURES or not given or (name == "preview" and model in MODELS):
            continue
        for value in given if isinstance(given, list) else [given]:
            if name == "call" and value.partition("=")[0] in own:
                continue
            one = _flag(name) if value is True else f"{_flag(name)} {shlex.quote(str(value))}"
            try:
                offered.read(one)
            except ValueError:
                missing.append(f"the {name.replace('_', ' ')}")
            else:
                said.append(one)
    return " ".join(said), list(dict.fromkeys(missing))


def _kinds() -> dict[str, Any]:
    """What the options of a text are where they are not given, by their names."""
    names = (*PLAIN, *PICTURES, *(field.name for field in fields(Offered)))
    found = {field.name: field.default for kind in (ModelSettings, Pictures) for field in fields(kind)}
    return {name: found[name] for name in names}


KINDS = _kinds()
SEVERAL = tuple(name for name, default in KINDS.items() if default == ())


def _options(text: str) -> list[tuple[str, Any]]:
    """Names and values in a text, in their order."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"the options cannot be read: {error}; write them such as {EXAMPLE}") from error
    found: list[tuple[str, Any]] = []
    while words:
        word, equals, value = words.pop(0).partition("=")
        name = word.removeprefix("--").replace("-", "_")
        if not word.startswith("--"):
            raise ValueError(f"options are written such as {EXAMPLE}, got {word!r}")
        if name in FIELDS:
            raise ValueError(f"{word} has a field of its own in this form")
        if name not in KINDS:
            raise ValueError(f"this form takes no {word}; it takes {', '.join(map(_flag, KINDS))}")
        if KINDS[name] is False:
            if equals:
                raise ValueError(f"{word} takes no value, got {value!r}")
            found.append((name, True))
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"{word} needs a value")
            value = words.pop(0)
        found.append((name, value))
    return found


def _check(found: dict[str, Any]) -> None:
    """Read what is a number; ValueError about what would load or set more than visitors may."""
    if "max_batch" in found:
        try:
            found["max_batch"] = int(found["max_batch"])
        except ValueError:
            raise ValueError(f"--max-batch takes a number such as 8, got {found['max_batch']!r}") from None
    if "_hub" in found.get("attention", ""):
        raise ValueError(f"--attention {found['attention']} is fetched from a hub, which visitors cannot ask for")
    if found.get("preview", "").startswith("tiny"):
        raise ValueError(
            "--preview is auto, full, small[=PIXELS] or linear here; auto takes a tiny decoder that is there"
        )
    if found.get("ip_adapter") and not found.get("ip_adapter_weights"):
        raise ValueError("--ip-adapter needs --ip-adapter-weights here")
    for name, value in read_call(found.get("call", ())).items():
        number = value is None or (isinstance(value, bool | int | float) and abs(value) <= MOST)
        if name in _reserved() or not number:
            raise ValueError(
                f"--call takes numbers up to {MOST}, true and false here, for arguments without a field or an option, "
                f"got {name}={value!r}"
            )


def _reserved() -> set[str]:
    """Keywords of `prepare` and arguments of pipelines that are not for `--call` to set."""
    from ttsnap.live.session import load_sampler, prepare

    found = {name for function in (prepare, load_sampler) for name in inspect.signature(function).parameters}
    found |= {field.name for kind in (ModelSettings, Pictures) for field in fields(kind)}
    found |= {"num_inference_steps", "guidance_scale", "width", "height", "aspect_ratio", "pictures"}
    return found | {*ARGUMENTS, "num_images_per_prompt"}


def _picture(name: str, files: Sequence[str]) -> str:
    """The visitor's picture of that name."""
    for file in files:
        if Path(file).name == name:
            return file
    here = f"there is {', '.join(Path(file).name for file in files)}" if files else "put it below the options"
    raise ValueError(f"there is no picture {name!r} here; {here}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _short(source: str) -> str:
    """Of a path the last part; in `text_encoder_2=DIR` that of the directory."""
    part, equals, path = source.rpartition("=")
    return f"{part}{equals}{Path(path).name}"


__all__ = ["EXAMPLE", "Offered", "as_text"]
