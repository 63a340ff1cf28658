"""MPS, the Multi-dimensional Preference Score (Zhang et al., 2024): CLIP ViT-H/14 and four layers that look across.

    words w, eot    the prompt's tokens and its end, projected          c    a condition's tokens
    kept(j)         max_i w_j . c_i / max_jk w_j . c_k > 0.3            words that have to do with the condition
    s               = exp(logit_scale) cos(eot, cross(patches; w kept)_0)

The condition says what is judged: `OVERALL` by default, whose words are the authors'. `cross` turns the image's tokens,
the class token first, towards the words that are kept: each layer is a cross-attention and a self-attention, both with
one head of keys and values and a feed-forward part beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttsnap.rewards import conversion
from ttsnap.rewards.clip import (
    VIT_H,
    Tokenize,
    check_counts,
    config_beside,
    full_precision,
    tokens,
    transformers_crop,
)
from ttsnap.rewards.sources import MPS as MPS_SOURCE

OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
THRESHOLD = 0.3  # of the authors' evaluation
LAYERS, HEAD, WIDER = 4, 64, 4


class FeedForward(nn.Sequential):
    """The parallel part of a layer: a gate, and back to the width."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Linear(width, 2 * WIDER * width, bias=False), Gate(), nn.Linear(WIDER * width, width, bias=False)
        )


class Gate(nn.Module):
    """The first half of the channels times the SiLU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        """Half as many channels."""
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


class CrossAttention(nn.Module):
    """Tokens look at others; many heads of queries, one of keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * HEAD, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, width, bias=False)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor, heeded: Tensor) -> Tensor:
        """Tokens [n, length, d] after a look at a context [n, words, d], of which some [n, words] are heeded."""
        y = self.norm(x)
        key, value = self.to_kv(context).chunk(2, dim=-1)
        found: Tensor = (
            x + self.to_out(attend(self.to_q(y), key, value, self.heads, heeded[:, None, None])) + self.ff(y)
        )
        return found


class SelfAttention(nn.Module):
    """Tokens look at each other, by rotary positions; all projections are one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.parts = heads, (heads * HEAD, HEAD, HEAD, 2 * WIDER * width)
        self.norm = nn.LayerNorm(width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * HEAD, width, bias=False)
        self.ff_out = nn.Sequential(Gate(), nn.Linear(WIDER * width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [n, length, d]."""
        query, key, value, wide = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        places = torch.arange(x.shape[1], device=x.device)[:, None]
        angles = places * 10000.0 ** -(torch.arange(0, HEAD, 2, device=x.device) / HEAD)
        angles = torch.cat([angles, angles], dim=-1)
        query = rotate(query.reshape(*query.shape[:-1], self.heads, HEAD), angles[:, None]).flatten(-2)
        found: Tensor = x + self.attn_out(attend(query, rotate(key, angles), value, self.heads)) + self.ff_out(wide)
        return found


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: the two halves of the last axis are the two axes of planes that turn."""
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of many heads of queries [n, length, heads x d] over one of keys and values [n, words, d]."""
    query = query.reshape(*query.shape[:-1], heads, HEAD).transpose(1, 2)
    key, value = (x[:, None].expand(-1, heads, -1, -1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class MPS(nn.Module):
    """Human preference under a condition, about 5 to 20.

    Scores in fp32, the authors in fp16; each prompt is encoded once.

    Attributes:
        condition: words for what is judged; of the checkpoint that is published, `OVERALL`.
        texts: features of the prompts and conditions seen so far.
    """

    clip: Any
    cross: Any

    def __init__(self, clip: Any, tokenize: Tokenize, condition: str = OVERALL) -> None:
        """Put the parts together.

        Args:
            clip: a `transformers.CLIPModel`.
            tokenize: prompt -> ids [1, length].
            condition: see above.
        """
        super().__init__()
        width = int(clip.config.projection_dim)
        self.clip, self.tokenize, self.condition = clip, tokenize, condition
        heads = width // HEAD
        self.cross = nn.ModuleList(
            nn.ModuleList([CrossAttention(width, heads), SelfAttention(width, heads)]) for _ in range(LAYERS)
        )
        self.texts: dict[str, tuple[Tensor, Tensor]] = {}
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: Sequence[str], *, sigma: float = 0.0) -> Tensor:
        """Rewards [n] of images [n, 3, h, w] in 0..1; takes no notice of `sigma`."""
        check_counts(images, prompts)
        device = self.clip.logit_scale.device
        with full_precision(self, device):
            pixels = transformers_crop(images.to(device), int(self.clip.config.vision_config.image_size))
            seen = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).last_hidden_state)
            words, ends = (torch.stack(parts) for parts in zip(*map(self._read, prompts), strict=True))
            heeded = self.heeded(words)
            for across, along in self.cross:
                seen = along(across(seen, words, heeded))
            rewards: Tensor = self.clip.logit_scale.exp() * F.cosine_similarity(seen[:, 0], ends, dim=-1)
        return rewards

    def heeded(self, words: Tensor) -> Tensor:
        """Which words [n, length] of prompts, read [n, length, d], have to do with the condition."""
        fit = (words @ self._read(self.condition)[0].T).amax(-1)
        kept: Tensor = fit / fit.amax(-1, keepdim=True) > THRESHOLD
        return kept

    @torch.no_grad()
    def _read(self, text: str) -> tuple[Tensor, Tensor]:
        """Features of a text: of all its tokens [length, d], and of its end [d]."""
        if text not in self.texts:
            output = self.clip.text_model(input_ids=self.tokenize(text).to(self.clip.logit_scale.device))
            found = output.last_hidden_state[0], output.pooler_output[0]
            words, end = (self.clip.text_projection(states) for states in found)
            self.texts[text] = words, end
        return self.texts[text]


def load_mps(device: Any = "cpu", path: str | None = None) -> MPS:
    """MPS, of overall preference.

    Args:
        device: where it runs.
        path: the file of its tensors, or a directory that holds it.

    Raises:
        ValueError: the weights are not there, or not what they should be.
    """
    from accelerate import init_empty_weights
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    weights = MPS_SOURCE.weights(path)
    what = "an MPS checkpoint"
    tensors = conversion.mps_tensors(conversion.read_state(weights))
    conversion.expect_keys(tensors, ("clip.visual_projection.weight", "cross.0.0.to_q.weight"), weights, what)
    tokenizer = MPS_SOURCE.load_tokenizer(CLIPTokenizer, weights)
    config = CLIPConfig.from_dict(config_beside(weights) or VIT_H)
    with init_empty_weights(include_buffers=False):
        reward = MPS(CLIPModel(config), tokens(tokenizer, config.text_config.max_position_embeddings, "mps"))
    conversion.load_strictly(reward, tensors, weights, what)
    return reward.to(device)
