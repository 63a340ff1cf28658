"""A noise-aware reward without a decoder: a small head on the denoiser's own features foretells the clean reward.

An early look then costs what the head costs, next to nothing: no image is decoded. Finished images, and looks at noise
levels below those it was trained for, are judged by the clean reward on the decoded image.

    HEAD/head.json            what it is: clean reward, place, sizes, noise levels, versions
    HEAD/head.safetensors     its weights
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ttsnap.pipelines.features import Features, Place
from ttsnap.rewards.registry import HEAD, load_plain

WEIGHTS, FORMAT, VERSION = "head.safetensors", "ttsnap-feature-head", 2
WAVES = 8


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of a head.

    Attributes:
        channels: of a cell's features.
        word_width: of a word's state; 0: the prompt is not read.
        grid: cells a side.
        words: most words that are read.
        width: of the head.
        depth: blocks.
        heads: of attention.
        outputs: the reward first; what else was foretold in training is not used.
        mean: of the rewards in training.
        std: of the rewards in training.
    """

    channels: int
    word_width: int
    grid: int = 8
    words: int = 64
    width: int = 96
    depth: int = 2
    heads: int = 4
    outputs: int = 1
    mean: float = 0.0
    std: float = 1.0


class Head(Protocol):
    """Foretells a reward from features; see `FeatureHead`."""

    def foretell(self, features: Features, prompts: Sequence[str], sigma: float) -> Tensor:
        """Rewards [n] in units of the clean reward."""
        ...

    def blank(self, device: Any) -> Features:
        """Features of one candidate that say nothing, for counting."""
        ...


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[n, t, width] -> [n, t, width]; mask [n, 1, 1, t] is True to see (default: everything)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))  # type: ignore[no-any-return]


class FeatureHead(nn.Module):
    """Cells and words talk to each other and to one summary token, which knows the noise level and is read out."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.cell_mean: Tensor
        self.cell_std: Tensor
        self.register_buffer("cell_mean", torch.zeros(config.channels))
        self.register_buffer("cell_std", torch.ones(config.channels))
        self.cells = nn.Linear(config.channels, width)
        self.cell_places = nn.Parameter(torch.randn(config.grid**2, width) * 0.1)
        if config.word_width:
            self.word_norm = nn.LayerNorm(config.word_width, elementwise_affine=False)
            self.words = nn.Linear(config.word_width, width)
            self.word_places = nn.Parameter(torch.randn(config.words, width) * 0.1)
        self.summary = nn.Parameter(torch.randn(width) * 0.1)
        self.noise = nn.Sequential(nn.Linear(2 * WAVES, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.outputs))
        self.waves: Tensor
        self.register_buffer("waves", torch.arange(WAVES) * math.pi, persistent=False)

    def forward(self, cells: Tensor, words: Tensor, mask: Tensor, sigma: Tensor) -> Tensor:
        """Outputs [n, outputs], in units of the training data.

        Args:
            cells: [n, grid x grid, channels].
            words: [n, words, word_width].
            mask: which words there are [n, words].
            sigma: noise levels [n].
        """
        count = len(cells)
        angles = sigma[:, None] * self.waves
        noise = self.noise(torch.cat([angles.cos(), angles.sin()], dim=1))[:, None]
        known = (cells - self.cell_mean) / self.cell_std
        parts = [self.summary + noise, self.cells(known) + self.cell_places + noise]
        seen = torch.ones(count, 1 + cells.shape[1], dtype=torch.bool, device=cells.device)
        if self.config.word_width:
            parts.append(self.words(self.word_norm(words)) + self.word_places[: words.shape[1]])
            seen = torch.cat([seen, mask], dim=1)
        x = torch.cat(parts, dim=1)
        for block in self.blocks:
            x = block(x, seen[:, None, None, :])
        outputs: Tensor = self.read(x[:, 0])
        return outputs

    def foretell(self, features: Features, prompts: Sequence[str], sigma: float) -> Tensor:
        """Rewards [n] in units of the clean reward, of candidates after a call at noise level `sigma`."""
        config, weight = self.config, self.summary
        if features.cells.shape[1:] != (config.grid**2, config.channels):
            raise ValueError(
                f"the head reads {config.grid**2} cells of {config.channels} channels, "
                f"the model gives {features.cells.shape[1]} of {features.cells.shape[2]}"
            )
        words, mask = stack_words(features.words, config.words)
        noise = torch.full((len(prompts),), sigma, device=weight.device, dtype=weight.dtype)
        outputs = self(features.cells.to(weight), words.to(weight), mask.to(weight.device), noise)
        return outputs[:, 0] * config.std + config.mean  # type: ignore[no-any-return]

    def blank(self, device: Any) -> Features:
        """Features of one candidate that say nothing."""
        config = self.config
        words = torch.zeros(config.words, config.word_width, device=device)
        return Features(torch.zeros(1, config.grid**2, config.channels, device=device), [words])


def stack_words(words: Sequence[Tensor], most: int) -> tuple[Tensor, Tensor]:
    """The first words of each prompt, padded [n, words, width], and which of them there are [n, words]."""
    cut = [states[:most].float() for states in words]
    mask = pad_sequence([states.new_ones(len(states), dtype=torch.bool) for states in cut], batch_first=True)
    return pad_sequence(cut, batch_first=True), mask


class FeatureReward:
    """A head beside its clean reward.

    Attributes:
        places: where the head reads the denoiser.
        clean_name: name of the clean reward; recordings keep both under it.
        sigma: lowest noise level that the head serves.
    """

    def __init__(
        self, clean: Callable[..., Any], head: Head, places: Sequence[Place], sigma: float, clean_name: str = ""
    ) -> None:
        self.clean, self.head = clean, head
        self.places, self.sigma, self.clean_name = tuple(places), sigma, clean_name

    def level(self, sigma: float) -> float | None:
        """The noise level itself where the head serves a look; None for the clean reward."""
        return sigma if sigma >= self.sigma * (1 - 1e-6) else None

    def reads(self, sigma: float) -> str | None:
        """Which reading of a prompt a look needs: the head's own, or the clean reward's (None)."""
        shared = getattr(self.head, "texts", None) is getattr(self.clean, "texts", self)
        return None if shared or self.level(sigma) is None else "head"

    def early(self, features: Features, prompts: Sequence[str], *, sigma: float) -> Tensor:
        """Rewards [n] that are foretold from features of a call at noise level `sigma`."""
        return self.head.foretell(features, prompts, sigma)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, sigma: float) -> Tensor:
        """Clean rewards [n] of images [n, 3, h, w] in 0..1."""
        rewards: Tensor = self.clean(images, prompts, sigma=sigma)
        return rewards

    def blank(self, device: Any) -> Features:
        """Features of one candidate that say nothing, for counting."""
        return self.head.blank(device)


def save_head(
    head: FeatureHead, folder: str | Path, *, reward: str, places: Sequence[Place], sigma: float, **notes: Any
) -> None:
    """Write a head, its weights in half precision.

    Args:
        head: trained.
        folder: made if needed.
        reward: name of the clean reward.
        places: where it reads.
        sigma: lowest noise level that it serves.
        **notes: where it comes from; anything JSON.
    """
    from safetensors.torch import save as stored  # to bytes: on a full disk `save_file` has an error of its own

    from ttsnap.files.provenance import versions
    from ttsnap.files.storage import write, write_json

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in head.state_dict().items()}
    write(folder / WEIGHTS, stored(tensors))
    description = {
        "format": FORMAT,
        "version": VERSION,
        "reward": reward,
        "sigma": sigma,
        "places": [asdict(place) for place in places],
        "config": asdict(head.config),
        "versions": versions(),
        **notes,
    }
    write_json(description, folder / HEAD)


def load_head(folder: str | Path, device: Any = "cpu", clean: str | None = None) -> FeatureReward:
    """The reward that `save_head` wrote.

    Args:
        folder: where it is.
        device: where it computes.
        clean: name of the clean reward, if it is to be checked.

    Raises:
        ValueError: no head, another clean reward, or weights that do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        data = json.loads((folder / HEAD).read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise ValueError(f"it says {data['format']} {data['version']}")
        config, places = HeadConfig(**data["config"]), [Place(**place) for place in data["places"]]
        reward, sigma = str(data["reward"]), float(data["sigma"])
        head = FeatureHead(config)
        tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
        head.load_state_dict(tensors)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a feature head: {str(error).strip().splitlines()[0]}") from error
    if clean is not None and clean != reward:
        raise ValueError(f"{folder} was trained from the reward {reward}, not from {clean}")
    judge = load_plain(reward, device)
    return FeatureReward(judge, head.to(device).eval().requires_grad_(False), places, sigma, reward)
