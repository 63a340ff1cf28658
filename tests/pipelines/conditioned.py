"""Pictures, and tiny random models that read them, for tiny pipelines."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file


def picture(folder: Path, name: str = "picture.png", seed: int = 0, size: tuple[int, int] = (32, 32)) -> Path:
    """A file with a random picture."""
    width, height = size
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
        folder / name
    )
    return folder / name


def mask(folder: Path) -> Path:
    """A file that is white in its middle."""
    Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8)).convert("RGB").save(folder / "mask.png")
    return folder / "mask.png"


def stirred(model: Any) -> Any:
    """Zero-initialised parts made to matter, as they do in trained control models."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def control_of(pipe: Any) -> Any:
    """A random ControlNet of a pipeline's kind; None where diffusers has none."""
    import diffusers

    torch.manual_seed(3)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    config = dict(denoiser.config)
    heads = {name: config.get(name) for name in ("attention_head_dim", "num_attention_heads")}
    match type(denoiser).__name__:
        case "UNet2DConditionModel":
            made = diffusers.ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=(4, 4))
        case "FluxTransformer2DModel":
            made = diffusers.FluxControlNetModel.from_transformer(denoiser, 1, 1, **heads)
        case "SD3Transformer2DModel":
            made = diffusers.SD3ControlNetModel.from_config(
                config | {"num_layers": 1, "extra_conditioning_channels": 0}
            )
        case "QwenImageTransformer2DModel":
            made = diffusers.QwenImageControlNetModel.from_transformer(denoiser, 1, **heads)
        case "ZImageTransformer2DModel":
            options = {name: config[name] for name in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")}
            made = diffusers.ZImageControlNetModel([0], [0], control_in_dim=config["in_channels"], **options)
        case "SanaTransformer2DModel":
            made = diffusers.SanaControlNetModel.from_config(config | {"num_layers": 1})
        case _:
            return None
    return stirred(made)


def union_of(pipe: Any) -> Any:
    """A random union of ControlNets for a UNet."""
    from diffusers import ControlNetUnionModel

    torch.manual_seed(3)
    taken = inspect.signature(ControlNetUnionModel.__init__).parameters
    config = {name: value for name, value in pipe.unet.config.items() if name in taken}
    own = {"conditioning_embedding_out_channels": (4, 4), "num_control_type": 3, "num_trans_channel": 8}
    own |= {"num_trans_head": 2, "num_proj_channel": 8}
    return stirred(ControlNetUnionModel(**config | own))


def adapter_of(pipe: Any) -> Any:
    """A random T2I adapter of a tiny UNet."""
    from diffusers import T2IAdapter

    torch.manual_seed(3)
    channels = list(pipe.unet.config.block_out_channels)
    kind = "full_adapter_xl"  # its second block is as large as the first, as it is in the tiny UNets
    return stirred(T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=4, adapter_type=kind))


def ip_adapter(pipe: Any, folder: Path) -> Path:
    """Weights of a random IP-Adapter with its image encoder beside it; returns the file."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(4)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=8,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    weights: dict[str, torch.Tensor] = {}
    if hasattr(pipe, "unet"):
        width = denoiser.config.cross_attention_dim
        for number, name in enumerate(denoiser.attn_processors):
            if "attn2" in name:
                out = denoiser.get_submodule(name.removesuffix(".processor")).to_k.out_features
                for part in ("k", "v"):
                    weights[f"ip_adapter.{number}.to_{part}_ip.weight"] = torch.randn(out, width) * 0.3
        prefix = "image_proj"
    else:
        width, out = denoiser.config.joint_attention_dim, denoiser.inner_dim
        for number in range(len(denoiser.transformer_blocks)):
            for part in ("k", "v"):
                base = f"double_blocks.{number}.processor.ip_adapter_double_stream_{part}_proj"
                weights[f"{base}.weight"] = torch.randn(out, width) * 0.3
                weights[f"{base}.bias"] = torch.zeros(out)
        prefix = "ip_adapter_proj_model"
    weights |= {f"{prefix}.proj.weight": torch.randn(4 * width, 8), f"{prefix}.proj.bias": torch.zeros(4 * width)}
    weights |= {f"{prefix}.norm.weight": torch.ones(width), f"{prefix}.norm.bias": torch.zeros(width)}
    save_file(weights, folder / "ip-adapter.safetensors")
    return folder / "ip-adapter.safetensors"
