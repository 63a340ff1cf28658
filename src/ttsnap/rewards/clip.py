"""Rewards on CLIP: PickScore, HPSv2 and 2.1, CLIPScore, and the LAION aesthetic predictor.

All are transformers' own classes. `ClipReward` is a scaled cosine between an image's and a prompt's features:

    PickScore   exp(logit_scale) cos        HPSv2   cos        CLIPScore   100 cos
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttsnap.pipelines.text import warn_if_cut
from ttsnap.rewards import conversion, preprocess
from ttsnap.rewards.sources import AESTHETIC, CLIPSCORE, HPSV2, HPSV21, PICKSCORE, Source

Tokenize = Callable[[str], Tensor]
Preprocess = Callable[[Tensor, int], Tensor]

# LAION's towers use gelu, OpenAI's an approximation of it. The other one loads as well and is silently wrong.
VIT_H = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
}
VIT_L = {
    "projection_dim": 768,
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
}


class ClipReward(nn.Module):
    """Scaled cosine of image and prompt; each prompt is encoded once.

    Trainable (see `ttsnap.training`) in the image tower: noise in an image does not touch the reading of the prompt.
    Scores in fp32; only while it is trained does it take part in mixed precision.

    Attributes:
        texts: features of the prompts seen so far; a noise-aware reward gives each level its own.
    """

    clip: Any
    trained = r"clip\.(vision_model|visual_projection)\..*"
    lora_targets = r"clip\.vision_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"

    def __init__(self, clip: Any, tokenize: Tokenize, prepare: Preprocess, scale: float | None = None) -> None:
        """Wrap a model.

        Args:
            clip: a `transformers.CLIPModel`.
            tokenize: prompt -> ids [1, length].
            prepare: images in 0..1 and a side -> pixels; see `ttsnap.rewards.preprocess`.
            scale: of the cosine; None: the exponential of the model's `logit_scale`.
        """
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        self.tokenize, self.prepare, self.scale = tokenize, prepare, scale
        self.texts: dict[str, Tensor] = {}
        self.eval()  # a module begins in training mode, in which it would take part in mixed precision

    def forward(self, images: Tensor, prompts: Sequence[str], *, sigma: float = 0.0) -> Tensor:
        """Rewards [n] of images [n, 3, h, w] in 0..1; takes no notice of `sigma`."""
        return self.see(self.fit(images), prompts)

    def fit(self, images: Tensor) -> Tensor:
        """What the network sees of images [n, 3, h, w] in 0..1: pixels [n, 3, side, side], whatever their size."""
        device = self.clip.logit_scale.device
        with full_precision(self, device):
            return self.prepare(images.to(device), int(self.clip.config.vision_config.image_size))

    def see(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards [n] of pixels from `fit`."""
        check_counts(pixels, prompts)
        device = self.clip.logit_scale.device
        with full_precision(self, device):
            image = F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
            text = torch.cat([self.read(prompt, device) for prompt in prompts])
            scale = self.clip.logit_scale.exp() if self.scale is None else self.scale
            return scale * (image * text).sum(-1)

    def read(self, prompt: str, device: torch.device) -> Tensor:
        """Features [1, d] of a prompt, of length 1; kept unless the text tower itself is being trained."""
        learning = torch.is_grad_enabled() and self.clip.text_projection.weight.requires_grad
        if learning or prompt not in self.texts:
            with nullcontext() if learning else torch.no_grad(), full_precision(self, device, always=not learning):
                output = self.clip.get_text_features(input_ids=self.tokenize(prompt).to(device))
                features = F.normalize(output.pooler_output.float(), dim=-1)
            if learning:
                return features
            self.texts[prompt] = features
        return self.texts[prompt]

    def gradient_checkpointing_enable(self) -> None:
        """Save memory in training: compute the towers' activations again in the backward pass."""
        self.clip.gradient_checkpointing_enable({"use_reentrant": False})


class AestheticReward(nn.Module):
    """The LAION aesthetic predictor: a linear head on CLIP L/14's image features; it does not read the prompt."""

    clip: Any
    reads_prompt = False
    trained = r"(clip\.(vision_model|visual_projection)|head)\..*"
    lora_targets = r"clip\.vision_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"

    def __init__(self, clip: Any, head: nn.Module) -> None:
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        self.head = head.eval().requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor, prompts: Sequence[str], *, sigma: float = 0.0) -> Tensor:
        """Rewards [n], about 1 to 10, of images [n, 3, h, w] in 0..1; takes no notice of `prompts` and `sigma`."""
        return self.see(self.fit(images), prompts)

    def fit(self, images: Tensor) -> Tensor:
        """What the network sees of images [n, 3, h, w] in 0..1: pixels [n, 3, side, side], whatever their size."""
        device = self.clip.visual_projection.weight.device
        with full_precision(self, device):
            return preprocess.shortest_crop(images.to(device), int(self.clip.config.image_size))

    def see(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards [n] of pixels from `fit`."""
        check_counts(pixels, prompts)
        with full_precision(self, pixels.device):
            features = F.normalize(self.clip(pixel_values=pixels).image_embeds.float(), dim=-1)
            rewards: Tensor = self.head(features)[:, 0].float()
        return rewards

    def gradient_checkpointing_enable(self) -> None:
        """Save memory in training: compute the tower's activations again in the backward pass."""
        self.clip.gradient_checkpointing_enable({"use_reentrant": False})


def linear_head(width: int) -> nn.Sequential:
    """The head that ImageReward and the aesthetic predictor share: five linear layers, no activation between them."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def check_counts(images: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError unless there is one prompt per image."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images need as many prompts, got {len(prompts)}")


def full_precision(module: nn.Module, device: torch.device, *, always: bool = False) -> AbstractContextManager[Any]:
    """No autocast, unless the module is being trained."""
    if module.training and not always:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def tokens(tokenizer: Any, length: int, name: str, clean: Callable[[str], str] | None = None) -> Tokenize:
    """Prompt -> ids [1, length], cut and padded; warns about what is not read."""

    def tokenize(prompt: str) -> Tensor:
        prompt = clean(prompt) if clean else prompt
        warn_if_cut(tokenizer, prompt, length, name)
        ids: Tensor = tokenizer(
            prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return ids

    return tokenize


def clean_text(prompt: str) -> str:
    """A prompt as open_clip's tokenizer cleans it; without this 26 of 3000 prompts get other tokens."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()).strip()


def load_pickscore(device: Any = "cpu", path: str | None = None) -> ClipReward:
    """PickScore v1 (Kirstain et al., 2023): about 15 to 25."""
    weights = PICKSCORE.weights(path)
    clip = load_clip(weights, VIT_H, "a PickScore checkpoint (a transformers CLIPModel)", ("transformers CLIP",))
    tokenize = _tokenize(PICKSCORE, clip, weights)
    return ClipReward(clip, tokenize, transformers_crop).to(device)


def load_hpsv2(device: Any = "cpu", path: str | None = None, source: Source = HPSV2) -> ClipReward:
    """HPSv2 or 2.1 (Wu et al., 2023): a cosine of about 0.28; papers print it times 100."""
    weights = source.weights(path)
    clip = load_clip(weights, VIT_H, f"an {source.reward} checkpoint (open_clip's ViT-H-14)", ("open_clip",))
    tokenize = _tokenize(source, clip, weights, clean_text)
    return ClipReward(clip, tokenize, preprocess.longest_pad, 1.0).to(device)


def load_hpsv21(device: Any = "cpu", path: str | None = None) -> ClipReward:
    """HPSv2.1: the same network as HPSv2 with other weights."""
    return load_hpsv2(device, path, HPSV21)


def load_clipscore(device: Any = "cpu", path: str | None = None) -> ClipReward:
    """CLIPScore with OpenAI's ViT-L/14: 100 times the cosine (Hessel et al., 2021, scale it otherwise and cut at 0)."""
    weights = CLIPSCORE.weights(path)
    clip = load_clip(weights, VIT_L, "a CLIP ViT-L/14 checkpoint", ("transformers CLIP", "open_clip"))
    return ClipReward(clip, _tokenize(CLIPSCORE, clip, weights), transformers_crop, 100.0).to(device)


def load_aesthetic(device: Any = "cpu", path: str | None = None) -> AestheticReward:
    """LAION's aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE) on OpenAI's CLIP ViT-L/14.

    Args:
        device: where it runs.
        path: the head's file or directory; CLIP's weights may lie in its folder `clip`, and are the hub's if not.
    """
    weights = AESTHETIC.weights(path)
    what = "the aesthetic predictor's head"
    state = conversion.read_state(weights)
    conversion.expect_layout(state, ("linear head",), weights, what)
    beside = weights.parent / "clip"
    clip_weights = CLIPSCORE.weights(beside if path is not None and beside.is_dir() else None)
    clip = load_clip(clip_weights, VIT_L, "a CLIP ViT-L/14 checkpoint", ("transformers CLIP", "open_clip"), vision=True)
    head = linear_head(int(clip.config.projection_dim))
    tensors = {name.removeprefix("layers."): tensor for name, tensor in state.items()}
    conversion.load_strictly(head, tensors, weights, what)
    return AestheticReward(clip, head).to(device)


def load_clip(
    weights: Path, published: dict[str, Any], what: str, layouts: tuple[str, ...], *, vision: bool = False
) -> Any:
    """A CLIPModel (or its image half) with these weights; `published` sizes, or those of a config.json beside them.

    Raises:
        ValueError: the file is not what it should be; names it.
    """
    from accelerate import init_empty_weights
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

    state = conversion.read_state(weights)
    conversion.expect_layout(state, layouts, weights, what)
    config = CLIPConfig.from_dict(config_beside(weights) or published)
    with init_empty_weights(include_buffers=False):
        clip: nn.Module = CLIPVisionModelWithProjection(config.vision_config) if vision else CLIPModel(config)
    conversion.load_strictly(clip, conversion.clip_tensors(state, vision_only=vision), weights, what)
    return clip


def config_beside(weights: Path) -> dict[str, Any] | None:
    """The sizes of both towers in a config.json in the folder of the weights; None if there is no such file.

    Raises:
        ValueError: it cannot be read.
    """
    import json

    path = weights.parent / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    both = isinstance(config, dict) and all(isinstance(config.get(f"{t}_config"), dict) for t in ("text", "vision"))
    return config if both else None


def transformers_crop(images: Tensor, side: int) -> Tensor:
    """Shortest side and centre crop as transformers' CLIP processors do it."""
    return preprocess.shortest_crop(images, side, halves_up=False)


def _tokenize(source: Source, clip: Any, weights: Path, clean: Callable[[str], str] | None = None) -> Tokenize:
    from transformers import CLIPTokenizer

    tokenizer = source.load_tokenizer(CLIPTokenizer, weights)
    return tokens(tokenizer, int(clip.config.text_config.max_position_embeddings), source.reward, clean)
