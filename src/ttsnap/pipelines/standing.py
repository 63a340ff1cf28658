"""A candidate outside its call: from which another call goes on, later, elsewhere, or after a restart."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Standing:
    """A candidate outside its call, from which a new call can go on: over a restart, in another thread, elsewhere.

    Attributes:
        prompt: of the candidate.
        seed: its seed.
        step: steps made.
        result: what the last step returned: a tuple of values by place, or a dictionary by name.
        scheduler: state of the scheduler after it; None: that of the new call's own.
        generator: state of its generator,
        random: and of torch's own, for this call; None: those of the new call.
        clean: x0 estimate of the last step, where children may come of it; it is not stored.
        kept: what a cache keeps of the candidate, by the name of the denoiser; it is not stored either.
    """

    prompt: str
    seed: int
    step: int
    result: Any
    scheduler: dict[str, Any] | None = None
    generator: Tensor | None = None
    random: tuple[Tensor, ...] | None = None
    clean: Tensor | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    def put(self, like: Any) -> Any:
        """The result in the form in which a step returned `like`."""
        if isinstance(like, tuple):
            return (
                tuple(self.result) if isinstance(self.result, tuple) else (next(iter(self.result.values())), *like[1:])
            )
        if isinstance(self.result, tuple):
            return type(like)(**dict(zip(like.keys(), self.result, strict=False)))
        return type(like)(**self.result)

    def to(self, device: Any) -> Standing:
        """The same elsewhere: a copy that keeps nothing alive on the old device."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, copy=True)
            if type(value) is dict:
                return {name: move(item) for name, item in value.items()}
            return type(value)(map(move, value)) if type(value) in (list, tuple) else value

        return Standing(
            self.prompt,
            self.seed,
            self.step,
            move(self.result),
            move(self.scheduler),
            self.generator,
            self.random,
            move(self.clean),
            own_tree(self.kept, lambda tensor: tensor.to(device, copy=True)),
        )

    def save(self, path: str | Path) -> None:
        """Store it as a safetensors file, as a whole or not at all.

        Raises:
            ValueError: the scheduler keeps something that is no data.
        """
        from safetensors.torch import save

        from ttsnap.files.storage import location, write

        tensors: dict[str, Tensor] = {}
        parts = {name: getattr(self, name) for name in ("result", "scheduler", "generator", "random")}
        known = {"prompt": self.prompt, "seed": self.seed, "step": self.step, "parts": _flat(parts, tensors)}
        write(location(path), save(tensors, {"standing": json.dumps(known)}))

    @classmethod
    def load(cls, path: str | Path) -> Standing:
        """What `save` stored.

        Raises:
            ValueError: it is another file.
        """
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                known = json.loads((file.metadata() or {})["standing"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            parts = _full(known["parts"], tensors)
            return cls(known["prompt"], known["seed"], known["step"], **parts)
        except Exception as error:  # safetensors has errors of its own
            raise ValueError(f"{path} holds no candidate that was put away") from error


def _flat(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A tree as JSON; `tensors` receives what is none."""
    if isinstance(value, np.ndarray):
        return {"array": _flat(torch.from_numpy(value.copy()), tensors)}
    if isinstance(value, Tensor):
        strides = value.stride()
        order = sorted(range(value.ndim), key=lambda place: -strides[place])  # convolutions round by it
        tensors[str(len(tensors))] = value.detach().cpu().permute(order).contiguous().clone()
        return {"tensor": [str(len(tensors) - 1), order]}
    if isinstance(value, Mapping):
        return {"dict": [[name, _flat(item, tensors)] for name, item in value.items()]}
    if isinstance(value, list | tuple | deque):
        return {type(value).__name__: [_flat(item, tensors) for item in value]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"a candidate whose scheduler keeps a {type(value).__name__} cannot be stored")


def _full(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_flat` made a tree of, as it was."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        name, order = inner
        return tensors[name].permute([order.index(place) for place in range(len(order))])
    if kind == "array":
        return _full(inner, tensors).numpy()
    if kind == "dict":
        return {name: _full(item, tensors) for name, item in inner}
    if kind == "dtype":
        return getattr(torch, inner)
    if kind == "device":
        return torch.device(inner)
    items = [_full(item, tensors) for item in inner]
    return {"list": list, "tuple": tuple, "deque": deque}[kind](items)


def own_state(value: Any) -> Any:
    """A copy of a scheduler's state: containers anew, tensors shared, as schedulers make new ones at every step."""
    if isinstance(value, dict) and type(value) is dict:
        return {name: own_state(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(own_state(item) for item in value)
    if isinstance(value, deque):
        return deque(map(own_state, value), value.maxlen)
    if isinstance(value, Tensor | np.ndarray | str | int | float | bool | None) or callable(value):
        return value
    if isinstance(value, OrderedDict):  # the configuration
        return value
    return copy.deepcopy(value)


def own_tree(tree: Any, leaf: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Any:
    """A copy of what diffusers' hooks keep: containers and objects anew, what is shared inside stays so.

    Args:
        tree: dictionaries, lists and objects with tensors.
        leaf: what becomes of a tensor (default: it is shared, as hooks make new ones at every step).
    """
    known: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if id(value) in known:
            return known[id(value)]
        if isinstance(value, Tensor):
            return leaf(value)
        if type(value) is dict:
            return {name: copied(item) for name, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(copied, value))
        if not type(value).__module__.startswith("diffusers.hooks") or callable(value):
            return value
        made = known[id(value)] = copy.copy(value)
        vars(made).update(copied(vars(value)))
        return made

    return copied(tree)
