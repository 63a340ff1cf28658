"""Tiny random pipelines of the Stable Diffusion families, whose models make 32 x 32 images."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import torch

# The configuration of stabilityai/stable-diffusion-xl-base-1.0, as published.
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def ready(pipe):
    """Evaluated without gradients and without progress bars."""
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def vae(channels=4, **config):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=32,
        **config,
    )


def unet(**config):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        **config,
    )


def scheduler(kind="EulerDiscreteScheduler", **config):
    """A stock scheduler with the noise of Stable Diffusion."""
    import diffusers

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, kind)(**betas | {"steps_offset": 1, "timestep_spacing": "leading"} | config)


def safety():
    """A random safety checker with its image processor."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tower | {"image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=tower, vision_config=vision, projection_dim=8))
    return checker, CLIPImageProcessorPil(crop_size=32, size=32)


def stable_diffusion(schedule=None, *, safety_checker=False):
    """A random StableDiffusionPipeline."""
    from diffusers import StableDiffusionPipeline
    from tools.shapes.text import encoders, tokenizers

    torch.manual_seed(0)
    clip, t5 = tokenizers()
    text, _ = encoders(clip, t5)
    model, steps = unet(cross_attention_dim=128), schedule or scheduler()
    checker = safety() if safety_checker else (None, None)
    return ready(StableDiffusionPipeline(vae(), text, clip, model, steps, *checker, None, safety_checker))


def sdxl(schedule=None, *, zeros=True, second_width=128, **vae_config):
    """A random StableDiffusionXLPipeline."""
    from diffusers import StableDiffusionXLPipeline
    from tools.shapes.text import encoders, tokenizers
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    clip, t5 = tokenizers()
    text, _ = encoders(clip, t5)
    model = unet(
        cross_attention_dim=128 + second_width,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=second_width + 6 * 8,
    )
    width = {"hidden_size": second_width, "projection_dim": second_width}
    second = CLIPTextModelWithProjection(CLIPTextConfig(**text.config.to_dict() | width))
    return ready(
        StableDiffusionXLPipeline(
            vae(**vae_config), text, second, clip, clip, model, schedule or scheduler(), None, None, zeros, False
        )
    )


def sd3(*, dynamic_shifting=False, shift=3.0, t5=True, channels=4):
    """A random StableDiffusion3Pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from tools.shapes.text import encoders, tokenizers
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip, t5_tokenizer = tokenizers()
    small = encoders(clip, t5_tokenizer)
    clips = [CLIPTextModelWithProjection(small[0].config) for _ in range(2)]
    third = T5EncoderModel(T5Config(**small[1].config.to_dict() | {"d_model": 256}))
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=256,
        caption_projection_dim=32,
        pooled_projection_dim=256,
        pos_embed_max_size=32,
    )
    schedule = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic_shifting)
    pipe = StableDiffusion3Pipeline(
        transformer,
        schedule,
        vae(channels, shift_factor=0.1, scaling_factor=0.7),
        clips[0],
        clip,
        clips[1],
        clip,
        third if t5 else None,
        t5_tokenizer if t5 else None,
    )
    return ready(pipe)


@functools.cache
def _saved(build):
    folder = Path(tempfile.mkdtemp())
    build().save_pretrained(folder)
    return folder


def save(build, folder):
    """Save a pipeline as a diffusers directory."""
    shutil.copytree(_saved(build), folder)
