"""Parts that several families share at full size: text encoders, autoencoders, and the passes of FLUX.1's relatives.

Used by `models.py` and `newer_models.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import zeros

QWEN25_VISION = {  # of Qwen2.5-VL-7B, in Qwen-Image's text encoder and as a judge
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
WORDS = 64  # tokens of a prompt that keeps its length

Build = Callable[[], torch.nn.Module]


@dataclass(frozen=True)
class Model:
    """How to build one model at full size, and what one image asks of it.

    Attributes:
        denoiser: builds the denoiser.
        vae: builds the autoencoder.
        encoders: build the text encoders.
        passes: arguments of the denoiser for one step at a size in pixels, one dictionary per pass.
        latents: shape of what the decoder is given at that size.
    """

    denoiser: Build
    vae: Build
    encoders: tuple[Build, ...]
    passes: Callable[[int], list[dict[str, Any]]]
    latents: Callable[[int], tuple[int, ...]] = lambda size: (1, 16, size // 8, size // 8)


def kl(channels: int, **options: Any) -> torch.nn.Module:
    """The autoencoder of SD, SDXL, FLUX and Z-Image, for so many latent channels."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        **{"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2} | options,
    )


def kl16() -> torch.nn.Module:
    return kl(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611)


def clip_l() -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )


def t5_xxl() -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


def qwen3(hidden: int, inner: int, *, tied: bool = True) -> torch.nn.Module:
    """Qwen3 of 4B (2560, 9728) or 8B (4096, 12288, and a head of its own)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=151936,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=tied,
        )
    )


def qwen25_vl() -> torch.nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=QWEN25_VISION, tie_word_embeddings=False)
    )


def gemma2() -> torch.nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=256000,
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
        )
    )


def clip(hidden: int, layers: int, *, projection: bool = False) -> torch.nn.Module:
    """OpenCLIP's H (1024, 23 layers in use) or bigG (1280, 32) text encoder."""
    import transformers

    config = transformers.CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        projection_dim=hidden,
    )
    return getattr(transformers, "CLIPTextModelWithProjection" if projection else "CLIPTextModel")(config)


def guided(kind: Build, text: Build, width: int, words: int) -> Model:
    """A relative of FLUX.1 that is guided: one pass for the prompt, one for what guidance leads away from."""

    def passes(size: int) -> list[dict[str, Any]]:
        tokens = (size // 16) ** 2
        places = {"txt_ids": zeros(words, 3), "img_ids": zeros(tokens, 3)}
        given = {"hidden_states": zeros(1, tokens, 64), "timestep": zeros(1)}
        return [given | places | {"encoder_hidden_states": zeros(1, words, width)}] * 2

    return Model(kind, kl16, (text,), passes)
