"""What a denoiser itself knows of a candidate: hidden features of a call that was made anyway, read by hooks.

A head on these features judges a candidate without decoding anything. Nothing of the model is copied or changed: while
a `Tap` listens, it keeps what comes out of (or goes into) named modules of the stock transformer or UNet, averaged onto
a grid and, where they are wide, projected onto fewer channels. The x0 estimate is one more place to read.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from ttsnap.pipelines.sampler import Sampler

X0 = "x0"  # the name of the place that is no module
DEPTHS = (0.25, 0.5, 0.75)
GRID, WIDTH = 8, 256


class Features(NamedTuple):
    """What a head reads of n candidates.

    Attributes:
        cells: features on a grid [n, cells, channels], those of several places side by side.
        words: states of the prompt's words as the denoiser reads them, one tensor [words, width] per candidate.
        latents: x0 estimates [n, ...] as the sampler keeps them.
    """

    cells: Tensor
    words: Sequence[Tensor]
    latents: Tensor | None = None


@dataclass(frozen=True)
class Place:
    """Where to listen.

    Attributes:
        module: dotted name of a module of the denoiser; or `x0`: the x0 estimate, as the decoder would be given it.
        side: `input`: the module's first argument; `output`: what it returns, of several tensors the last (diffusers'
            joint blocks return text, then image).
        grid: features lie on a square grid of so many cells a side: of a module averaged, of x0 stacked.
        width: most channels of a cell. Wider ones are normalised and projected by a fixed random matrix, which keeps
            distances (Johnson and Lindenstrauss, 1984); 0: all channels, as they are.
    """

    module: str
    side: str = "output"
    grid: int = GRID
    width: int = 0

    def narrow(self, cells: Tensor) -> Tensor:
        """Cells [n, cells, channels] with at most `width` channels."""
        if not self.width:
            return cells
        if self.module != X0:
            cells = F.layer_norm(cells.float(), cells.shape[-1:])
        if cells.shape[-1] <= self.width:
            return cells
        narrow: Tensor = cells.float() @ _projection(
            f"{self.module} {self.side}", cells.shape[-1], self.width, cells.device
        )
        return narrow


@lru_cache(maxsize=16)
def _projection(name: str, channels: int, width: int, device: torch.device) -> Tensor:
    """The fixed random matrix [channels, width] of a place."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    matrix: Tensor = torch.randn(channels, width, generator=generator) / width**0.5
    return matrix.to(device)


class Tap:
    """Listens to places of a denoiser.

    Args:
        denoiser: a module.
        places: where to listen, all with the same grid.
        aspect: height / width of the images, by which a row of tokens is laid out.

    Raises:
        ValueError: the denoiser has no such module, or grids differ.
    """

    def __init__(self, denoiser: Any, places: Sequence[Place], aspect: float = 1.0) -> None:
        self.places, self.aspect = tuple(places), aspect
        self._denoiser: Any = getattr(denoiser, "_orig_mod", denoiser)  # of a compiled model the model itself
        self._words: dict[str, Tensor] = {}
        modules = dict(self._denoiser.named_modules())
        for place in self.places:
            if place.module not in modules and place.module != X0:
                name = type(self._denoiser).__name__
                raise ValueError(f"the head reads the module {place.module!r}, which {name} does not have")
        if len({place.grid for place in self.places}) != 1:
            raise ValueError("places that are read together need one grid")
        self._modules = {place: modules[place.module] for place in self.places if place.module != X0}

    @property
    def hidden(self) -> bool:
        """Whether any place is a module."""
        return bool(self._modules)

    @contextmanager
    def listen(self, prompts: Sequence[str]) -> Iterator[list[Tensor]]:
        """While one denoiser call of these candidates is made, collect cells [n, grid x grid, channels], one tensor.

        Calls of some of them, by which it is tried whether they can be merged, come before and do not count.

        Of classifier-free guidance only the pass with the prompt counts: of two passes the first, of a doubled batch
        the second half, as in diffusers. Frames of a video that lie among the rows are averaged. Where no place is a
        module, cells have no channels.
        """
        count, heard, found = len(prompts), dict[Place, Tensor](), list[Tensor]()
        told: dict[str, Tensor] = {}
        rows = 0  # of the denoiser's batch

        def keep(place: Place, value: Any) -> None:
            if place not in heard and (tensor := _last_rows(value, count)) is not None:
                heard[place] = place.narrow(self._cells(_joined(tensor, rows)[-count:], place.grid))

        def read(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal rows
            heard.clear()  # what came before was a trial: that of the whole batch comes last
            told.clear()
            given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor | list))
            rows = next((len(value) for value in given if isinstance(value, list) or value.ndim >= 3), 0)
            states = kwargs.get("encoder_hidden_states")
            if isinstance(states, Tensor | list | tuple):
                states = states[:: max(1, len(states) // rows)] if rows else states  # there may be one for each frame
                for prompt, words in zip(prompts, states[-count:] if len(states) >= count else (), strict=False):
                    told.setdefault(prompt, words.detach().flatten(end_dim=-2).clone())

        hooks = [self._denoiser.register_forward_pre_hook(read, with_kwargs=True)]
        for place, module in self._modules.items():
            if place.side == "input":
                hooks.append(module.register_forward_pre_hook(lambda _, args, p=place: keep(p, args[0])))
            else:
                hooks.append(module.register_forward_hook(lambda _, args, output, p=place: keep(p, output)))
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()
        self.remember(told)
        if len(heard) == len(self._modules) and heard:
            found.append(torch.cat([heard[place] for place in self._modules], dim=-1))

    def _cells(self, hidden: Tensor, grid: int) -> Tensor:
        """Tokens [n, t, c], a map [n, c, h, w] or frames [n, c, f, h, w], averaged onto the grid [n, grid^2, c]."""
        if hidden.ndim == 5:
            hidden = hidden.mean(2)
        if hidden.ndim == 3:
            tokens = hidden.shape[1]
            height = max(1, round((tokens * self.aspect) ** 0.5))
            while tokens % height:
                height -= 1
            hidden = hidden.transpose(1, 2).reshape(len(hidden), -1, height, tokens // height)
        if hidden.shape[-2:] != (grid, grid):
            hidden = F.adaptive_avg_pool2d(hidden.float(), (grid, grid)).to(hidden.dtype)
        return hidden.flatten(2).transpose(1, 2).contiguous()

    def with_x0(self, cells: Tensor | None, latents: Tensor, count: int) -> Tensor:
        """What was heard [n, cells, channels] and, if it is a place, the latents [n, c, h, w] of the x0 estimate.

        Of videos, [n, c, frames, h, w] or frames among the rows, the mean over the frames counts.
        """
        parts = [] if cells is None else [cells]
        latents = _joined(latents.mean(2) if latents.ndim == 5 else latents, count)
        for place in self.places:
            if place.module == X0:
                grid, channels = place.grid, latents.shape[1]
                rows, columns = (max(1, size // grid) for size in latents.shape[-2:])
                fitted = F.adaptive_avg_pool2d(latents.float(), (grid * rows, grid * columns))
                stacked = fitted.reshape(-1, channels, grid, rows, grid, columns).permute(0, 2, 4, 1, 3, 5)
                stacked = stacked.flatten(3).flatten(1, 2)
                parts.append(place.narrow(stacked).to(parts[0] if parts else latents))
        return torch.cat(parts, dim=-1)

    def words(self, prompts: Sequence[str]) -> list[Tensor]:
        """States [words, width] of prompts that were listened to; none where the denoiser is given no words."""
        nothing = torch.zeros(0, 0)
        return [self._words.get(prompt, nothing) for prompt in prompts]

    def remember(self, words: Mapping[str, Tensor]) -> None:
        """States [words, width] of prompts that were listened to elsewhere."""
        for prompt, states in words.items():
            self._words.setdefault(prompt, states)

    def forget_prompts(self) -> None:
        """Drop the states of words."""
        self._words.clear()


def _joined(tensor: Tensor, rows: int) -> Tensor:
    """A tensor with as many rows as a batch, the mean over frames that lie among them."""
    frames = len(tensor) // rows if rows else 1
    return (
        tensor.reshape(rows, frames, *tensor.shape[1:]).mean(1)
        if frames > 1 and len(tensor) == rows * frames
        else tensor
    )


def _last_rows(value: Any, count: int) -> Tensor | None:
    """Of what a module returns the last tensor with at least `count` rows of tokens or of a map."""
    parts = value if isinstance(value, tuple | list) else [value]
    fitting = [part for part in parts if isinstance(part, Tensor) and part.ndim in (3, 4, 5) and len(part) >= count]
    return fitting[-1] if fitting else None


def denoiser_of(sampler: Sampler) -> Any:
    """The module that a sampler's features come from."""
    from ttsnap.pipelines.call import models

    names = sorted(sampler.probe.denoisers, key=lambda name: (name not in ("transformer", "unet"), name))
    parts = models(sampler.pipe)
    found = next((parts[name] for name in names if name in parts), None)
    if found is None:
        raise ValueError(f"{type(sampler.pipe).__name__} has no denoiser whose features can be read")
    return found


def tap(sampler: Sampler, places: Sequence[Place]) -> Tap:
    """What listens to places of a sampler's denoiser."""
    return Tap(denoiser_of(sampler), places, sampler.height / sampler.width)


def find_places(
    sampler: Sampler, grid: int | None = None, width: int = WIDTH, calls: Sequence[int] = (1,)
) -> dict[Place, Features]:
    """Where to listen in a denoiser that nobody has looked at: blocks a quarter, half and three quarters of the way
    through it, as far as they return something to read, and the x0 estimate.

    One candidate's calls are made for each; the answer holds what was heard. A place that says something of another
    shape after other calls is left out, as in pipelines that chain two models.

    Args:
        sampler: drives the model.
        grid: cells a side (default: 8, or fewer where pictures are so small that two pixels of latents fill a cell).
        width: most channels of a cell.
        calls: after which features will be kept.

    Raises:
        ValueError: nothing is heard anywhere.
    """
    denoiser = denoiser_of(sampler)
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    if hasattr(denoiser, "mid_block"):
        names = ["mid_block", *(f"up_blocks.{number}" for number in range(len(denoiser.up_blocks)))]
    else:
        lists = [(n, m) for n, m in denoiser.named_children() if isinstance(m, torch.nn.ModuleList) and len(m)]
        blocks = [(n, m) for n, m in lists if "block" in n or "layer" in n] or lists
        names = [f"{name}.{number}" for name, part in blocks for number in range(len(part))]
    chosen = dict.fromkeys(names[min(len(names) - 1, int(depth * len(names)))] for depth in DEPTHS) if names else {}
    side = min(sampler.height, sampler.width) // 16
    grid = grid or max(2, min(GRID, side))
    before, found = sampler.tap, dict[Place, Features]()
    try:
        for name in (*chosen, X0):
            place = Place(name, grid=grid, width=width)
            sampler.tap = tap(sampler, [place])
            with suppress(ValueError):  # nothing is heard, or the estimate is no map
                state = sampler.start([sampler.some_prompt], [0])
                heard = [sampler.features(state := sampler.advance(state, call)) for call in sorted({*calls})]
                if len({features.cells.shape for features in heard}) == 1:
                    found[place] = heard[0]
    finally:
        sampler.tap = before
    if not found:
        raise ValueError(f"{type(sampler.pipe).__name__} shows nothing that a judge of features could read")
    return found


def attach(sampler: Sampler, rewards: Mapping[str, Any]) -> None:
    """Make a sampler keep the features that rewards read, or none.

    Args:
        sampler: its trajectories then carry features.
        rewards: name -> reward; those that read features have `places`.

    Raises:
        ValueError: two rewards read different places, or this cannot be read from this model.
    """
    asked = {tuple(reward.places) for reward in rewards.values() if getattr(reward, "places", None)}
    if len(asked) > 1:
        names = ", ".join(sorted(place.module for places in asked for place in places))
        raise ValueError(f"rewards that read features must read the same ones, got {names}")
    places = next(iter(asked), ())
    if places and sampler.diversity:
        raise ValueError("with negative token merging the denoiser's features cannot be read; take the clean reward")
    if places != (sampler.tap.places if sampler.tap else ()):
        sampler.tap = tap(sampler, places) if places else None
