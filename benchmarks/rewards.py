"""What the published rewards cost: parameters, memory and TFLOP, counted on their architectures without weights.

    python benchmarks/rewards.py            # the figures of docs/rewards.md and of `ttsnap rewards`

Needs no weights and almost no memory. A prompt's text is encoded once; a look is at one image of 512 x 512 (the size
of the image hardly matters: it is resized to 224 pixels first, which the counter does not count).
"""

from __future__ import annotations

import copy
import json

import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
)

from ttsnap.pipelines.flops import count_tflop
from ttsnap.rewards import blip, clip, preprocess

LENGTH = 77


def tokens(prompt: str) -> torch.Tensor:
    return torch.zeros(1, LENGTH, dtype=torch.long)


def clip_reward(sizes: dict) -> torch.nn.Module:
    return clip.ClipReward(CLIPModel(CLIPConfig.from_dict(sizes)), tokens, preprocess.longest_pad, 1.0)


def aesthetic() -> torch.nn.Module:
    config = CLIPConfig.from_dict(clip.VIT_L).vision_config
    return clip.AestheticReward(CLIPVisionModelWithProjection(config), clip.linear_head(768))


def imagereward() -> torch.nn.Module:
    vision = BlipVisionModel(BlipVisionConfig(**blip.SIZES["vision_config"]))
    text = BlipTextModel(BlipTextConfig(**blip.SIZES["text_config"]), add_pooling_layer=False)
    reward = blip.ImageReward(vision, text, None)
    shape = (1, blip.LENGTH)
    reward._read = lambda prompt: (torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long))
    return reward


def count(name: str, reward: torch.nn.Module) -> dict[str, str | float]:
    images = torch.empty(1, 3, 512, 512)
    first = count_tflop(lambda: reward(images, ["a"]))  # with the text
    look = count_tflop(lambda: reward(images, ["a"]))
    parameters = sum(p.numel() for p in reward.parameters())
    return {
        "reward": name,
        "million_parameters": round(parameters / 1e6, 1),
        "gib_fp32": round(parameters * 4 / 2**30, 2),
        "look_tflop": round(look, 3),
        "text_tflop_per_prompt": round(first - look, 3),
    }


def main() -> None:
    makers = {
        "imagereward": imagereward,
        "pickscore, hpsv2, hpsv2.1": lambda: clip_reward(clip.VIT_H),
        "clipscore": lambda: clip_reward(clip.VIT_L),
        "aesthetic": aesthetic,
    }
    for name, make in makers.items():
        with init_empty_weights(include_buffers=False):
            reward = make()
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:  # the same on "cpu", where autocast can be switched off, still without data
            shapes = {id(p): torch.nn.Parameter(torch.empty(p.shape), requires_grad=False) for p in reward.parameters()}
        reward = copy.deepcopy(reward, shapes)
        with fake:
            print(json.dumps(count(name, reward)))


if __name__ == "__main__":
    main()
