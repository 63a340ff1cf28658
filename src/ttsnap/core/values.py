"""Values of options, from text."""

from __future__ import annotations

import json
from typing import Any


def read_value(text: str) -> Any:
    """What a text says: a number, true, a list ... as in JSON (also `.5` and `True`), else the text itself."""
    plain = {"True": "true", "False": "false", "None": "null"}.get(text, text)
    try:
        return json.loads(f"0{plain}" if plain.startswith(".") else plain)
    except ValueError:
        return text


def read_options(text: str, example: str) -> dict[str, Any]:
    """Options such as `solver_order=3,use_karras_sigmas=true`; the example serves the error message."""
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"an option is written as {example}, got {part!r}")
        found[name] = read_value(value)
    return found
