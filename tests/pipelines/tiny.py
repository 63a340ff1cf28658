"""Tiny random pipelines of the real classes."""

from __future__ import annotations

import torch


def flux(*, guidance_embeds: bool = False, dynamic_shifting: bool = False, shift: float = 1.0):
    """A random FluxPipeline that makes 32 x 32 images."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from tools.shapes.text import encoders, tokenizers

    torch.manual_seed(0)
    clip, t5 = tokenizers()
    clip_model, t5_model = encoders(clip, t5)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.7,
        sample_size=32,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic_shifting)
    pipe = FluxPipeline(scheduler, vae, clip_model, clip, t5_model, t5, transformer)
    pipe.set_progress_bar_config(disable=True)
    for model in (clip_model, t5_model, transformer, vae):
        model.eval().requires_grad_(False)
    return pipe


class Redness:
    """A genuine if simple reward: how red an image is, compared with its other colours."""

    def __call__(self, images, prompts, *, sigma):
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


redness = Redness()
