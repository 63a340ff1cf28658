"""What the published rewards cost: parameters, memory and TFLOP, counted on their architectures without weights.

    python benchmarks/rewards.py            # the figures of docs/rewards.md and of `ttsnap rewards`

Needs no weights and little memory. A prompt's text is encoded once; a look is at one image of 512 x 512, and at one of
1024 x 1024 by the vision-language models that see it so (the others resize it first, which the counter does not count).
These ask for values, so they are run with none of their products computed; their tokenizers are not at hand, and each
word and each mark counts as one token, which is about what they make of English. Takes half an hour on one core.

    python benchmarks/rewards.py hpsv3 mps  # some of them
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys

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
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from model_parts import QWEN25_VISION
from ttsnap.pipelines.counting import Unmultiplied, count_tflop, some_pictures
from ttsnap.rewards import blip, clip, geneval, hpsv3, mps, preprocess, unifiedreward, vqascore
from ttsnap.rewards.vision_language import Sight, VisionLanguage

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


def mps_reward() -> torch.nn.Module:
    return mps.MPS(CLIPModel(CLIPConfig.from_dict(clip.VIT_H)), tokens)


def words(*special: str) -> PreTrainedTokenizerFast:
    """A tokenizer for which each word and each mark is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=list(special)
    )


TURN = "<|im_start|>system You are a helpful assistant.<|im_end|><|im_start|>user <|vision_start|><|image_pad|>"
TURN += "<|vision_end|>{{ messages[0]['content'][1]['text'] }}<|im_end|><|im_start|>assistant "
CHAT = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")

# Qwen2.5-VL-7B-Instruct's config.
QWEN25 = {
    **{name: value for name, value in hpsv3.SIZES.items() if name not in ("model_type", "vision_config")},
    "vocab_size": 152064,
    "vision_config": QWEN25_VISION,
}


def qwen25() -> VisionLanguage:
    tokenizer = words(*CHAT)
    config = Qwen2_5_VLConfig(**QWEN25, image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    config.vision_start_token_id = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    return VisionLanguage(Qwen2_5_VLForConditionalGeneration(config), tokenizer, Sight(), TURN)


def hpsv3_reward() -> torch.nn.Module:
    tokenizer = words(*CHAT)
    ids = {"image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>")}
    found = importlib.util.find_spec("hpsv3")
    instruction = hpsv3.find_instruction() if found else hpsv3.Instruction("word " * 500 + "{text_prompt}", hpsv3.TOKEN)
    return hpsv3.empty_hpsv3(hpsv3.SIZES | ids, tokenizer, instruction, 151658, TURN, torch.float32)


def unified_reward() -> torch.nn.Module:
    reward = unifiedreward.UnifiedReward(qwen25(), "word " * 150 + "{prompt}")
    unifiedreward.read_ratings = lambda answer: [1.0, 1.0, 1.0]
    return reward


def clip_flant5(size: dict) -> torch.nn.Module:
    """CLIP-FlanT5: FLAN-T5's sizes and CLIP ViT-L/14 at 336 pixels."""
    vision = CLIPVisionConfig(**clip.VIT_L["vision_config"] | {"image_size": 336})
    t5 = T5Config(
        vocab_size=32128, d_kv=64, num_layers=24, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        decoder_start_token_id=0, **size,
    )  # fmt: skip
    network = vqascore.ClipFlanT5(CLIPVisionModel(vision), T5ForConditionalGeneration(t5))
    network.t5.set_input_embeddings(network.t5.shared)
    network.t5.lm_head.weight = torch.nn.Parameter(torch.empty(t5.vocab_size, t5.d_model, device="meta"))
    return vqascore.T5VqaScore(network, words())


def geneval_reward() -> torch.nn.Module:
    """OWLv2's large sizes, and CLIP ViT-L/14."""
    sizes = {
        "vision_config": clip.VIT_L["vision_config"] | {"image_size": 1008},
        "text_config": clip.VIT_L["text_config"] | {"vocab_size": 49408, "max_position_embeddings": 16},
    }
    model = Owlv2ForObjectDetection(Owlv2Config(**sizes, projection_dim=768))
    detector = geneval.Detector(model, words(), (1008, 1008))
    return geneval.GenEval(detector, clip_reward(clip.VIT_L))


def size(name: str, reward: torch.nn.Module, bytes_each: int) -> dict[str, str | float]:
    parameters = sum(p.numel() for p in {id(p): p for p in reward.parameters()}.values())
    kind = {4: "fp32", 2: "bf16"}[bytes_each]
    return {
        "reward": name,
        "million_parameters": round(parameters / 1e6, 1),
        f"gib_{kind}": round(parameters * bytes_each / 2**30, 2),
    }


def count(name: str, reward: torch.nn.Module) -> dict[str, str | float]:
    """A look on tensors without data."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:  # the same on "cpu", where autocast can be switched off, still without data
        shapes = {id(p): torch.nn.Parameter(torch.empty(p.shape), requires_grad=False) for p in reward.parameters()}
    reward = copy.deepcopy(reward, shapes)
    with fake:
        images = torch.empty(1, 3, 512, 512)
        reward(images, ["b"])  # what is read once for all prompts
        first = count_tflop(lambda: reward(images, ["a"]))  # with the text
        look = count_tflop(lambda: reward(images, ["a"]))
    return size(name, reward, 2 if isinstance(reward, vqascore.T5VqaScore) else 4) | {
        "look_tflop": round(look, 3),
        "text_tflop_per_prompt": round(first - look, 3),
    }


def count_values(name: str, reward: torch.nn.Module, sides: tuple[int, ...]) -> dict[str, str | float]:
    """A look where values are asked for: weights take no memory, and their products are not computed."""
    found = size(name, reward, 2)
    for module in reward.modules():
        for key, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[key] = torch.nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False)
    with Unmultiplied():
        for side in sides:
            images = some_pictures(1, side, side)
            found[f"look_tflop_{side}"] = round(
                count_tflop(lambda images=images: reward(images, [getattr(reward, "example", "a cat on a mat")])), 3
            )
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    xl, xxl = ({"d_model": d, "d_ff": ff, "num_heads": heads} for d, ff, heads in ((2048, 5120, 32), (4096, 10240, 64)))
    whole = {
        "imagereward": imagereward,
        "pickscore, hpsv2, hpsv2.1": lambda: clip_reward(clip.VIT_H),
        "clipscore": lambda: clip_reward(clip.VIT_L),
        "aesthetic": aesthetic,
        "mps": mps_reward,
        "vqascore (CLIP-FlanT5 XL)": lambda: clip_flant5(xl),
        "vqascore (CLIP-FlanT5 XXL)": lambda: clip_flant5(xxl),
    }
    asking = {
        "geneval": (geneval_reward, (512,)),
        "hpsv3": (hpsv3_reward, (512,)),
        "vqascore (Qwen2.5-VL-7B)": (lambda: vqascore.QwenVqaScore(qwen25()), (512, 1024)),
        "unifiedreward (Qwen2.5-VL-7B)": (unified_reward, (512, 1024)),
    }
    wanted = sys.argv[1:]
    for name in [*whole, *asking]:
        if wanted and not any(name.startswith(w) for w in wanted):
            continue
        with init_empty_weights(include_buffers=False), torch.no_grad():
            reward = (whole[name] if name in whole else asking[name][0])()
        print(
            json.dumps(count(name, reward) if name in whole else count_values(name, reward, asking[name][1])),
            flush=True,
        )


if __name__ == "__main__":
    main()
