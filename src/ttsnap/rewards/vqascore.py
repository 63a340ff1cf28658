"""VQAScore (Lin et al., 2024): how probable "Yes" is as the answer to "does this image show the prompt?".

    reward = P("Yes" | image, question(prompt))

One forward pass and no written number, so images do not tie. Three kinds of models answer:

    CLIP-FlanT5           the paper's: exp of the mean log-probability of the answer's tokens, its end among them
    Qwen2-VL, 2.5, 3      the probability of the answer's first token
    a server              the same, by the log-probabilities of an OpenAI-compatible server

The questions are published parameters of the metric (t2v_metrics 3.0: `default_question_template` of CLIP-FlanT5, the
default argument of `Qwen2VLModel.forward`); another wording is another metric.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttsnap.rewards import conversion, preprocess
from ttsnap.rewards.clip import check_counts
from ttsnap.rewards.sources import VQASCORE, model_folder
from ttsnap.rewards.vision_language import VisionLanguage, load_vision_language, plain
from ttsnap.rewards.vlm import ChatJudge

ANSWER = "Yes"
QUESTION = 'Does this image show "{}"?'
T5_QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
T5_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
LENGTH = 2048  # tokens of CLIP-FlanT5's text
HEAD = 64  # width of CLIP's attention heads


class QwenVqaScore(nn.Module):
    """VQAScore of a vision-language model that goes on writing where the question ends."""

    def __init__(self, reader: VisionLanguage) -> None:
        super().__init__()
        self.reader = reader.eval()
        self.answer = reader.tokenizer(ANSWER, add_special_tokens=False).input_ids[0]

    def forward(self, images: Tensor, prompts: Sequence[str], *, sigma: float = 0.0) -> Tensor:
        """Rewards [n] in 0..1 of images [n, 3, h, w] in 0..1; takes no notice of `sigma`."""
        check_counts(images, prompts)
        inputs = self.reader.inputs(images, [QUESTION.format(plain(self.reader.tokenizer, p)) for p in prompts])
        hidden = self.reader.hidden(inputs)
        last = inputs["attention_mask"].sum(1) - 1
        logits = self.reader.model.lm_head(hidden[torch.arange(len(last)), last])
        rewards: Tensor = logits.float().softmax(-1)[:, self.answer]
        return rewards


class ClipFlanT5(nn.Module):
    """The network of CLIP-FlanT5: CLIP's patches, projected, are words of T5's text.

    Attributes:
        vision: `transformers.CLIPVisionModel`, read at its last layer but one.
        projector: two linear layers.
        t5: `transformers.T5ForConditionalGeneration`.
    """

    vision: Any
    t5: Any

    def __init__(self, vision: Any, t5: Any) -> None:
        super().__init__()
        width, text = int(vision.config.hidden_size), int(t5.config.d_model)
        self.vision, self.t5 = vision, t5
        self.projector = nn.Sequential(nn.Linear(width, text), nn.GELU(), nn.Linear(text, text))

    def forward(self, pixels: Tensor, before: Tensor, after: Tensor, mask: Tensor, answer: Tensor) -> Tensor:
        """Logits [n, answer, vocabulary] of the answer's tokens.

        Args:
            pixels: [n, 3, side, side].
            before: token ids [words] before the image, the same for all.
            after: token ids [n, words] after it, padded on the right.
            mask: [n, words], which of these are there.
            answer: token ids [answer].
        """
        patches = self.vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        words = self.t5.shared
        first = words(before).expand(len(pixels), -1, -1)
        embedded = torch.cat([first, self.projector(patches), words(after)], dim=1)
        seen = mask.new_ones(len(mask), embedded.shape[1] - mask.shape[1])
        start = answer.new_tensor([self.t5.config.decoder_start_token_id])
        output = self.t5(
            inputs_embeds=embedded,
            attention_mask=torch.cat([seen, mask], dim=1),
            decoder_input_ids=torch.cat([start, answer[:-1]]).expand(len(pixels), -1),
            use_cache=False,
        )
        logits: Tensor = output.logits
        return logits


class T5VqaScore(nn.Module):
    """VQAScore of CLIP-FlanT5."""

    def __init__(self, network: ClipFlanT5, tokenizer: Any) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.eval()

    def forward(self, images: Tensor, prompts: Sequence[str], *, sigma: float = 0.0) -> Tensor:
        """Rewards [n] in 0..1 of images [n, 3, h, w] in 0..1; takes no notice of `sigma`."""
        check_counts(images, prompts)
        weight = self.network.t5.shared.weight
        side = int(self.network.vision.config.image_size)
        pixels = preprocess.shortest_crop(preprocess.square(images.to(weight.device)), side, halves_up=False)
        # Each piece of text between images has its own end-of-text token: so the authors read it.
        before, answer = (
            torch.tensor(self.tokenizer(text).input_ids, device=weight.device)
            for text in (f"{T5_SYSTEM} USER: ", ANSWER)
        )
        read = self.tokenizer(
            [f"\n{T5_QUESTION.format(plain(self.tokenizer, prompt))} ASSISTANT: " for prompt in prompts],
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=LENGTH - len(before) - 1,
            return_tensors="pt",
        ).to(weight.device)
        logits = self.network(pixels.to(weight.dtype), before, read.input_ids, read.attention_mask, answer)
        # The authors cut the vocabulary to what their tokenizer has.
        chances = logits[..., : len(self.tokenizer)].float().log_softmax(-1)
        each = chances.gather(-1, answer.expand(len(images), -1)[..., None])[..., 0]
        rewards: Tensor = each.mean(-1).exp()
        return rewards


class ServerVqaScore(ChatJudge):
    """VQAScore by the log-probabilities of an OpenAI-compatible server."""

    __name__ = "vqascore"
    asks_for = "log-probability"

    def body(self, image: str, prompt: str) -> dict[str, Any]:
        """A question, of whose answer one token is made; `temperature` 1 leaves probabilities as they are."""
        return {
            "temperature": 1,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 20,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": image}},
                        {"type": "text", "text": QUESTION.format(prompt)},
                    ],
                }
            ],
        }

    def read(self, text: str) -> float | None:
        """The probability of "Yes"; 0 where it is not among those that the server tells."""
        try:
            top = json.loads(text)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            chances = {str(entry["token"]): math.exp(float(entry["logprob"])) for entry in top}
        except (ValueError, LookupError, TypeError, OverflowError):
            return None
        return min(1.0, chances.get(ANSWER, 0.0)) if chances else None


def load_vqascore(
    device: Any = "cpu", path: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> QwenVqaScore | T5VqaScore | ServerVqaScore:
    """VQAScore of a model, or of a server.

    Args:
        device: where a model runs.
        path: the directory or hub repository of CLIP-FlanT5, Qwen2-VL, Qwen2.5-VL or Qwen3-VL (default: CLIP-FlanT5
            XXL), or the address of a server, whose model and key TTSNAP_VLM_MODEL and TTSNAP_VLM_KEY name.
        dtype: of a model's weights.

    Raises:
        ValueError: it is not there, or not what it should be.
    """
    named = path or VQASCORE.repo
    if named.startswith(("http://", "https://")):
        model = os.environ.get("TTSNAP_VLM_MODEL")
        if not model:
            raise ValueError(f"reward vqascore at {named} needs TTSNAP_VLM_MODEL, the name of the model there")
        return ServerVqaScore(named, model, os.environ.get("TTSNAP_VLM_KEY"))
    folder = model_folder("vqascore", named)
    if "mm_vision_tower" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return load_clip_flant5(folder, device, dtype)
    return QwenVqaScore(load_vision_language("vqascore", folder, device, dtype))


def load_clip_flant5(folder: Path, device: Any, dtype: torch.dtype) -> T5VqaScore:
    """CLIP-FlanT5 from the directory of its published files.

    Raises:
        ValueError: the weights are not what they should be.
    """
    from transformers import AutoTokenizer

    state = conversion.read_shards(folder)
    what = "a CLIP-FlanT5 checkpoint"
    tensors = conversion.clip_flant5_tensors(state)
    conversion.expect_keys(tensors, ("vision.embeddings.class_embedding", "t5.shared.weight"), folder, what)
    network = empty_clip_flant5(json.loads((folder / "config.json").read_text(encoding="utf-8")), tensors).to(dtype)
    conversion.load_strictly(network, tensors, folder, what, as_made=True)
    network.t5.set_input_embeddings(network.t5.shared)  # one tensor, not three
    tokenizer = VQASCORE.load_tokenizer(AutoTokenizer, folder / "config.json")
    return T5VqaScore(network, tokenizer).to(device)


def empty_clip_flant5(config: dict[str, Any], tensors: conversion.State) -> ClipFlanT5:
    """The network without data: T5's sizes are in its config, CLIP's in the shapes of its tensors."""
    from accelerate import init_empty_weights
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    tower = "vision."
    width, _, patch, _ = tensors[f"{tower}embeddings.patch_embedding.weight"].shape
    places = len(tensors[f"{tower}embeddings.position_embedding.weight"]) - 1
    layers = {name.split(".")[3] for name in tensors if name.startswith(f"{tower}encoder.layers.")}
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors[f"{tower}encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=len(layers),
        num_attention_heads=width // HEAD,
        image_size=patch * math.isqrt(places),
        patch_size=patch,
        hidden_act="quick_gelu",
    )
    with init_empty_weights(include_buffers=False):
        return ClipFlanT5(CLIPVisionModel(vision), T5ForConditionalGeneration(T5Config.from_dict(config)))
