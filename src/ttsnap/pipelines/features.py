"""What a denoiser itself knows of a candidate: hidden features of a call that was made anyway, read by hooks.

A head on these features judges a candidate without decoding anything. Nothing of the model is copied or changed: while
a `Tap` listens, it keeps what goes into (or comes out of) one named module of the stock transformer or UNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Features(NamedTuple):
    """What a head reads of n candidates.

    Attributes:
        cells: hidden features of the image, averaged onto a grid [n, cells, channels].
        words: states of the prompt's words as the denoiser reads them, one tensor [words, width] per candidate.
        latents: x0 estimates [n, ...] as the sampler keeps them.
    """

    cells: Tensor
    words: Sequence[Tensor]
    latents: Tensor | None = None


@dataclass(frozen=True)
class Place:
    """Where in a denoiser to listen.

    Attributes:
        module: dotted name of a module of the transformer or UNet.
        side: `input`: the module's first argument; `output`: what it returns, of several tensors the last (diffusers'
            joint blocks return text, then image).
        grid: features are averaged onto a square grid of so many cells a side.
    """

    module: str
    side: str = "output"
    grid: int = 8


class Tap:
    """Listens to one place of a pipeline's denoiser.

    Args:
        pipe: a stock pipeline with a `transformer` or a `unet`.
        place: where to listen.
        aspect: height / width of the images, by which a row of tokens is laid out.

    Raises:
        ValueError: the pipeline has no such denoiser, or its denoiser no such module.
    """

    def __init__(self, pipe: Any, place: Place, aspect: float = 1.0) -> None:
        self.place, self.aspect = place, aspect
        denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
        self._denoiser: Any = getattr(denoiser, "_orig_mod", denoiser)  # of a compiled model the model itself
        self._words: dict[str, Tensor] = {}
        name = type(self._denoiser).__name__
        if not isinstance(self._denoiser, torch.nn.Module):
            raise ValueError(f"features are read from a transformer or a UNet; {type(pipe).__name__} has neither")
        modules = dict(self._denoiser.named_modules())
        if place.module not in modules:
            raise ValueError(f"the head reads the module {place.module!r}, which {name} does not have")
        self._module = modules[place.module]

    @contextmanager
    def listen(self, prompts: Sequence[str]) -> Iterator[list[Tensor]]:
        """While one denoiser call of these candidates is made, collect cells [n, grid x grid, channels], one tensor.

        Of classifier-free guidance only the pass with the prompt counts: of two passes the first, of a doubled batch
        the second half, as in diffusers.
        """
        count, heard = len(prompts), list[Tensor]()

        def keep(tensor: Any) -> None:
            tensor = tensor[-1] if isinstance(tensor, tuple | list) else tensor
            if not heard:
                heard.append(self._cells(tensor[-count:]))

        def read(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            states = kwargs.get("encoder_hidden_states")
            for prompt, words in zip(prompts, () if states is None else states[-count:], strict=False):
                self._words.setdefault(prompt, words.detach().clone())

        if self.place.side == "input":
            hook = self._module.register_forward_pre_hook(lambda module, args: keep(args[0]))
        else:
            hook = self._module.register_forward_hook(lambda module, args, output: keep(output))
        unread = any(prompt not in self._words for prompt in prompts)
        reading = self._denoiser.register_forward_pre_hook(read, with_kwargs=True) if unread else None
        try:
            yield heard
        finally:
            hook.remove()
            if reading:
                reading.remove()

    def _cells(self, hidden: Tensor) -> Tensor:
        """Tokens [n, t, c] or a map [n, c, h, w], averaged onto the grid [n, grid x grid, c]."""
        if hidden.ndim == 3:
            tokens = hidden.shape[1]
            height = max(1, round((tokens * self.aspect) ** 0.5))
            while tokens % height:
                height -= 1
            hidden = hidden.transpose(1, 2).reshape(len(hidden), -1, height, tokens // height)
        side = (self.place.grid, self.place.grid)
        if hidden.shape[-2:] != side:
            hidden = F.adaptive_avg_pool2d(hidden.float(), side).to(hidden.dtype)
        return hidden.flatten(2).transpose(1, 2).contiguous()

    def words(self, prompts: Sequence[str]) -> list[Tensor]:
        """States [words, width] of prompts that were listened to."""
        return [self._words[prompt] for prompt in prompts]

    def forget_prompts(self) -> None:
        """Drop the states of words."""
        self._words.clear()


def attach(sampler: Any, rewards: Any) -> None:
    """Make a sampler keep the features that rewards read, or none.

    Args:
        sampler: its trajectories then carry features.
        rewards: name -> reward; those that read features have a `place`.

    Raises:
        ValueError: two rewards read different places, or this cannot be read from this model.
    """
    places = {reward.place for reward in rewards.values() if getattr(reward, "place", None)}
    if len(places) > 1:
        names = ", ".join(sorted(place.module for place in places))
        raise ValueError(f"rewards that read features must read the same ones, got {names}")
    place = next(iter(places), None)
    if place and sampler.diversity:
        raise ValueError("with negative token merging the denoiser's features cannot be read; take the clean reward")
    if place != (sampler.tap.place if sampler.tap else None):
        sampler.tap = Tap(sampler.pipe, place, sampler.height / sampler.width) if place else None
