"""The clean reward of the embedded world: a small network that reads an image and a prompt.

It knows nothing of the checker. A convolutional stem gives 8 x 8 grid features. Each word of the prompt, read in
context, attends over the grid; its attention yields a feature and a soft location. The words then talk to each other,
and four heads say how well count, colours, shapes and the relation are met. The reward is the soft minimum of the four.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttsnap.pipelines.counting import count_tflop, some_pictures

KINDS = ("count", "colour", "shape", "relation")
COLOUR_WORDS = ("red", "green", "blue", "yellow", "purple", "cyan")
WORDS = ("a", *COLOUR_WORDS, "circle", "square", "triangle", "left", "right", "of", "above", "below")
PAD, UNKNOWN, LENGTH, GRID = 0, 1, 12, 8
WEIGHTS = Path(__file__).parent / "weights" / "reward"
FORESIGHT = Path(__file__).parent / "weights" / "foresight"  # noise-aware, see ttsnap.shapes.foresight


def word_ids(prompts: Sequence[str], known: Sequence[str] = WORDS, length: int = LENGTH) -> Tensor:
    """Word ids [n, length]; unknown words share one id, words beyond the last but one are not read."""
    ids = torch.full((len(prompts), length), PAD, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        words = prompt.lower().replace(",", " ").replace(".", " ").split()[: length - 1]
        for column, word in enumerate(words):
            ids[row, column] = known.index(word) + 2 if word in known else UNKNOWN
    return ids


class Attention(nn.Module):
    """Multi-head attention with separate projections, so that adapters can be put on each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attended features [n, t, width] and the weights of the first head [n, t, s]; mask [n, s] is True to see."""
        q, k, v = (
            linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -1e4)
        weights = scores.softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2)), scores[:, 0]


class Block(nn.Module):
    """A pre-norm transformer block over the words."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 4)
        self.expand, self.contract = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[n, t, width] -> [n, t, width]."""
        y = self.norm1(x)
        x = x + self.attention(y, y, mask)[0]
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class Residual(nn.Module):
    """A residual convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, c, h, w]."""
        return x + self.conv(F.gelu(self.norm(x)))


class RewardNetwork(nn.Module):
    """Four logits per image and prompt: are count, colours, shapes and relation met?"""

    def __init__(
        self,
        width: int = 64,
        grid: int = GRID,
        length: int = LENGTH,
        kinds: Sequence[str] = KINDS,
        more_words: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.config = {
            "width": width, "grid": grid, "length": length, "kinds": list(kinds), "more_words": list(more_words)
        }  # fmt: skip
        self.grid, self.length, self.kinds, self.known = grid, length, tuple(kinds), (*WORDS, *more_words)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(24, 40, 3, stride=2, padding=1),
            nn.GroupNorm(4, 40),
            nn.GELU(),
            nn.Conv2d(40, width, 3, stride=2, padding=1),
            Residual(width),
            nn.GroupNorm(4, width),
        )
        self.words = nn.Embedding(len(self.known) + 2, width, padding_idx=PAD)
        self.positions = nn.Parameter(torch.randn(length + 1, width) * 0.5)
        self.cells = nn.Parameter(torch.randn(grid * grid, width) * 0.1)
        self.text = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.look = Attention(width, 2)
        self.locate = nn.Linear(2, width)
        self.whole = nn.Linear(2 * width, width)
        self.reason = nn.ModuleList(Block(width) for _ in range(2))
        self.heads = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(kinds)))
        self.cell_colour, self.cell_shape = nn.Linear(width, 7), nn.Linear(width, 4)  # read in training only
        self.word_met = nn.Linear(width, 1)  # read in training only
        axis = (torch.arange(grid) + 0.5) / grid * 2 - 1
        self.register_buffer("places", torch.cartesian_prod(axis, axis).flip(1), persistent=False)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Word ids [n, length]; see `word_ids`."""
        return word_ids(prompts, self.known, self.length)

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Words in context [n, length + 1, width], a summary token first, and which of them count [n, length + 1]."""
        x = F.pad(self.words(ids), (0, 0, 1, 0)) + self.positions
        mask = F.pad(ids != PAD, (1, 0), value=True)
        for block in self.text:
            x = block(x, mask)
        return x, mask

    def encode_image(self, images: Tensor) -> Tensor:
        """Grid features [n, cells, width] of images [n, 3, 8 grid, 8 grid] in 0..1."""
        return self.stem(images * 4 - 1).flatten(2).transpose(1, 2)

    def forward(self, images: Tensor, text: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Logits and what the auxiliary losses read.

        Args:
            images: [n, 3, 8 grid, 8 grid] in 0..1.
            text: words in context [n, length + 1, width] from `encode_text`.
            mask: which words count [n, length + 1].
        """
        return self.judge(self.encode_image(images), text, mask)

    def judge(self, grid: Tensor, text: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The same of grid features [n, cells, width] that `encode_image` or a student made."""
        feature, scores = self.look(self.norm(text), grid + self.cells)
        where = scores.softmax(-1) @ self.places.to(grid.dtype)
        x = text + feature + self.locate(where)
        whole = self.whole(torch.cat([grid.mean(1), grid.amax(1)], dim=-1))
        x = torch.cat([x[:, :1] + whole[:, None], x[:, 1:]], dim=1)
        for block in self.reason:
            x = block(x, mask)
        return {"logits": self.heads(x[:, 0]), "words": x, "scores": scores, "grid": grid}


def soft_minimum(logits: Tensor) -> Tensor:
    """Soft minimum [n] of logits [n, kinds]: high only where every kind of constraint is met."""
    return -torch.logsumexp(-logits, dim=-1)


class ShapesReward(nn.Module):
    """The network as a reward; each prompt is encoded once.

    Trainable (see `ttsnap.training`), but for the reading of prompts, which noise in the image does not touch.

    Attributes:
        texts: the prompts seen so far, as they were read.
    """

    trained = r"network\.(stem|cells|norm|look|locate|whole|reason|heads)\b.*"
    lora_targets = (
        r"network\.(stem\.(0|2|5|6\.conv)|look\.to_\w+|locate|whole"
        r"|reason\.\d+\.(attention\.to_\w+|expand|contract)|heads\.1)"
    )

    def __init__(self, network: RewardNetwork) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.texts: dict[str, tuple[Tensor, Tensor]] = {}

    @cached_property
    def tflop(self) -> float:
        """TFLOP of a look, the same at every size; sooner counted here than on a copy without data."""
        network, device = self.network, self.network.positions.device
        images = some_pictures(1, 8 * network.grid, 8 * network.grid, device).to(network.positions.dtype)
        with torch.no_grad():
            text, mask = network.encode_text(network.tokenize(["a"]).to(device))
        return count_tflop(lambda: network(images, text, mask))

    @cached_property
    def text_tflop(self) -> float:
        """TFLOP of reading a prompt, the same for all."""
        words = self.network.tokenize(["a"]).to(self.network.positions.device)
        return count_tflop(lambda: self.network.encode_text(words))

    def logits(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Logits [n, kinds] of images [n, 3, h, w] in 0..1, in the order of the network's kinds."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images need as many prompts, got {len(prompts)}")
        return self.judge(self.network.encode_image(self.fit(images)), prompts)

    def fit(self, images: Tensor) -> Tensor:
        """What the network sees of images [n, 3, h, w] in 0..1: images of its own size."""
        parameter = self.network.positions
        images = images.to(parameter.device, parameter.dtype)
        size = (8 * self.network.grid,) * 2
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return images

    def see(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards [n] of images from `fit`."""
        return soft_minimum(self.judge(self.network.encode_image(images), prompts))

    def judge(self, grid: Tensor, prompts: Sequence[str]) -> Tensor:
        """Logits [n, kinds] of grid features [n, cells, width]."""
        text, mask = (torch.cat(parts) for parts in zip(*map(self._read, prompts), strict=True))
        return self.network.judge(grid, text, mask)["logits"].float()

    def _read(self, prompt: str) -> tuple[Tensor, Tensor]:
        """A prompt's words in context and which of them count, in full precision."""
        if prompt not in self.texts:
            device = self.network.positions.device
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                self.texts[prompt] = self.network.encode_text(self.network.tokenize([prompt]).to(device))
        return self.texts[prompt]

    def forward(self, images: Tensor, prompts: Sequence[str], *, sigma: float = 0.0) -> Tensor:
        """Rewards [n] of images [n, 3, h, w] in 0..1; the network takes no notice of `sigma`."""
        return soft_minimum(self.logits(images, prompts))


def load_reward(device: str | torch.device = "cpu", folder: Path = WEIGHTS) -> ShapesReward:
    """The shipped clean reward, in fp32 (its weights are stored in fp16).

    Raises:
        FileNotFoundError: there are no weights in the folder.
    """
    from safetensors.torch import load_file

    network = RewardNetwork(**json.loads((folder / "config.json").read_text()))
    network.load_state_dict({key: value.float() for key, value in load_file(folder / "model.safetensors").items()})
    return ShapesReward(network.to(device))
