"""What the first calls of a pipeline told: rows, steps, noise levels, sizes, costs, the way to the picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ttsnap.pipelines.batching import Layout
from ttsnap.pipelines.call import Ask
from ttsnap.pipelines.estimates import Level
from ttsnap.pipelines.tail import Tail

ENCODERS = frozenset({"image_encoder", "vae", "feature_extractor", "safety_checker", "adapter"}) | {
    f"text_encoder{suffix}" for suffix in ("", "_2", "_3", "_4")
}


@dataclass(frozen=True)
class Blank:
    """Shape, dtype and device of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __len__(self) -> int:
        return self.shape[0]


@dataclass
class Forward:
    """One model call of the first call: after how many steps, what it was asked and answered, TFLOP.

    `remembered`: it was part of something that is done once for the same arguments, such as to encode a prompt;
    `inner`: how many steps all schedulers had made, where a pipeline is made of several.
    """

    ask: Ask
    step: int
    answer: Any
    rows: int
    tflop: float = 0.0
    remembered: bool = False
    inner: int = 0

    @property
    def name(self) -> str:
        """The model."""
        return self.ask.model


@dataclass
class Probe:
    """What the first calls of a pipeline told.

    Attributes:
        levels: noise level of each step [num_steps].
        timesteps: its model time [num_steps].
        forwards: model calls, in order.
        batched: whether the latents of one candidate have a leading dimension of 1.
        result: what the last step returned, without data.
        sample: shape of the latents.
        main: the `id` of the scheduler whose steps count, where there are several.
        copies: whether the steps of copies of the scheduler count, as it makes none itself.
        layouts: rows of the models' arguments, by the form of an ask; several where the number of rows changes.
        alone: model calls that cannot be merged, and why.
        random: whether the pipeline draws from torch's own generator.
        tail: the way from latents to picture, where that is the same for all candidates.
        latents: what the last step of the first call returned,
        decoded: what the pipeline asked a model first from there,
        image: and returned [1, 3, h, w], of videos [1, frames, 3, h, w].
        tflop: `prompt` (to encode it), `decode` (what comes after the last step).
        guesses: what else the layouts might be; the first batch tells.
        sure: layouts that need not be tried.
        masked: layouts of models that were seen to leave out what the mask of a text leaves out.
    """

    levels: list[Level] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    batched: bool = True
    result: Any = None
    sample: torch.Size = field(default_factory=torch.Size)
    main: int | None = None
    copies: bool = False
    layouts: dict[Any, list[Layout]] = field(default_factory=dict)
    alone: dict[tuple[str, str], str] = field(default_factory=dict)
    random: bool = False
    tail: Tail | None = None
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    decoded: Ask | None = None
    image: Tensor = field(default_factory=lambda: torch.empty(0))
    tflop: dict[str, float] = field(default_factory=dict)
    guesses: dict[Any, list[Layout]] = field(default_factory=dict)
    sure: set[Any] = field(default_factory=set)
    masked: set[Any] = field(default_factory=set)

    @property
    def num_steps(self) -> int:
        """Steps of a finished image."""
        return len(self.levels)

    @cached_property
    def loop(self) -> set[str]:
        """Names of the models that work once per step: the denoisers and what works with them, such as a ControlNet."""
        if self.num_steps == 1:
            encoding = {f.name for f in self.forwards if f.remembered}
            return {f.name for f in self.forwards if f.step == 0 and f.ask.method == "forward"} - encoding - ENCODERS
        later = {f.name for f in self.forwards if 1 <= f.step < self.num_steps and f.ask.method == "forward"}
        first = [f.name for f in self.forwards if f.step == 0 and f.ask.method == "forward"]
        return later | set(first[-1:])  # some have a denoiser of their own for high noise

    @cached_property
    def merged(self) -> set[str]:
        """Names of the models that are run in batches: those of the loop, and of loops before it, such as a prior's."""
        last = max((f.inner for f in self.forwards), default=0)
        asked = [f for f in self.forwards if f.ask.method == "forward" and not f.remembered]
        return self.loop | {f.name for f in asked if 1 <= f.inner < last}

    @property
    def encoders(self) -> list[Forward]:
        """Calls before the first step that encode a prompt or a picture, and nothing else remembers."""
        return [f for f in self.forwards if f.step == 0 and f.name not in self.merged and not f.remembered]

    @cached_property
    def denoisers(self) -> set[str]:
        """The models of the loop whose calls are counted as passes."""
        return {name for name in self.loop if "transformer" in name or "unet" in name} or self.loop

    @property
    def passes(self) -> float:
        """Calls of the denoisers per step; 2 where classifier-free guidance makes one of its own."""
        return sum(f.name in self.denoisers and f.step < self.num_steps for f in self.forwards) / self.num_steps

    @property
    def guided(self) -> bool:
        """Whether more than one row or pass makes a step: whether there is a negative prompt to lead away from."""
        rows = max((f.rows for f in self.forwards if f.name in self.denoisers), default=1)
        return rows > 1 or self.passes > 1

    @property
    def check_tflop(self) -> float:
        """TFLOP of the safety checker, which sees the finished image."""
        return sum(f.tflop for f in self.forwards if f.name == "safety_checker")

    @property
    def step_tflop(self) -> float:
        """TFLOP of a step, mean over all of them."""
        return (
            sum(f.tflop for f in self.forwards if f.name in self.merged and f.ask.method == "forward") / self.num_steps
        )

    def layout(self, ask: Ask) -> Layout | None:
        """Rows of a model's arguments; None where nothing is known."""
        known = self.layouts.get(ask.form, [])
        return known[0] if len(known) == 1 else next((layout for layout in known if layout.fits(ask.tree)), None)

    def alike(self, ask: Ask) -> list[Forward]:
        """The model calls that had arguments of the same shapes."""
        size = shapes_of(ask.tree)
        return [f for f in self.forwards if f.ask.kind == ask.kind and shapes_of(f.ask.tree) == size]

    def like(self, ask: Ask) -> Forward:
        """A model call whose answer has as many rows as this one's will have."""
        same = [f for f in self.forwards if f.ask.kind == ask.kind]
        layout = self.layout(ask)
        return (self.alike(ask) or [f for f in same if self.layout(f.ask) is layout] or same)[0]


def shapes_of(tree: Any) -> list[torch.Size]:
    """Of all tensors, or what stands for them."""
    return [leaf.shape for leaf in tree_leaves(tree) if isinstance(leaf, Tensor | Blank)]


# Answers without data.


def blank(answer: Any) -> Any:
    """An answer without its data."""
    return tree_map(lambda x: Blank(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x, answer)


def more_than_numbers(answer: Any) -> bool:
    """Whether an answer holds an object that zeros cannot take the place of."""
    return any(not isinstance(leaf, Blank | Tensor | str | int | float | None) for leaf in tree_leaves(answer))


def zeros(answer: Any) -> Any:
    """An answer of zeros in the place of one without data."""
    return tree_map(
        lambda x: torch.zeros(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, Blank) else x, answer
    )


def fake(answer: Any) -> Any:
    """Tensors without memory in the place of those without data."""
    return tree_map(lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Blank) else x, answer)


__all__ = ["Blank", "Forward", "Probe", "blank", "fake", "more_than_numbers", "shapes_of", "zeros"]
