"""What the training scripts share: processes, gradient averaging, wall-clock schedules, atomic checkpoints."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Half of a small CPU training's time goes into returning memory to the kernel unless glibc is told to keep it.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


def launch(train: Callable[..., None], processes: int, *args: Any) -> None:
    """Run `train(rank, *args)` in that many gloo processes of one thread each."""
    os.environ.update(_MALLOC)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[attr-defined]
            _start, (train, processes, f"file://{folder}/meet", args), nprocs=processes
        )


def _start(rank: int, train: Callable[..., None], processes: int, meet: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=processes)
    try:
        train(rank, *args)
    finally:
        dist.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of all processes with one all-reduce of the flattened vector."""
    if dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for g in gradients:
        g.copy_(flat[start : start + g.numel()].view_as(g))
        start += g.numel()


def same_on_all(value: float) -> float:
    """The value of process 0, so that clocks agree."""
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(tensor, 0)
    return float(tensor)


def schedule(progress: float, *, warmup: float = 0.01, decay: float = 0.4, floor: float = 0.03) -> float:
    """Learning-rate factor at `progress` 0..1 of the time: warm-up, flat, then linear to `floor`."""
    if progress < warmup:
        return progress / warmup + 1e-3
    return max(floor, min(1.0, (1 - progress) / decay))


class Ema:
    """Exponential moving average of parameters and buffers."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.modules = modules
        self.state = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in modules.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the present weights; faster in the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, module in self.modules.items():
            for key, value in module.state_dict().items():
                if value.is_floating_point():
                    self.state[name][key].lerp_(value, 1 - decay)
                else:
                    self.state[name][key].copy_(value)


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint, or None where there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state


class Log:
    """Progress lines on stdout and in `log.jsonl`."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "log.jsonl"
        self.start = time.time()

    def __call__(self, **values: Any) -> None:
        """Write one line."""
        values = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({"time": round(time.time() - self.start, 1)} | values)
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def to_tensor(images: Any) -> Tensor:
    """uint8 images [n, h, w, 3] as floats [n, 3, h, w] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
