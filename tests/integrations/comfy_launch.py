"""Run in a checkout of ComfyUI, by its own Python: its server, or first a tiny checkpoint (`checkpoint PATH`).

A torchvision that was built for another torch has no operators; declared, they do not hurt.
"""

import runpy
import sys

import torch

OPERATORS = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
BACKWARDS = tuple(f"_{name}_backward" for name in OPERATORS[2:])


def declare() -> None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        global LIBRARY
        LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
        for name in (*OPERATORS, *BACKWARDS):
            LIBRARY.define(f"{name}(Tensor a, *, int? b=None) -> Tensor")


def checkpoint(path: str) -> None:
    """Stable Diffusion 1.5 as ComfyUI recognises it, with random weights and a small UNet."""
    import comfy.ops
    import comfy.sd1_clip
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from safetensors.torch import save_file

    torch.manual_seed(0)
    plain = comfy.ops.disable_weight_init
    unet = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[1, 1],
        channel_mult=(1, 1),
        transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1],
        transformer_depth_middle=1,
        context_dim=768,
        num_heads=8,
        use_spatial_transformer=True,
        use_linear_in_transformer=False,
        legacy=False,
        operations=plain,
    )
    config = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    config |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    vae = AutoencoderKL(ddconfig=config, embed_dim=4)
    clip = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float32)
    parts = {"model.diffusion_model.": unet, "first_stage_model.": vae, "cond_stage_model.": clip}
    weights = {}
    for prefix, part in parts.items():
        for name, value in part.state_dict().items():
            if not value.is_floating_point():
                weights[prefix + name] = value
                continue
            drawn = torch.randn(value.shape) * (0.7 / max(1, value[0].numel()) ** 0.5 if value.ndim > 1 else 0.02)
            ones = value.ndim == 1 and name.endswith("weight")  # of norms
            weights[prefix + name] = (drawn + ones).half().contiguous()
    weights.pop("cond_stage_model.logit_scale", None)
    save_file(weights, path)


if __name__ == "__main__":
    declare()
    sys.path.insert(0, ".")
    if sys.argv[1] == "checkpoint":
        path = sys.argv[2]
        sys.argv = [sys.argv[0], "--cpu"]
        import comfy.options

        comfy.options.enable_args_parsing()
        checkpoint(path)
    else:
        sys.argv = ["main.py", *sys.argv[1:]]
        runpy.run_path("main.py", run_name="__main__")
