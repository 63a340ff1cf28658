"""Counts the floating-point operations of a piece of work.

Attention, matrix products and convolutions count, two operations per multiply-add, the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry


def some_pictures(count: int, height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The same pictures [count, 3, height, width] in 0..1 each time; torch's global generator stays as it is."""
    drawn = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    return drawn.to(device)


def count_tflop(work: Callable[[], Any]) -> float:
    """TFLOP (1e12 operations) of a piece of work."""
    with torch.no_grad(), counting() as count:
        work()
        return count()


@contextmanager
def counting(device: torch.device | None = None) -> Iterator[Callable[[], float]]:
    """Counts TFLOP; yields a function that tells how many there were so far.

    Args:
        device: where the work is done. On a GPU the counter knows the fused kernels, and attention as matrix products
            could fill the memory; elsewhere, and where it is not said, attention is made of these.
    """
    counter = FlopCounterMode(display=False)
    attention = nullcontext() if device is not None and device.type == "cuda" else plain_attention()
    # A compiler that first sees a model under a counter never compiles it.
    with attention, torch.compiler.set_stance("force_eager"), counter:
        yield lambda: counter.get_total_flops() / 1e12


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as matrix products: torch's counter does not know the fused kernels of every device (CPU, MPS)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Unmultiplied(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products, convolutions and attention are not computed: their results are zeros of the right shape.

    What a counter counts is all that takes time, and it counts it by shapes. All else is computed, so that models which
    ask for the values of positions and lengths can be counted, too, where tensors without data would not do.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Zeros for what is counted; all else as it is."""
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            return func(*args, **kwargs)
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
        return tree_map_only(torch.Tensor, lambda t: torch.zeros_like(t, device=device), func(*args, **kwargs))
