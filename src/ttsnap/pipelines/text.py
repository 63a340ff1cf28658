"""Tokenizers that say when the end of a prompt is not read."""

from __future__ import annotations

import copy
import warnings
from typing import Any


def warn_if_cut(tokenizer: Any, prompt: str, limit: int, name: str) -> None:
    """Warn that the end of a prompt is not read because an encoder takes no more tokens."""
    if tokenizer is None:
        return
    ids = tokenizer(prompt, truncation=False, add_special_tokens=True, verbose=False)["input_ids"]
    if len(ids) > limit:
        unread = tokenizer.decode(ids[limit - 1 : -1])
        warnings.warn(f"{name} reads {limit} tokens, the prompt has {len(ids)}; not read: {unread!r}", stacklevel=2)


def warning_tokenizer(tokenizer: Any, pipeline: str, component: str) -> Any:
    """A copy of a tokenizer that warns whenever it cuts a text; None where it is of another kind."""
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    kind = type(tokenizer)
    name = f"{pipeline} ({component.replace('tokenizer', 'text encoder').replace('_', ' ')})"

    def __call__(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        answer = kind.__call__(self, text, *args, **kwargs)
        limit = kwargs.get("max_length") or tokenizer.model_max_length
        if kwargs.get("truncation") is True and limit < 1 << 20:
            for one in [text] if isinstance(text, str) else text or ():
                if isinstance(one, str) and one:
                    warn_if_cut(tokenizer, one, limit, name)
        return answer

    twin = copy.copy(tokenizer)
    twin.__class__ = type(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__})
    return twin
