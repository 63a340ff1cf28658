"""The families of 2025 and 2026 at full size: how each is built, and what one image asks of it in one step.

Their configurations are compared with published ones in docs/models.md. Some pack their tokens by what a mask says:
`known` makes masks that can be read although all else has no data.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import zeros

from model_parts import WORDS, Model, clip, gemma2, guided, kl, kl16, qwen25_vl, t5_xxl


def known(mask: list[int]) -> torch.Tensor:
    """A mask, bool of [1, tokens]."""
    return torch.tensor([mask], dtype=torch.bool)


def glm(vocabulary: int, **options: Any) -> dict[str, Any]:
    """The sizes of GLM-4 9B."""
    sizes = {"hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32}
    return sizes | {"num_key_value_heads": 2, "attention_bias": True, "vocab_size": vocabulary} | options


def glm_kl() -> torch.nn.Module:
    """The autoencoder of CogView4 and GLM-Image."""
    more = {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
    return kl(16, block_out_channels=(128, 512, 1024, 1024), layers_per_block=3, **more)


def byt5_small(vocabulary: int = 384) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    sizes = {"vocab_size": vocabulary, "d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_heads": 6}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def qwen3_vl(hidden: int, inner: int, vision: dict[str, Any], *, tied: bool = True) -> torch.nn.Module:
    """Qwen3-VL of 4B or 8B: the Qwen3 of that size, with a vision tower."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 36, "head_dim": 128}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936}
    own = {"num_heads": 16, "out_hidden_size": hidden, "num_position_embeddings": 2304, "patch_size": 16}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=sizes, vision_config=own | vision, tie_word_embeddings=tied)
    )


def qwen3_vl_4b() -> torch.nn.Module:
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    return qwen3_vl(2560, 9728, vision)


def qwen3_vl_8b() -> torch.nn.Module:
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    return qwen3_vl(4096, 12288, vision, tied=False)


def flux3_klein() -> Model:
    """FLUX.3 Klein, distilled; a prompt is filled up to 80 tokens. Without the model that writes a longer prompt."""

    def passes(size: int) -> list[dict[str, Any]]:
        tokens = (size // 16) ** 2
        places = {"txt_ids": zeros(80, 4), "img_ids": zeros(tokens, 4)}
        given = {"hidden_states": zeros(1, tokens, 128), "encoder_hidden_states": zeros(1, 80, 20480)}
        return [given | places | {"timestep": zeros(1), "target_timestep": zeros(1)}]

    def denoiser() -> torch.nn.Module:
        return diffusers.Flux3Transformer2DModel(flow_map=True)

    latents = lambda size: (1, 32, size // 8, size // 8)  # noqa: E731
    return Model(denoiser, diffusers.AutoencoderKLFlux2, (qwen3_vl_4b,), passes, latents)


def krea2() -> Model:
    """Krea 2 Turbo: 512 tokens, each with the states of twelve layers."""

    def passes(size: int) -> list[dict[str, Any]]:
        tokens = (size // 16) ** 2
        given = {"hidden_states": zeros(1, tokens, 64), "timestep": zeros(1)}
        texts = {"encoder_hidden_states": zeros(1, 512, 12, 2560), "position_ids": zeros(512 + tokens, 3)}
        return [given | texts | {"encoder_attention_mask": torch.ones(1, 512, dtype=torch.bool)}]

    latents = lambda size: (1, 16, 1, size // 8, size // 8)  # noqa: E731
    return Model(diffusers.Krea2Transformer2DModel, diffusers.AutoencoderKLQwenImage, (qwen3_vl_4b,), passes, latents)


def qwen_image_21() -> Model:
    """Qwen-Image 2.1 without guidance, the prompt computed again in each call; one token for 16 x 16 pixels."""
    words = WORDS + 8

    def passes(size: int) -> list[dict[str, Any]]:
        side = size // 16
        given = {"hidden_states": zeros(1, side**2, 64), "timestep": zeros(1), "img_shapes": [[(1, side, side)]]}
        texts = {"encoder_hidden_states": zeros(1, words, 4096), "encoder_hidden_states_mask": known([1] * words)}
        return [given | texts | {"img_mask": known([0] * words + [1] * (side**2 // 4))}]

    latents = lambda size: (1, 64, 1, size // 16, size // 16)  # noqa: E731
    denoiser, vae = diffusers.QwenImage21Transformer2DModel, diffusers.AutoencoderKLQwenImage21
    return Model(denoiser, vae, (qwen3_vl_8b,), passes, latents)


def hidream() -> Model:
    """HiDream I1 full: 128 tokens each of T5 and Llama, and the states of all of Llama's layers."""

    def llama() -> torch.nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128256))

    def denoiser() -> torch.nn.Module:
        from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

        def share(self: Any, x: torch.Tensor, experts: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            """Which expert a token goes to takes data; each gets as many here, and all together as many as there."""
            for expert in self.experts:
                expert(x[: len(experts) // len(self.experts)])
            return x

        MOEFeedForwardSwiGLU.moe_infer = share
        layers = [*range(32), *[31] * 16]
        return diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=16,
            caption_channels=[4096, 4096],
            axes_dims_rope=(64, 32, 32),
            llama_layers=layers,
        )

    def passes(size: int) -> list[dict[str, Any]]:
        texts = {"encoder_hidden_states_t5": zeros(2, 128, 4096), "pooled_embeds": zeros(2, 2048)}
        texts |= {"encoder_hidden_states_llama3": zeros(32, 2, 128, 4096)}
        return [{"hidden_states": zeros(2, 16, size // 8, size // 8), "timesteps": zeros(2)} | texts]

    texts = (lambda: clip(768, 12, projection=True), lambda: clip(1280, 32, projection=True), t5_xxl, llama)
    return Model(denoiser, kl16, texts, passes)


def hunyuan_image() -> Model:
    """HunyuanImage 2.1: two passes of its guider, 1000 tokens and 128 letters each; latents of a 32nd of the size."""

    def vae() -> torch.nn.Module:
        return diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=64,
            block_out_channels=(128, 256, 512, 512, 1024, 1024),
            layers_per_block=2,
            spatial_compression_ratio=32,
            sample_size=384,
        )

    def latents(size: int) -> tuple[int, ...]:
        return 1, 64, size // 32, size // 32

    def passes(size: int) -> list[dict[str, Any]]:
        texts = {"encoder_hidden_states": zeros(1, 1000, 3584), "encoder_hidden_states_2": zeros(1, 128, 1472)}
        masks = [
            {"encoder_attention_mask": known([1] * n + [0] * (1000 - n)), "encoder_attention_mask_2": known([0] * 128)}
            for n in (WORDS, 6)
        ]
        return [{"hidden_states": zeros(latents(size)), "timestep": zeros(1)} | texts | mask for mask in masks]

    def denoiser() -> torch.nn.Module:
        return diffusers.HunyuanImageTransformer2DModel(text_embed_2_dim=1472)

    return Model(denoiser, vae, (qwen25_vl, lambda: byt5_small(1510)), passes, latents)


def lumina2() -> Model:
    """Lumina Image 2.0: 256 tokens, of which those of the prompt go on beside the picture."""

    def passes(size: int) -> list[dict[str, Any]]:
        given = {"hidden_states": zeros(1, 16, size // 8, size // 8), "timestep": zeros(1)}
        given |= {"encoder_hidden_states": zeros(1, 256, 2304)}
        return [given | {"encoder_attention_mask": known([1] * n + [0] * (256 - n))} for n in (WORDS + 32, 1)]

    def denoiser() -> torch.nn.Module:
        return diffusers.Lumina2Transformer2DModel(cap_feat_dim=2304)

    return Model(denoiser, kl16, (gemma2,), passes)


def cogview4() -> Model:
    """CogView4: the prompt's tokens, filled up to a multiple of 16."""

    def text() -> torch.nn.Module:
        from transformers import GlmConfig, GlmModel

        return GlmModel(GlmConfig(**glm(151552, head_dim=128)))

    def passes(size: int) -> list[dict[str, Any]]:
        sizes = {name: zeros(1, 2) for name in ("original_size", "target_size", "crop_coords")}
        given = {"hidden_states": zeros(1, 16, size // 8, size // 8), "timestep": zeros(1)} | sizes
        return [given | {"encoder_hidden_states": zeros(1, n, 4096)} for n in (WORDS, 16)]

    def denoiser() -> torch.nn.Module:
        return diffusers.CogView4Transformer2DModel(num_layers=28, attention_head_dim=128, num_attention_heads=32)

    return Model(denoiser, glm_kl, (text,), passes)


def glm_image() -> Model:
    """GLM-Image: the model that draws first stands among the text encoders; a prompt without quoted words."""

    def drawer() -> torch.nn.Module:
        from transformers import GlmImageConfig, GlmImageForConditionalGeneration

        vision = {"depth": 40, "hidden_size": 1536, "image_size": 2048, "intermediate_size": 6144, "num_heads": 16}
        text = glm(168064, vision_vocab_size=16512, pad_token_id=167841, eos_token_id=16385)
        codes = {"embed_dim": 2048, "latent_channels": 1536, "num_embeddings": 16384}
        config = {"text_config": text, "vision_config": vision | {"patch_size": 16}, "vq_config": codes}
        return GlmImageForConditionalGeneration(GlmImageConfig(**config, image_token_id=167855))

    def passes(size: int) -> list[dict[str, Any]]:
        tokens = (size // 16) ** 2
        given = {"hidden_states": zeros(1, 16, size // 8, size // 8), "timestep": zeros(1)}
        given |= {"encoder_hidden_states": zeros(1, 2, 1472), "target_size": zeros(1, 2), "crop_coords": zeros(1, 2)}
        given |= {"prior_token_id": zeros(1, tokens, dtype=torch.long)}
        return [given | {"prior_token_drop": known([dropped] * tokens)} for dropped in (0, 1)]

    def denoiser() -> torch.nn.Module:
        return diffusers.GlmImageTransformer2DModel(attention_head_dim=128, num_attention_heads=32)

    return Model(denoiser, glm_kl, (byt5_small, drawer), passes)


def qwen3_17() -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
    return Qwen3Model(Qwen3Config(**sizes, vocab_size=151936, num_key_value_heads=8, head_dim=128))


def longcat_dit() -> torch.nn.Module:
    return diffusers.LongCatImageTransformer2DModel(num_layers=10, num_single_layers=20)


NEWER = {
    "FLUX.3 Klein": flux3_klein(),
    "Krea 2 Turbo": krea2(),
    "Qwen-Image 2.1": qwen_image_21(),
    "HiDream I1 full": hidream(),
    "HunyuanImage 2.1": hunyuan_image(),
    "Lumina Image 2.0": lumina2(),
    "CogView4": cogview4(),
    "LongCat-Image": guided(longcat_dit, qwen25_vl, 3584, 512),
    "Ovis-Image": guided(diffusers.OvisImageTransformer2DModel, qwen3_17, 2048, 256),
    "GLM-Image": glm_image(),
}
