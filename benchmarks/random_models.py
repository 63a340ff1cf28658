"""Stock pipelines with random weights, made on the device: for speed and memory where no weights can be had.

Denoiser and decoder have the full architectures (`full`) or a few small blocks of the same classes (`tiny`). The text
encoders have one layer each and a small vocabulary, with outputs of the right sizes: they run once per prompt.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

sys.path.append(str(Path(__file__).parents[1]))
from tools.shapes.text import tokenizers


@contextmanager
def made_on(device, dtype):
    """Modules inside are created on a device in a dtype; nothing goes through main memory or the disk."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def vae(channels: int, widths: tuple[int, ...], **config):
    count = len(widths)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        latent_channels=channels,
        layers_per_block=2,
        norm_num_groups=min(32, widths[0]),
        **config,
    )


def clip(tokenizer, width: int, projection: int | None = None):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=width // 16 if width < 64 else width // 64,
        projection_dim=projection or width,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def flux_dev(device, dtype, full: bool):
    """FLUX.1-dev: 19 double and 38 single blocks, 11.9 billion parameters."""
    clip_words, t5_words = tokenizers()
    clip_words.model_max_length, t5_words.model_max_length = 77, 512
    small = {} if full else {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 4}
    small |= {} if full else {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
    states, pooled = (4096, 768) if full else (128, 64)
    with made_on(device, dtype):
        transformer = FluxTransformer2DModel(
            guidance_embeds=True, joint_attention_dim=states, pooled_projection_dim=pooled, **small
        )
        t5 = T5Config(vocab_size=len(t5_words), d_model=states, d_ff=2 * states, d_kv=64, num_layers=1, num_heads=2)
        parts = {
            "transformer": transformer,
            "vae": vae(
                16,
                (128, 256, 512, 512) if full else (8, 8, 8, 8),
                use_quant_conv=False,
                use_post_quant_conv=False,
                scaling_factor=0.3611,
                shift_factor=0.1159,
            ),
            "text_encoder": clip(clip_words, pooled),
            "text_encoder_2": T5EncoderModel(t5),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return ready(FluxPipeline(scheduler=scheduler, tokenizer=clip_words, tokenizer_2=t5_words, **parts))


def sdxl(device, dtype, full: bool):
    """SDXL: a UNet of 2.6 billion parameters."""
    words, _ = tokenizers()
    words.model_max_length = 77
    first, second = (768, 1280) if full else (32, 64)
    widths = (320, 640, 1280) if full else (32, 32, 64)
    with made_on(device, dtype):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2 if full else 1,
            transformer_layers_per_block=(1, 2, 10) if full else 1,
            attention_head_dim=(5, 10, 20) if full else (2, 2, 4),
            cross_attention_dim=first + second,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256 if full else 8,
            projection_class_embeddings_input_dim=second + 6 * (256 if full else 8),
            norm_num_groups=32 if full else 8,
        )
        parts = {
            "unet": unet,
            "vae": vae(4, (128, 256, 512, 512) if full else (8, 8, 8, 8), scaling_factor=0.13025, force_upcast=False),
            "text_encoder": clip(words, first),
            "text_encoder_2": clip(words, second, second),
        }
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    return ready(StableDiffusionXLPipeline(scheduler=scheduler, tokenizer=words, tokenizer_2=words, **parts))


def ready(pipe):
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


MODELS = {
    "flux-dev-random": (flux_dev, True),
    "sdxl-random": (sdxl, True),
    "flux-dev-tiny": (flux_dev, False),
    "sdxl-tiny": (sdxl, False),
}
