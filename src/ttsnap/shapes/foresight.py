"""The noise-aware reward of the embedded world: foretells the clean reward from the denoiser, without a decoder.

A *student* stands in for the eyes of the clean reward. From the x0 estimate (8 x 8 latents) and the denoiser's hidden
features of the same call it makes the 8 x 8 grid that the reward's convolutional stem would make of the finished image.
The rest of the reward, its reading of the prompt included, stays as it is but for finetuning. One network serves all
noise levels. A look costs a quarter of a denoiser call; with decoder and clean reward it costs nearly a whole one.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttsnap.pipelines.features import Features, Place
from ttsnap.rewards.feature_head import Block, FeatureReward
from ttsnap.shapes.reward import FORESIGHT, RewardNetwork, ShapesReward, load_reward, soft_minimum

PLACE = Place("single_transformer_blocks.1", grid=4)  # the middle of the transformer, 4 x 4 tokens
CHANNELS, LATENT = 160, 8  # hidden width of the transformer; channels of a latent
WAVES, NOISE = 8, 32


class Residual(nn.Module):
    """A residual convolution that knows the noise level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)
        self.shift = nn.Linear(NOISE, width)
        nn.init.zeros_(self.shift.weight)
        nn.init.zeros_(self.shift.bias)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """x [n, c, h, w] and noise [n, NOISE] -> [n, c, h, w]."""
        return x + self.conv(F.gelu(self.norm(x) + self.shift(noise)[:, :, None, None]))


class Student(nn.Module):
    """Grid features of the finished image from x0 latents (convolutions) and hidden features (a small transformer)."""

    def __init__(self, width: int = 64, convs: int = 2, inner: int = 128, depth: int = 2, tokens: int = 4) -> None:
        super().__init__()
        self.config = {"width": width, "convs": convs, "inner": inner, "depth": depth, "tokens": tokens}
        self.tokens = tokens  # a side
        self.noise = nn.Sequential(nn.Linear(2 * WAVES, NOISE), nn.GELU(), nn.Linear(NOISE, NOISE), nn.GELU())
        self.waves: Tensor
        self.register_buffer("waves", torch.arange(WAVES) * math.pi, persistent=False)
        self.stem = nn.Conv2d(LATENT, width, 3, padding=1)
        self.convs = nn.ModuleList(Residual(width) for _ in range(convs))
        self.near = nn.Sequential(nn.GroupNorm(4, width), nn.GELU(), nn.Conv2d(width, width, 1))
        self.cell_norm = nn.LayerNorm(CHANNELS, elementwise_affine=False)
        self.cells = nn.Linear(CHANNELS + 4 * LATENT, inner)
        self.level = nn.Linear(NOISE, inner)
        self.places = nn.Parameter(torch.randn(tokens**2, inner) * 0.1)
        self.blocks = nn.ModuleList(Block(inner, 4) for _ in range(depth))
        self.far = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, 4 * width))
        nn.init.zeros_(self.far[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.far[1].bias)  # type: ignore[arg-type]

    def forward(self, cells: Tensor | None, latents: Tensor, sigma: Tensor) -> Tensor:
        """Grid features [n, 4 tokens^2, width].

        Args:
            cells: hidden features [n, tokens^2, CHANNELS]; None: from the latents alone.
            latents: x0 estimates as FLUX packs them [n, tokens^2, 32].
            sigma: noise levels [n].
        """
        angles = sigma[:, None] * self.waves
        noise = self.noise(torch.cat([angles.cos(), angles.sin()], dim=1))
        x = self.stem(spread(latents))
        for conv in self.convs:
            x = conv(x, noise)
        x = self.near(x)
        if cells is not None:
            y = self.cells(torch.cat([self.cell_norm(cells), latents], dim=-1)) + self.places
            y = y + self.level(noise)[:, None]
            for block in self.blocks:
                y = block(y)
            x = x + spread(self.far(y))
        return x.flatten(2).transpose(1, 2)


def spread(tokens: Tensor) -> Tensor:
    """Tokens [n, side^2, 4 c], each 2 x 2 pixels as FLUX packs them, as a picture [n, c, 2 side, 2 side]."""
    side = math.isqrt(tokens.shape[1])
    x = tokens.unflatten(1, (side, side)).unflatten(3, (-1, 2, 2))
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, 2 * side, 2 * side)


class Foresight(nn.Module):
    """A student in front of a copy of the clean reward's network; a `ttsnap.rewards.feature_head.Head`."""

    def __init__(self, student: Student, network: RewardNetwork) -> None:
        super().__init__()
        self.student, self.network = student, network
        self._clean = ShapesReward(network)  # reads the prompts
        self.requires_grad_(True)

    @property
    def texts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The prompts seen so far, as they were read."""
        return self._clean.texts

    @texts.setter
    def texts(self, texts: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._clean.texts = texts

    def logits(self, cells: Tensor | None, latents: Tensor, prompts: Sequence[str], sigma: Tensor) -> Tensor:
        """Logits [n, kinds] that the clean reward will give the finished images.

        Args:
            cells: hidden features [n, tokens^2, CHANNELS]; None: from the latents alone.
            latents: x0 estimates as FLUX packs them [n, tokens^2, 32].
            prompts: one per candidate.
            sigma: noise levels [n].
        """
        return self._clean.judge(self.student(cells, latents, sigma), prompts)

    def foretell(self, features: Features, prompts: Sequence[str], sigma: float) -> Tensor:
        """Rewards [n] in units of the clean reward, of candidates after a call at noise level `sigma`."""
        assert features.latents is not None
        weight = self.student.places
        cells, latents = features.cells.to(weight), features.latents.to(weight)
        tokens = self.student.tokens
        if cells.shape[1:] != (tokens**2, CHANNELS) or latents.shape[1:] != (tokens**2, 4 * LATENT):
            size = 16 * tokens
            raise ValueError(f"this noise-aware reward reads the embedded model at {size} x {size} pixels only")
        noise = torch.full((len(cells),), sigma, device=weight.device, dtype=weight.dtype)
        return soft_minimum(self.logits(cells, latents, prompts, noise))

    def blank(self, device: Any) -> Features:
        """Features of one candidate that say nothing."""
        tokens = self.student.tokens**2
        cells = torch.zeros(1, tokens, CHANNELS, device=device)
        return Features(cells, [], torch.zeros(1, tokens, 4 * LATENT, device=device))


def begin(network: RewardNetwork | None = None) -> Foresight:
    """Untrained: a fresh student before a clean reward's network (default: the shipped one's)."""
    network = network or load_reward().network
    return Foresight(Student(tokens=network.grid // 2), network)


def save(model: Foresight, folder: Path, *, sigma: float, **notes: Any) -> None:
    """Write weights (half precision) and description; `sigma` is the lowest noise level to serve."""
    from safetensors.torch import save as to_bytes

    from ttsnap.files.provenance import versions
    from ttsnap.files.storage import write, write_json

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if name in stored(model)}
    write(folder / "model.safetensors", to_bytes(tensors))
    config = {"student": model.student.config, "sigma": sigma, **notes, "versions": versions()}
    write_json(config, folder / "config.json")


def stored(model: Foresight) -> set[str]:
    """Names of the tensors that differ from the clean reward's or that it does not have."""
    unused = re.compile(r"network\.(stem|words|positions|text|cell_colour|cell_shape|word_met)\b.*|_clean\..*")
    return {name for name in model.state_dict() if not unused.fullmatch(name)}


def load_foresight(
    device: Any = "cpu", folder: Path = FORESIGHT, clean: ShapesReward | None = None, name: str = "shapes"
) -> FeatureReward:
    """A shipped noise-aware reward, before the clean one that it foretells (default: the first level's).

    Raises:
        FileNotFoundError: there are no weights in the folder.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    clean = clean or load_reward(device=device)
    model = Foresight(Student(**config["student"]), copy.deepcopy(clean.network))
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    missing = stored(model) ^ set(tensors)
    if missing:
        raise ValueError(f"{folder} does not fit: {sorted(missing)[0]} is in one of weights and network only")
    model.load_state_dict(tensors, strict=False)  # the rest is the clean reward's own
    model = model.to(device).eval().requires_grad_(False)
    model.texts = clean.texts  # both read prompts alike: once is enough
    place = replace(PLACE, grid=model.student.tokens)
    return FeatureReward(clean, model, [place], float(config["sigma"]), name)
