"""A call of a stock pipeline whose denoiser does not work: what learns about a pipeline, and what decodes for it.

Everything that a pipeline does beside its denoiser is cheap, and only the pipeline knows it: how many steps its
scheduler makes, how latents become an image. So it is asked. In the first call that is made of a pipeline the denoiser
works once and from then on answers zeros of the same shapes; that tells steps, noise levels, sizes and costs. Later
calls, in which the denoiser does not work at all and every step of the scheduler returns a given x0 estimate, are how
that estimate becomes an image: the pipeline itself unpacks, rescales, decodes and crops it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ttsnap.samplers.estimates import Step

DENOISERS = ("unet", "transformer", "transformer_2", "controlnet", "prior", "decoder")


@dataclass(frozen=True)
class Blank:
    """Shape, dtype and device of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass
class Forward:
    """One forward pass of a model of the pipeline: after how many steps, what it answered, TFLOP if it was counted.

    `remembered`: it was part of something that is done once for the same arguments, such as to encode a prompt.
    """

    name: str
    step: int
    answer: Any
    tflop: float = 0.0
    remembered: bool = False


@dataclass
class Probe:
    """What the first call of a pipeline told.

    Attributes:
        sigmas: noise level of each step [num_steps].
        timesteps: its model time [num_steps].
        forwards: passes of its models, in order; the denoisers' after the first step were not made.
        batched: whether the latents of one candidate have a leading dimension of 1.
        tflop: `prompt` (to encode it), `decode` (what comes after the last step).
    """

    sigmas: list[float] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    batched: bool = True
    tflop: dict[str, float] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Steps of a finished image."""
        return len(self.sigmas)

    @property
    def loop(self) -> set[str]:
        """Names of the models that work once per step: the denoisers and what works with them, such as a ControlNet."""
        if self.num_steps == 1:
            return {f.name for f in self.forwards if f.step == 0 and f.name in DENOISERS}
        return {f.name for f in self.forwards if 1 <= f.step < self.num_steps}

    @property
    def encoders(self) -> list[Forward]:
        """Passes before the first step that encode a prompt or a picture, and nothing else remembers."""
        return [f for f in self.forwards if f.step == 0 and f.name not in self.loop and not f.remembered]

    @property
    def passes(self) -> float:
        """Passes of the denoisers per step; 2 where classifier-free guidance makes two."""
        names = [f.name for f in self.forwards if f.name in self.loop and f.step < self.num_steps]
        denoisers = [name for name in names if "transformer" in name or "unet" in name] or names
        return len(denoisers) / self.num_steps

    @property
    def check_tflop(self) -> float:
        """TFLOP of the safety checker, which sees the finished image."""
        return sum(f.tflop for f in self.forwards if f.name == "safety_checker")

    @property
    def step_tflop(self) -> float:
        """TFLOP of a step, mean over all of them."""
        return sum(f.tflop for f in self.forwards if f.name in self.loop) / self.num_steps


def models(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def stand_in(model: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A shallow copy of a model with another forward pass; the model itself and its hooks stay as they are."""
    own = copy.copy(model)
    hooks: dict[str, Any] = {
        name: OrderedDict() for name in vars(model) if name.startswith("_") and name.endswith("_hooks")
    }
    vars(own).update(hooks, forward=forward, _compiled_call_impl=None)
    return own


def blank(answer: Any) -> Any:
    """An answer without its data."""
    return tree_map(lambda x: Blank(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x, answer)


def zeros(answer: Any) -> Any:
    """An answer of zeros in the place of one without data."""
    return tree_map(
        lambda x: torch.zeros(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, Blank) else x, answer
    )


class Actors:
    """Models of a pipeline that work once and then only pretend to.

    Args:
        pipe: the pipeline.
        known: passes that need not be made, from an earlier call; None: all are made that are new.
        count: TFLOP counted so far.
        remembered: whether what is done right now is remembered by somebody.
    """

    def __init__(
        self,
        pipe: Any,
        known: Probe | None = None,
        count: Callable[[], float] = lambda: 0.0,
        remembered: Callable[[], bool] = lambda: False,
    ) -> None:
        self.step = 0
        self.forwards: list[Forward] = []
        self._known = known
        self._count = count
        self._remembered = remembered
        names = models(pipe) if known is None else known.loop
        self.parts = {
            name: stand_in(model, self._act(name, model)) for name, model in models(pipe).items() if name in names
        }

    def _act(self, name: str, model: nn.Module) -> Callable[..., Any]:
        earlier = self._known.forwards if self._known else self.forwards

        def forward(*args: Any, **kwargs: Any) -> Any:
            first = next((f.step for f in earlier if f.name == name), None)
            made = [f for f in earlier if f.name == name and f.step == first]
            if first is None or (self._known is None and first == self.step):
                before = self._count()
                answer = model(*args, **kwargs)
                tflop = self._count() - before
                self.forwards.append(Forward(name, self.step, blank(answer), tflop, self._remembered()))
                return answer
            number = sum(f.name == name and f.step == self.step for f in self.forwards)
            like = made[number % len(made)]
            self.forwards.append(Forward(name, self.step, like.answer, like.tflop))
            return zeros(like.answer)

        return forward


def replaced(step: Step, x0: Tensor) -> Any:
    """What a step returned, with an x0 estimate in the place of all latents."""

    def swap(value: Any) -> Any:
        is_latents = isinstance(value, Tensor) and value.shape == step.sample.shape
        return x0.to(value.device, value.dtype) if is_latents else value

    if isinstance(step.result, tuple):
        return tuple(map(swap, step.result))
    return type(step.result)(**{name: swap(value) for name, value in step.result.items()})


class Skip:
    """False when asked for the `after`th time, true before: skips all of a pipeline's remaining steps but the last.

    Pipelines ask `if self.interrupt` once per step.
    """

    def __init__(self, after: int) -> None:
        self.left = after

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left > 0


@contextmanager
def counting(device: torch.device) -> Iterator[Callable[[], float]]:
    """Counts TFLOP; yields a function that tells how many there were so far."""
    from torch.utils.flop_counter import FlopCounterMode

    from ttsnap.samplers.flops import plain_attention

    counter = FlopCounterMode(display=False)
    # On a GPU the counter knows the fused kernels, and attention as matrix products could fill the memory.
    with nullcontext() if device.type == "cuda" else plain_attention(), counter:
        yield lambda: counter.get_total_flops() / 1e12
