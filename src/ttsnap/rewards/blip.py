"""ImageReward (Xu et al., 2023) on transformers' BLIP: an image tower, a text tower that looks at the image, a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttsnap.pipelines.text import warn_if_cut
from ttsnap.rewards import conversion, preprocess
from ttsnap.rewards.clip import check_counts, config_beside, full_precision, linear_head
from ttsnap.rewards.sources import IMAGEREWARD

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw rewards on the authors' data
LENGTH = 35  # tokens of a prompt

# Several of the library's defaults load as well and are silently wrong: the text tower's 8 heads, the image tower's
# epsilon of 1e-5. The dropouts act in training only.
SIZES: dict[str, dict[str, Any]] = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "encoder_hidden_size": 1024,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "is_decoder": True,  # it has cross-attention; its self-attention looks both ways all the same
    },
}


class ImageReward(nn.Module):
    """A number per image and prompt, about -2.5 to 2.5 once normalised; the raw one is what is labelled and trained on.

    Trainable (see `ttsnap.training`) as a whole. The text tower looks at the image, so nothing but tokens is kept of a
    prompt. Scores in fp32 (bfloat16 moves it by 0.02); only while it is trained does it take part in mixed precision.

    Attributes:
        normalised: take the published mean out and divide by the published standard deviation.
    """

    vision: Any
    text: Any
    trained = r"(vision|text|head)\..*"
    lora_targets = r"(vision|text)\..*\.(qkv|projection|fc1|fc2|query|key|value|dense)"

    def __init__(self, vision: Any, text: Any, tokenizer: Any, *, normalised: bool = False) -> None:
        """Put the parts together.

        Args:
            vision: a `transformers.BlipVisionModel`.
            text: a `transformers.BlipTextModel` with cross-attention and no pooler.
            tokenizer: BERT's.
            normalised: see above.
        """
        super().__init__()
        self.vision, self.text, self.head = vision, text, linear_head(int(text.config.hidden_size))
        self.tokenizer, self.normalised = tokenizer, normalised
        self._tokens: dict[str, tuple[Tensor, Tensor]] = {}
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: Sequence[str], *, sigma: float = 0.0) -> Tensor:
        """Rewards [n] of images [n, 3, h, w] in 0..1; takes no notice of `sigma`."""
        return self.see(self.fit(images), prompts)

    def fit(self, images: Tensor) -> Tensor:
        """What the network sees of images [n, 3, h, w] in 0..1: pixels [n, 3, side, side], whatever their size."""
        device = self.vision.embeddings.class_embedding.device
        with full_precision(self, device):
            return preprocess.shortest_crop(images.to(device), int(self.vision.config.image_size))

    def see(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards [n] of pixels from `fit`."""
        check_counts(pixels, prompts)
        device = pixels.device
        with full_precision(self, device):
            # The last hidden state has been through the layer norm; the pooler applies it once more.
            patches = self.vision(pixel_values=pixels).last_hidden_state
            ids, mask = (torch.cat(parts).to(device) for parts in zip(*map(self._read, prompts), strict=True))
            words = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
            rewards: Tensor = self.head(words[:, 0])[:, 0].float()
        return (rewards - MEAN) / STD if self.normalised else rewards

    def _read(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask [1, 35] of a prompt."""
        if prompt not in self._tokens:
            warn_if_cut(self.tokenizer, prompt, LENGTH, "imagereward")
            read = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
            self._tokens[prompt] = read.input_ids, read.attention_mask
        return self._tokens[prompt]

    def gradient_checkpointing_enable(self) -> None:
        """Save memory in training: compute the image tower's activations again (the text tower cannot)."""
        self.vision.gradient_checkpointing_enable({"use_reentrant": False})


def load_imagereward(device: Any = "cpu", path: str | None = None, *, normalised: bool = False) -> ImageReward:
    """ImageReward v1.0.

    Args:
        device: where it runs.
        path: its file, or a directory that holds it (default: the hub's).
        normalised: as papers print it; labels and finetuning use the raw number.

    Raises:
        ValueError: the weights are not there, or not what they should be.
    """
    from accelerate import init_empty_weights
    from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    weights = IMAGEREWARD.weights(path)
    what = "an ImageReward checkpoint"
    state = conversion.read_state(weights)
    conversion.expect_layout(state, ("ImageReward",), weights, what)
    sizes = config_beside(weights) or SIZES
    tokenizer = IMAGEREWARD.load_tokenizer(BertTokenizer, weights)
    with init_empty_weights(include_buffers=False):
        vision = BlipVisionModel(BlipVisionConfig(**sizes["vision_config"]))
        text = BlipTextModel(BlipTextConfig(**sizes["text_config"]), add_pooling_layer=False)
        reward = ImageReward(vision, text, tokenizer, normalised=normalised)
    conversion.load_strictly(reward, conversion.imagereward_tensors(state), weights, what)
    return reward.to(device)
