"""Tiny random pipelines of the newer flow families and of PixArt, of the real classes, with tokenizers made here."""

from __future__ import annotations

import torch

BYTES = 259  # byte-level tokens and three special ones


def byte_tokenizer(template: str | None = None):
    """A Qwen2 tokenizer of single bytes, with a chat template like Qwen's."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = template or (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def letter_tokenizer():
    """A Gemma tokenizer of single letters."""
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return GemmaTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])


def _qwen_sizes(hidden: int, layers: int) -> dict:
    return {
        "vocab_size": BYTES,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1200,
    }


def _ready(pipe):
    """No progress bar, no gradients, and zero-initialised parts made to matter."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
            for parameter in part.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.05)
    return pipe


def flow_scheduler(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}


def kl_vae(kind="AutoencoderKL", **options):
    """An autoencoder that halves the size once."""
    import diffusers

    sizes = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "sample_size": 32,
    }
    return getattr(diffusers, kind)(**sizes | options)


def _flux2_parts(joint: int, guidance_embeds: bool):
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=joint,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    vae = kl_vae("AutoencoderKLFlux2")
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return transformer, vae


def flux2():
    """FLUX.2 with Mistral 3; its processor, which needs torchvision, stands back for its tokenizer."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    transformer, vae = _flux2_parts(3 * 16, guidance_embeds=True)
    config = Mistral3Config(
        text_config={"model_type": "mistral", "head_dim": 8, "hidden_act": "gelu", **_qwen_sizes(16, 30)},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 32,
            "patch_size": 8,
            "num_channels": 3,
        },
        spatial_merge_size=1,
        image_token_index=5,
    )
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content[0].text }}{% endfor %}"
    pipe = Flux2Pipeline(
        flow_scheduler(**DYNAMIC), vae, Mistral3ForConditionalGeneration(config), byte_tokenizer(template), transformer
    )
    pipe.system_message = "Paint."
    return _ready(pipe)


def flux2_klein(*, distilled: bool = False):
    """FLUX.2 Klein with Qwen3."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    transformer, vae = _flux2_parts(3 * 16, guidance_embeds=False)
    text = Qwen3ForCausalLM(Qwen3Config(head_dim=8, **_qwen_sizes(16, 27)))
    scheduler = flow_scheduler(**DYNAMIC)
    return _ready(Flux2KleinPipeline(scheduler, vae, text, byte_tokenizer(), transformer, is_distilled=distilled))


def flux2_klein_kv():
    """FLUX.2 Klein that keeps the keys of its reference picture for the steps after the first."""
    from diffusers import Flux2KleinKVPipeline

    parts = dict(flux2_klein(distilled=True).components)
    return _ready(Flux2KleinKVPipeline(**parts))


def qwen_image():
    """Qwen-Image with Qwen2.5-VL and the video autoencoder."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=12,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.5, 1.0],
    )
    config = Qwen2_5_VLConfig(
        text_config={
            **_qwen_sizes(16, 2),
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
    )
    pipe = QwenImagePipeline(
        scheduler=flow_scheduler(**DYNAMIC, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=byte_tokenizer(),
        transformer=transformer,
    )
    return _ready(pipe)


def z_image(*, shift: float = 3.0):
    """Z-Image with Qwen3."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    text = Qwen3Model(Qwen3Config(head_dim=8, **_qwen_sizes(16, 3)))
    vae = kl_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.7)
    return _ready(
        ZImagePipeline(flow_scheduler(shift=shift), vae, text, byte_tokenizer(), transformer),
    )


def scheduler_of(name: str):
    """A scheduler by a short name; `dpm` is what PixArt-Sigma comes with, `flow dpm` what Sana comes with."""
    import diffusers

    of_flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    kind, options = {
        "dpm": ("DPMSolverMultistepScheduler", {}),
        "flow dpm": ("DPMSolverMultistepScheduler", of_flow),
        "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        "euler": ("EulerDiscreteScheduler", {}),
        "ddim": ("DDIMScheduler", {"clip_sample": False}),
    }[name]
    return getattr(diffusers, kind)(**options)


def sana(*, scheduler: str = "flow dpm", layers: int = 1):
    """Sana with Gemma 2 and a deep-compression autoencoder that halves the size once, instead of five times."""
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    text = Gemma2Model(
        Gemma2Config(
            head_dim=4,
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=2,
            num_hidden_layers=1,
            num_key_value_heads=2,
            vocab_size=31,
            max_position_embeddings=2048,
        )
    )
    return _ready(SanaPipeline(letter_tokenizer(), text, vae, transformer, scheduler_of(scheduler)))


def pixart(*, scheduler: str = "dpm"):
    """PixArt-Sigma with T5, and a variance that it learnt."""
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
    from tools.shapes.text import encoders, tokenizers

    torch.manual_seed(0)
    clip, t5 = tokenizers()
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=128,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    vae = kl_vae(scaling_factor=0.13)
    return _ready(PixArtSigmaPipeline(t5, encoders(clip, t5)[1], vae, transformer, scheduler_of(scheduler)))
