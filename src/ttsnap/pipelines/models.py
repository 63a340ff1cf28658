"""Models that come with a package, by name: how they are loaded, and what they are used with unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttsnap.core.registry import Registry


@dataclass(frozen=True)
class Model:
    """A model that a package offers as an entry point of the group `ttsnap.models`.

    Attributes:
        load: a stock pipeline, of a dtype (None: the model's own).
        weights: the directory that it comes from.
        arguments: of its call, unless others are given.
        reward: name of the reward that judges it, unless another is given; `pushed_reward` where candidates are pushed
            apart, which leaves no features to read.
        report: name of a reward that judges finished images and steers nothing, unless another is given.
        candidates: how many a search starts.
        preview: directory of its tiny decoder.
        prompts: lists of prompts by name, such as `train`.
        example: a prompt to begin with.
        reads: complains (ValueError) of a prompt that the model was not made for.
    """

    load: Callable[[Any], Any]
    weights: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)
    reward: str | None = None
    pushed_reward: str | None = None
    report: str | None = None
    candidates: int | None = None
    preview: Path | None = None
    prompts: Mapping[str, Callable[[], list[str]]] = field(default_factory=dict)
    example: str = ""
    reads: Callable[[str], Any] | None = None


MODELS = Registry("ttsnap.models")


def model_name(pipe: Any) -> str:
    """How records call a model: its name, a directory or hub id, else the class of the pipeline."""
    name = str(pipe if isinstance(pipe, str) else getattr(pipe, "name_or_path", "") or type(pipe).__name__)
    return next((known for known in MODELS if Path(name).resolve() == MODELS[known].weights.resolve()), name)


__all__ = ["MODELS", "Model", "model_name"]
