"""HPSv3's own model class, resizing and instruction, on random weights of a small size, with transformers 4.45.2.

Its package imports trainers and their libraries at the top: what scoring needs is taken out of its files. Runs with the
tests' own torch; the folders of the old libraries and of the package come first on the path.
"""

from __future__ import annotations

import ast
import json
import math
import sys
import typing
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn as nn
from PIL import Image
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

folder = Path(sys.argv[1])
package = Path(find_spec("hpsv3").submodule_search_locations[0])


def taken(file: str, kinds: type | tuple[type, ...], names: set[str], **known: object) -> dict:
    """Classes, functions or constants of a file of the package, without the rest of it."""
    parsed = ast.parse((package / file).read_text().replace("device_type='cuda'", "device_type='cpu'"))

    def name(node: ast.stmt) -> str:
        return node.targets[0].id if isinstance(node, ast.Assign) else node.name

    nodes = [node for node in parsed.body if isinstance(node, kinds) and name(node) in names]
    exec(compile(ast.Module(nodes, []), file, "exec"), known)
    return known


def main() -> None:
    model_file = taken(
        "model/qwen2vl_trainer.py", ast.ClassDef, {"Qwen2VLRewardModelBT"}, torch=torch, nn=nn,
        Qwen2VLForConditionalGeneration=Qwen2VLForConditionalGeneration,
        **{name: getattr(typing, name) for name in ("List", "Optional", "Union")},
    )  # fmt: skip
    sizing = taken(
        "dataset/utils.py", (ast.FunctionDef, ast.Assign),
        {"IMAGE_FACTOR", "MIN_PIXELS", "MAX_PIXELS", "MAX_RATIO", "smart_resize", "round_by_factor", "ceil_by_factor",
         "floor_by_factor"}, math=math,
    )  # fmt: skip
    words = taken("dataset/data_collator_qwen.py", ast.Assign, {"INSTRUCTION", "prompt_with_special_token"})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    config = Qwen2VLConfig(**json.loads((folder / "config.json").read_text()))
    token = tokenizer.convert_tokens_to_ids("<|Reward|>")
    model = model_file["Qwen2VLRewardModelBT"](config, 2, "special", [token], "ranknet").eval()
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    for p in model.parameters():
        drawn = torch.randn_like(p)
        p.data = 1 + drawn * 0.1 if p.ndim == 1 else drawn / p.shape[-1] ** 0.5
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "HPSv3.safetensors")
    look, found = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056), []
    for case in json.loads((folder / "cases.json").read_text()):
        image = Image.open(folder / case["image"])
        pixels = 256 * 28 * 28
        height, width = sizing["smart_resize"](image.height, image.width, min_pixels=pixels, max_pixels=pixels)
        seen = look(images=[image.resize((width, height), Image.BICUBIC)], return_tensors="pt")
        text = words["INSTRUCTION"].format(text_prompt=case["prompt"]) + words["prompt_with_special_token"]
        turn = case["turn"].replace("IMAGE", "<|image_pad|>" * (int(seen["image_grid_thw"].prod()) // 4))
        read = tokenizer(turn.replace("TEXT", text), return_tensors="pt")
        with torch.no_grad():
            given = {name: read[name] for name in ("input_ids", "attention_mask")}
            found.append(model(return_dict=True, **given, **seen)["logits"][0].tolist())
    (folder / "found.json").write_text(json.dumps(found))


main()
