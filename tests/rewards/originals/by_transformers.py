"""PickScore as its authors call it, with the transformers of their day, on random weights of its full size."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from common import read, shake, write
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

folder = Path(sys.argv[1])
# The sizes in the config of LAION's ViT-H-14.
TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32}


def main() -> None:
    config = CLIPConfig(
        text_config={**TEXT, "hidden_act": "gelu", "projection_dim": 1024},
        vision_config={**VISION, "hidden_act": "gelu", "projection_dim": 1024, "patch_size": 14},
        projection_dim=1024,
    )
    model = shake(CLIPModel(config).eval())
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    processor = CLIPProcessor(CLIPImageProcessor(), tokenizer)
    prompts, files = read(folder)
    options = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
    images = processor(images=[Image.open(file) for file in files], **options)
    rewards = []
    with torch.no_grad():
        image = model.get_image_features(**images)
        image = image / torch.norm(image, dim=-1, keepdim=True)
        for prompt in prompts:
            text = model.get_text_features(**processor(text=prompt, **options))
            text = text / torch.norm(text, dim=-1, keepdim=True)
            rewards.append((model.logit_scale.exp() * (text @ image.T)[0]).tolist())
    write(folder, rewards)


main()
