"""ImageReward's own model and its own `score`, on random weights."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from common import read, shake, write
from transformers import BertTokenizer

folder = Path(sys.argv[1])
# The package's top imports its trainers and their libraries: only the reward is wanted.
package = ModuleType("ImageReward")
package.__path__ = list(find_spec("ImageReward").submodule_search_locations)
sys.modules["ImageReward"] = package
# What it would fetch from the hub: the vocabulary of bert-base-uncased, and the sizes of the text tower.
BertTokenizer.from_pretrained = classmethod(lambda cls, *_, **__: cls(str(folder / "vocab.txt")))
SIZES = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def main() -> None:
    from ImageReward.ImageReward import ImageReward

    config = folder / "med_config.json"
    config.write_text(json.dumps(SIZES))
    model = shake(ImageReward(med_config=str(config), device="cpu").eval())
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    prompts, images = read(folder)
    with torch.no_grad():
        write(folder, [[model.score(prompt, str(image)) for image in images] for prompt in prompts])


main()
