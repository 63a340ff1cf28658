"""The prompt that the program which made a picture wrote into its file.

ttsnap               PNG text chunk `ttsnap`, JSON with `prompt`
AUTOMATIC1111, Forge PNG text chunk `parameters`; in JPEG and WebP the user comment of EXIF
ComfyUI              PNG text chunk `prompt`, JSON of the graph; in WebP EXIF's Model, which begins with `prompt:`
InvokeAI             PNG text chunk `invokeai_metadata`, JSON with `positive_prompt`
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ttsnap.files.metadata import USER_COMMENT, Parameters, comment

MODEL, DESCRIPTION = 0x0110, 0x010E  # tags of EXIF
MOST_NODES = 200  # of a graph that are followed
_TEXTS = ("text", "text_g", "t5xxl", "clip_l", "text_l", "prompt", "positive", "value", "string")  # inputs of nodes


def embedded_prompt(info: Mapping[str, Any], exif: Mapping[int, Any] | None = None) -> str | None:
    """The prompt in a picture's metadata, its spaces as one; None if there is none that can be told.

    Args:
        info: text chunks by name, as `PIL.Image.Image.info` has them.
        exif: values by tag.
    """
    exif = exif or {}
    found = (
        _of_json(info.get("ttsnap"), "prompt")
        or _of_parameters(info.get("parameters"))
        or _of_graph(info.get("prompt"))
        or _of_json(info.get("invokeai_metadata"), "positive_prompt")
        or _of_parameters(comment(exif.get(USER_COMMENT)))
        or _of_graph(_after(exif.get(MODEL), "prompt:"))
        or _of_parameters(_after(exif.get(DESCRIPTION), "parameters:"))
    )
    return " ".join(found.split()) or None if found else None


def _of_json(text: Any, name: str) -> str | None:
    """A text in a JSON object."""
    data = _parsed(text)
    value = data.get(name) if isinstance(data, dict) else None
    return value if isinstance(value, str) else None


def _parsed(text: Any) -> Any:
    if not isinstance(text, str):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _of_parameters(text: Any) -> str | None:
    """What stands before the negative prompt and the settings; some programs write JSON there."""
    if not isinstance(text, str) or not text.strip():
        return None
    if isinstance(_parsed(text), dict):
        return _of_json(text, "prompt")
    return re.split(r"^Steps: \d", Parameters.parse(text).prompt, maxsplit=1, flags=re.MULTILINE)[0].strip() or None


def _after(value: Any, head: str) -> str | None:
    return value.removeprefix(head) if isinstance(value, str) and value.startswith(head) else None


def _of_graph(text: Any) -> str | None:
    """The positive prompt of a ComfyUI graph: the text that a sampler's positive conditioning comes from."""
    nodes = _parsed(text)
    if not isinstance(nodes, dict) or not all(isinstance(node, dict) for node in nodes.values()):
        return None
    for node in nodes.values():
        inputs = _inputs(node)
        for name in ("positive", "guider", "conditioning"):
            if _linked(nodes, inputs.get(name)) and "ampler" in str(node.get("class_type", "")):
                for found in _texts(nodes, inputs[name], set()):
                    return found
    return None


def _texts(nodes: Mapping[str, Any], link: Any, seen: set[str]) -> Iterator[str]:
    """Texts that a link leads to, the nearest first."""
    number = _linked(nodes, link)
    if number is None or number in seen or len(seen) > MOST_NODES:
        return
    seen.add(number)
    inputs = _inputs(nodes[number])
    for name in _TEXTS:
        value = inputs.get(name)
        if isinstance(value, str) and value.strip():
            yield value
            return
    for name in sorted(inputs, key=lambda name: name not in (*_TEXTS, "positive", "conditioning", "guider")):
        if name != "negative":
            yield from _texts(nodes, inputs[name], seen)


def _inputs(node: Any) -> Mapping[str, Any]:
    inputs = node.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _linked(nodes: Mapping[str, Any], value: Any) -> str | None:
    """The number of the node that an input is linked to."""
    if isinstance(value, list) and len(value) == 2 and str(value[0]) in nodes:
        return str(value[0])
    return None
