"""Text of different lengths: padding it into one batch, and saying what an encoder does not read of a prompt."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def pad(states: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Text states [1, t_i, d] as one batch [n, t, d], zero behind each end, and which are text [n, t].

    The mask is None where all are of one length, so that a prompt alone runs without one, as it does in its pipeline.
    """
    longest = max(part.shape[1] for part in states)
    if all(part.shape[1] == longest for part in states):
        return torch.cat(list(states)), None
    padded = torch.cat([torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in states])
    lengths = torch.tensor([part.shape[1] for part in states], device=padded.device)
    return padded, torch.arange(longest, device=padded.device) < lengths[:, None]


def warn_if_chat_cut(tokenizer: Any, render: Callable[[str], str], prompt: str, limit: int, name: str) -> None:
    """Warn that the end of a prompt is not read, where a chat template stands around it.

    Args:
        tokenizer: splits the rendered text.
        render: the template with a prompt in it.
        prompt: the prompt.
        limit: most tokens of the rendered text.
        name: of the encoder.
    """
    if tokenizer is None or not prompt:
        return
    before = len(tokenizer(render(prompt).partition(prompt)[0], add_special_tokens=False)["input_ids"])
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    room = max(0, limit - before)
    if len(ids) > room:
        unread = tokenizer.decode(ids[room:])
        warnings.warn(f"{name} reads {room} tokens, the prompt has {len(ids)}; not read: {unread!r}", stacklevel=2)


def default_of(pipe: Any, option: str) -> Any:
    """What the pipeline's own call takes for an option that is not given."""
    return inspect.signature(type(pipe).__call__).parameters[option].default
