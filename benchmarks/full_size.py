"""What record, label and train need on FLUX.1-dev and SDXL with the three published rewards, counted without weights.

    python benchmarks/full_size.py --images 5000 --size 512 --steps 20

The models are built at full size on fake tensors, which have shapes and no data: operations, parameters and the
activations that the backward pass needs are counted, not estimated. Hours are those counts at a stated throughput.
"""

from __future__ import annotations

import argparse
import copy

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from ttsnap.core.cost import NAMED_COST_MODELS
from ttsnap.pipelines.flops import count_tflop
from ttsnap.rewards.trainable import adapt

GIB, RANK = 2**30, 16
SIDE = 224  # what all three rewards look at
MODELS = {"FLUX.1-dev": "flux-{}-counted", "SDXL": "sdxl-{}"}


def pickscore():
    """A full-size ViT-H reward; its prompts are of the full length."""
    from transformers import CLIPConfig, CLIPModel

    from ttsnap.rewards.clip import VIT_H, ClipReward, transformers_crop

    model = CLIPModel(CLIPConfig.from_dict(VIT_H))
    return ClipReward(model, lambda _: torch.zeros(1, 77, dtype=torch.long), transformers_crop)


def imagereward():
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    from ttsnap.rewards.blip import LENGTH, SIZES, ImageReward

    vision = BlipVisionModel(BlipVisionConfig(**SIZES["vision_config"]))
    text = BlipTextModel(BlipTextConfig(**SIZES["text_config"]), add_pooling_layer=False)
    reward = ImageReward(vision, text, None)
    reward._tokens["a"] = tuple(torch.ones(1, LENGTH, dtype=torch.long, device="cpu") for _ in range(2))
    return reward


REWARDS = {"ImageReward": imagereward, "PickScore, HPSv2": pickscore}  # the latter two are one network


class Saved:
    """Bytes that autograd keeps for the backward pass, each storage once, without the parameters."""

    def __init__(self, module):
        self.known = {p.untyped_storage()._cdata for p in module.parameters()}
        self.bytes = 0
        self.kept = []

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.kept.append(tensor)  # so that no other storage gets its address
            self.bytes += storage.nbytes()
        return tensor


def without_data(module, mode):
    """A copy whose tensors have shapes and no data."""
    copies = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        with mode:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        parameter = isinstance(tensor, torch.nn.Parameter)
        copies[id(tensor)] = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty
    return copy.deepcopy(module, copies)


def measure(build, method, *, precision, checkpointing=False):
    """TFLOP of a look and of a trained image, parameters, and bytes kept for the backward pass: fixed, per image."""
    with torch.device("meta"):
        reward = build()
        trained = adapt(reward, method, RANK, RANK)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    reward = without_data(reward, mode)
    with mode:
        if checkpointing:
            reward.gradient_checkpointing_enable()
        few, many = (kept(reward, images, precision) for images in (1, 3))
        each = (many - few) / 2
        pictures, prompts = torch.zeros(1, 3, SIDE, SIDE), ["a"]
        return {
            "train": count_training(reward, pictures, prompts, precision),
            "look": count_tflop(lambda: reward.eval()(pictures, prompts, sigma=0.0)),
            "parameters": sum(p.numel() for p in reward.parameters()),
            "trained": sum(p.numel() for p in trained.values()),
            "fixed": few - each,
            "activations": each,
        }


def kept(reward, images, precision):
    """Bytes that the forward pass of so many images keeps for the backward pass."""
    pictures, prompts = torch.zeros(images, 3, SIDE, SIDE), ["a"] * images
    with torch.no_grad():
        reward.eval()(pictures, prompts, sigma=0.0)  # encodes the prompt
    saved = Saved(reward.train())
    with (
        torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        reward(pictures, prompts, sigma=0.0).sum()
    return saved.bytes


def count_training(reward, pictures, prompts, precision):
    """TFLOP of forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        reward(pictures, prompts, sigma=0.0).sum().backward()
    return counter.get_total_flops() / 1e12


def rewards_table(images, levels, throughput):
    table = Table(title=f"training on {images} images x {levels} levels, looks at {SIDE} px, bf16")
    for name in (
        "",
        "parameters",
        "look, TFLOP",
        "method",
        "trained",
        "a level, MB",
        "fixed, GiB",
        "an image, MiB",
        "with checkpointing",
        "GiB at batch 64",
        "with checkpointing",
        "trained image, TFLOP",
        f"hours at {throughput:g} TFLOP/s",
    ):
        table.add_column(name)
    for name, build in REWARDS.items():
        for method in ("full", "lora"):
            plain = measure(build, method, precision="bf16")
            again = measure(build, method, precision="bf16", checkpointing=True)
            state = 4 * plain["parameters"] + 12 * plain["trained"]  # fp32 weights; gradient and two moments of AdamW
            total = plain["train"] * images * levels
            if method == "full":
                clean = plain
            table.add_row(
                name,
                f"{clean['parameters'] / 1e6:.0f} M",
                f"{clean['look']:.3f}",
                method,
                f"{plain['trained'] / 1e6:.1f} M",
                f"{4 * plain['trained'] / 1e6:.0f}",
                f"{(state + plain['fixed']) / GIB:.1f}",
                *(f"{found['activations'] / 2**20:.0f}" for found in (plain, again)),
                *(f"{(state + found['fixed'] + 64 * found['activations']) / GIB:.0f}" for found in (plain, again)),
                f"{plain['train']:.2f}",
                f"{total / throughput / 3600:.2f}",
            )
    return table


def data_table(images, size, steps, throughput):
    table = Table(title=f"data: {images} candidates x {steps} steps at {size} px, an image after every call")
    for name in (
        "",
        "calls, TFLOP",
        "decodes, TFLOP",
        f"hours at {throughput:g} TFLOP/s",
        f"disk at {SIDE} px, at most, GiB",
        f"disk at {size} px, at most, GiB",
    ):
        table.add_column(name)
    for name, key in MODELS.items():
        model = NAMED_COST_MODELS.get(key.format(size)) or NAMED_COST_MODELS[key.format(size).removesuffix("-counted")]
        calls, decodes = model.call_tflop * images * steps, model.decode_tflop * images * steps
        pixels = [3 * side * side * images * steps / GIB for side in (SIDE, size)]
        hours = (calls + decodes) / throughput / 3600
        table.add_row(name, f"{calls:,.0f}", f"{decodes:,.0f}", f"{hours:.1f}", *(f"{gib:.0f}" for gib in pixels))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--size", type=int, default=512, choices=(512, 1024))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--levels", type=int, default=15)
    parser.add_argument(
        "--throughput", type=float, default=300, help="TFLOP/s: about a third of an H100's peak in bf16"
    )
    a = parser.parse_args()
    console = Console(width=180)
    console.print(data_table(a.images, a.size, a.steps, a.throughput))
    console.print(rewards_table(a.images, a.levels, a.throughput))


if __name__ == "__main__":
    main()
