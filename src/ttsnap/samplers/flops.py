"""Counts the floating-point operations of one call, one decode, one look and one encoded prompt.

Counted once per model, size and text length with torch's flop counter, then kept in memory and on disk
(`$XDG_CACHE_HOME/ttsnap/flops.json`). Attention and matrix products and convolutions count, two per multiply-add.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ttsnap.cost import CostModel
from ttsnap.samplers.base import BaseSampler


def count_tflop(work: Callable[[], Any]) -> float:
    """TFLOP (1e12 operations) of a piece of work."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        work()
    return counter.get_total_flops() / 1e12


def cost_model(sampler: BaseSampler, rewards: Mapping[str, Any], prompt: str = "a") -> CostModel:
    """The cost model of a sampler with these rewards; counted on one candidate unless it is known already."""
    key = _key(sampler, rewards)
    known = _read()
    if key not in known:
        sampler.forget_prompts()
        prompt_tflop = count_tflop(lambda: sampler.text(prompt))
        trajectories = sampler.start([prompt], [0])
        calls: list[Any] = []
        call = count_tflop(lambda: calls.append(sampler.advance(trajectories, 1)))
        images: list[Any] = []
        decode = count_tflop(lambda: images.append(sampler.decode(calls[0].x0)))
        for reward in rewards.values():  # text is encoded once per prompt and belongs to no look
            reward(images[0], [prompt], sigma=0.0)
        look = count_tflop(lambda: [reward(images[0], [prompt], sigma=0.0) for reward in rewards.values()])
        sampler.forget_prompts()
        known = _read() | {key: [call, decode, look, prompt_tflop]}
        _write(known)
    call, decode, look, prompt_tflop = known[key]
    name = f"{type(sampler.pipe).__name__} {sampler.width}x{sampler.height}"
    return CostModel(name, call, decode, look, prompt_tflop, max_batch=sampler.max_batch)


def _key(sampler: BaseSampler, rewards: Mapping[str, Any]) -> str:
    parts: Sequence[Any] = [
        type(sampler.pipe).__name__,
        *(repr(sorted(part.config.items(), key=str)) for part in _models(sampler.pipe)),
        sampler.width,
        sampler.height,
        getattr(sampler, "max_sequence_length", None),
        getattr(sampler, "passes", 1),
        torch.__version__,
        *((name, type(reward).__module__, type(reward).__qualname__) for name, reward in rewards.items()),
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:24]


def _models(pipe: Any) -> list[Any]:
    kept = []
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module):
            config = part.config
            kept.append(type("Part", (), {"config": {name: str(config)}}))
    return kept


_memory: dict[str, list[float]] = {}


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttsnap" / "flops.json"


def _read() -> dict[str, list[float]]:
    try:
        data = json.loads(_path().read_text())
        good = {k: v for k, v in data.items() if isinstance(v, list) and len(v) == 4}
    except (OSError, ValueError, AttributeError):
        good = {}
    return good | _memory


def _write(known: dict[str, list[float]]) -> None:
    """Keep the counts; a cache that cannot be written is only slower."""
    _memory.update(known)
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(known, file)
        os.replace(name, path)
    except OSError:
        pass
