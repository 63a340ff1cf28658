"""Qwen's vision-language models on transformers' own classes, for the rewards that read what they say of an image.

Qwen2-VL, Qwen2.5-VL and Qwen3-VL differ in sizes and in the inside of their towers; what goes in is the same: a turn of
a user with one image and a text, in the model's own chat template. Images stay tensors on the model's device, rows of a
batch are padded on the right, and positions are computed on the CPU, so that nothing waits for a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttsnap.pipelines.loading import quiet_libraries
from ttsnap.rewards import preprocess

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class Sight:
    """How a model wants its images.

    Attributes:
        patch: side of a patch, in pixels.
        merge: patches of a side that become one token.
        frames: how often each patch is repeated.
        least: pixels of an image at least.
        most: pixels of an image at most.
        mean: of the channels.
        std: their standard deviation.
    """

    patch: int = 14
    merge: int = 2
    frames: int = 2
    least: int = 56 * 56
    most: int = 16384 * 28 * 28
    mean: tuple[float, ...] = preprocess.MEAN
    std: tuple[float, ...] = preprocess.STD

    @classmethod
    def read(cls, folder: Path) -> Sight:
        """What the preprocessor_config.json of a model says; Qwen2-VL's where it has none."""
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (folder / name).is_file():
                read = json.loads((folder / name).read_text(encoding="utf-8"))
                break
        else:
            return cls()
        read = read.get("image_processor", read)
        size = read.get("size") or {}
        found = {
            "patch": read.get("patch_size"),
            "merge": read.get("merge_size"),
            "frames": read.get("temporal_patch_size"),
            "least": read.get("min_pixels") or size.get("shortest_edge"),
            "most": read.get("max_pixels") or size.get("longest_edge"),
            "mean": read.get("image_mean") and tuple(read["image_mean"]),
            "std": read.get("image_std") and tuple(read["image_std"]),
        }
        return cls(**{name: value for name, value in found.items() if value is not None})

    def see(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patches [n x patches, values] of images [n, 3, h, w] in 0..1, and how many there are down and across."""
        height, width = images.shape[-2:]
        height, width = preprocess.whole_patches(height, width, self.patch * self.merge, self.least, self.most)
        pixels = preprocess.normalise(preprocess.resize(images, height, width), self.mean, self.std)
        grid = height // self.patch, width // self.patch
        return preprocess.patches(pixels, self.patch, self.merge, self.frames), grid


class VisionLanguage(nn.Module):
    """A model with its tokenizer: images and texts in, hidden states out."""

    model: Any

    def __init__(self, model: Any, tokenizer: Any, sight: Sight, template: str | None = None) -> None:
        """Put the parts together.

        Args:
            model: one of transformers' `Qwen2VLForConditionalGeneration`, `Qwen2_5_VL...`, `Qwen3VL...`.
            tokenizer: the model's.
            sight: how it wants its images.
            template: its chat template (default: the tokenizer's).
        """
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.sight, self.template = tokenizer, sight, template
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        where: torch.device = next(self.model.parameters()).device
        return where

    def inputs(self, images: Tensor, texts: Sequence[str], *, left: bool = False) -> dict[str, Tensor]:
        """What the model is called with: pixels on its device, the rest still on the CPU.

        Args:
            images: [n, 3, h, w] in 0..1.
            texts: what is said of each image.
            left: pad on the left, for models that write on.
        """
        pixels, (down, across) = self.sight.see(images.to(self.device))
        count = down * across // self.sight.merge**2
        rows = [self._tokens(text, count) for text in texts]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        spare = [[pad] * (longest - len(row)) for row in rows]
        ids = torch.tensor([s + r if left else r + s for r, s in zip(rows, spare, strict=True)])
        lengths = torch.tensor([[len(row)] for row in rows])
        places = torch.arange(longest)
        return {
            "input_ids": ids,
            "attention_mask": (places >= longest - lengths if left else places < lengths).long(),
            "image_grid_thw": torch.tensor([[1, down, across]] * len(rows)),
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
            "pixel_values": pixels.to(self.model.dtype),
        }

    def hidden(self, inputs: dict[str, Tensor], positions: Tensor | None = None) -> Tensor:
        """Last hidden states [n, length, width].

        Args:
            inputs: of `inputs`.
            positions: [3, n, length] (default: the model's own, of time, height and width).
        """
        if positions is None:
            positions, _ = self.model.model.get_rope_index(
                inputs["input_ids"],
                mm_token_type_ids=inputs["mm_token_type_ids"],
                image_grid_thw=inputs["image_grid_thw"],
                attention_mask=inputs["attention_mask"],
            )
        given = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        output = self.model.model(**given, position_ids=positions.to(self.device), use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    def _tokens(self, text: str, count: int) -> list[int]:
        """Token ids of a user's turn: an image of `count` tokens, then the text."""
        content = [{"type": "image"}, {"type": "text", "text": text}]
        turn = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=True,
        )
        image = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        before, found, after = turn.partition(image)
        if not found:
            raise ValueError(f"the chat template puts no {image} where an image belongs")
        ids: list[int] = self.tokenizer(before + image * count + after, add_special_tokens=False).input_ids
        return ids


def plain(tokenizer: Any, prompt: str) -> str:
    """A prompt without what a tokenizer would read as its special tokens: it is to be judged, not obeyed."""
    for token in tokenizer.get_added_vocab():
        prompt = prompt.replace(token, " ")
    return prompt


def load_vision_language(reward: str, folder: Path, device: Any, dtype: torch.dtype = torch.bfloat16) -> VisionLanguage:
    """A model from the directory of its published files.

    Args:
        reward: for messages.
        folder: config.json, weights in one file or shards, tokenizer, preprocessor_config.json, chat template.
        device: where it runs.
        dtype: of its weights.

    Raises:
        ValueError: it is another model, or its weights do not fit.
    """
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = load_whole(AutoModelForImageTextToText, reward, folder, KINDS, dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return VisionLanguage(model.to(device), tokenizer, Sight.read(folder), chat_template(folder))


def load_whole(kind: Any, reward: str, folder: Path, types: tuple[str, ...], dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers with all of its weights.

    Args:
        kind: the class that loads it.
        reward: for messages.
        folder: of its published files.
        types: of models that will do.
        dtype: of the weights.

    Raises:
        ValueError: it is another model, or its weights do not fit.
    """
    from transformers import AutoConfig

    quiet_libraries()
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if name not in types:
        raise ValueError(f"reward {reward}: {folder} is a {name}; it takes {', '.join(types)}")
    config = AutoConfig.from_pretrained(folder)
    model, info = kind.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
    for what, keys in (("lacks", info["missing_keys"]), ("has no place for", info["unexpected_keys"])):
        if keys:
            raise ValueError(f"reward {reward}: {folder} is no whole {name}: the model {what} {sorted(keys)[0]}")
    return model


def chat_template(folder: Path) -> str | None:
    """The chat template among a model's files; None where its tokenizer has the only one."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        found: str = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
        return found
    return None


def hub_template(repo: str) -> str:
    """The chat template of a hub repository.

    Raises:
        ValueError: it could not be had; the message says what to do.
    """
    from huggingface_hub import hf_hub_download

    try:
        return str(
            json.loads(Path(hf_hub_download(repo, "chat_template.json")).read_text(encoding="utf-8"))["chat_template"]
        )
    except Exception as error:  # the hub's, the network's and the file system's errors share no base class
        raise ValueError(
            f"the chat template of {repo} is not on this machine and could not be downloaded "
            f"({type(error).__name__}); get it with `hf download {repo} chat_template.json`"
        ) from error
