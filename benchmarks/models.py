"""What each model costs at full size: parameters, and TFLOP of one call and one decode at 512 and 1024 pixels.

    python benchmarks/models.py                # prints the table; --write keeps it for `ttsnap models`
    python benchmarks/models.py FLUX.2 Sana    # models whose name contains one of these
    python -m tools.model_tables                # the tables of docs/models.md, of what is stored

No weights are needed. The models are built without data (fake tensors) from the configurations here and in
`newer_models.py`; docs/models.md says what they were compared with. A call is what the stock pipeline asks of its
denoiser for one image in one step, guidance included. Text encoders are built for their number of parameters only. A
prompt is as long as the pipeline pads it to; where it keeps its length (Qwen-Image, Z-Image), it has 64 tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import zeros
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from model_parts import WORDS, Build, Model, clip, clip_l, gemma2, guided, kl, kl16, qwen3, qwen25_vl, t5_xxl
from newer_models import NEWER
from ttsnap.pipelines import catalogue
from ttsnap.pipelines.flops import count_tflop


def mistral() -> torch.nn.Module:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "image_size": 1540,
        "patch_size": 14,
    }
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, spatial_merge_size=2, tie_word_embeddings=False)
    )


def dc_ae() -> torch.nn.Module:
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    return diffusers.AutoencoderDC(
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def sdxl_unet(**options: Any) -> torch.nn.Module:
    own = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    }
    return diffusers.UNet2DConditionModel(**own | options)


def unet(
    width: int, pooled: int | None = None, rows: int = 2, words: int = 77
) -> Callable[[int], list[dict[str, Any]]]:
    """Passes of a UNet, with guidance or in one row, whose prompts are `width` wide; `pooled`: of SDXL."""

    def passes(size: int) -> list[dict[str, Any]]:
        added = {"text_embeds": zeros(rows, pooled), "time_ids": zeros(rows, 6)} if pooled else {}
        given = {"sample": zeros(rows, 4, size // 8, size // 8), "timestep": zeros(())}
        return [
            given
            | {"encoder_hidden_states": zeros(rows, words, width)}
            | ({"added_cond_kwargs": added} if added else {})
        ]

    return passes


def four(size: int) -> tuple[int, ...]:
    return 1, 4, size // 8, size // 8


def sd3(layers: int, positions: int, **options: Any) -> Model:
    def transformer() -> torch.nn.Module:
        return diffusers.SD3Transformer2DModel(
            num_layers=layers,
            num_attention_heads=layers,
            caption_projection_dim=64 * layers,
            pos_embed_max_size=positions,
            **options,
        )

    def passes(size: int) -> list[dict[str, Any]]:
        texts = {"encoder_hidden_states": zeros(2, 77 + 256, 4096), "pooled_projections": zeros(2, 2048)}
        return [{"hidden_states": zeros(2, 16, size // 8, size // 8), "timestep": zeros(2)} | texts]

    encoders = (lambda: clip(768, 12, projection=True), lambda: clip(1280, 32, projection=True), t5_xxl)
    return Model(transformer, kl16, encoders, passes)


def flux1(guidance: bool) -> Model:
    def passes(size: int) -> list[dict[str, Any]]:
        tokens = (size // 16) ** 2
        texts = {"encoder_hidden_states": zeros(1, 512, 4096), "pooled_projections": zeros(1, 768)}
        places = {"txt_ids": zeros(512, 3), "img_ids": zeros(tokens, 3)}
        given = {"hidden_states": zeros(1, tokens, 64), "timestep": zeros(1)}
        return [given | texts | places | {"guidance": zeros(1) if guidance else None}]

    def denoiser() -> torch.nn.Module:
        return diffusers.FluxTransformer2DModel(guidance_embeds=guidance)

    return Model(denoiser, kl16, (clip_l, t5_xxl), passes)


def flux2(
    double: int, single: int, heads: int, joint: int, text: Build, *, guidance: bool = False, count: int = 1
) -> Model:
    def passes(size: int) -> list[dict[str, Any]]:
        tokens = (size // 16) ** 2
        places = {"txt_ids": zeros(1, 512, 4), "img_ids": zeros(1, tokens, 4)}
        given = {"hidden_states": zeros(1, tokens, 128), "timestep": zeros(1)}
        texts = {"encoder_hidden_states": zeros(1, 512, joint)}
        return [given | texts | places | {"guidance": zeros(1) if guidance else None}] * count

    def denoiser() -> torch.nn.Module:
        return diffusers.Flux2Transformer2DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            joint_attention_dim=joint,
            guidance_embeds=guidance,
        )

    def latents(size: int) -> tuple[int, ...]:
        return 1, 32, size // 8, size // 8

    return Model(denoiser, diffusers.AutoencoderKLFlux2, (text,), passes, latents)


def qwen_passes(size: int) -> list[dict[str, Any]]:
    """One pass for the prompt, one for the blank that guidance leads away from; a template's words come with both."""
    side = size // 16
    given = {"hidden_states": zeros(1, side**2, 64), "timestep": zeros(1), "img_shapes": [[(1, side, side)]]}
    return [
        given | {"encoder_hidden_states": zeros(1, n, 3584), "encoder_hidden_states_mask": torch.ones(1, n)}
        for n in (WORDS + 5, 6)
    ]


def z_image(guided: bool) -> Model:
    def passes(size: int) -> list[dict[str, Any]]:
        texts = [zeros(WORDS + 8, 2560), zeros(8, 2560)][: 1 + guided]
        pictures = [zeros(16, 1, size // 8, size // 8) for _ in texts]
        return [{"x": pictures, "t": zeros(len(texts)), "cap_feats": texts}]

    return Model(diffusers.ZImageTransformer2DModel, kl16, (lambda: qwen3(2560, 9728),), passes)


def masked(channels: int, scale: int, width: int, rows: int = 2, **more: Any) -> Callable[[int], list[dict[str, Any]]]:
    """Passes of Sana and PixArt, whose prompts are padded, with guidance or in one row."""

    def passes(size: int) -> list[dict[str, Any]]:
        texts = {"encoder_hidden_states": zeros(rows, 300, width), "encoder_attention_mask": torch.ones(rows, 300)}
        pictures = {"hidden_states": zeros(rows, channels, size // scale, size // scale), "timestep": zeros(rows)}
        return [pictures | texts | more]

    return passes


def sdxl(rows: int = 2) -> Model:
    return Model(
        sdxl_unet,
        lambda: kl(4, scaling_factor=0.13025),
        (clip_l, lambda: clip(1280, 32, projection=True)),
        unet(2048, 1280, rows),
        four,
    )


def qwen_image() -> Model:
    vae, latents = diffusers.AutoencoderKLQwenImage, lambda size: (1, 16, 1, size // 8, size // 8)
    return Model(diffusers.QwenImageTransformer2DModel, vae, (qwen25_vl,), qwen_passes, latents)


def sana(passes: Callable[[int], list[dict[str, Any]]], **options: Any) -> Model:
    latents = lambda size: (1, 32, size // 32, size // 32)  # noqa: E731
    return Model(lambda: diffusers.SanaTransformer2DModel(**options), dc_ae, (gemma2,), passes, latents)


def kolors() -> Model:
    """SDXL's UNet, which reads ChatGLM3 6B; 256 tokens."""
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    text = {"num_layers": 28, "padded_vocab_size": 65024, "hidden_size": 4096, "ffn_hidden_size": 13696}
    text |= {"kv_channels": 128, "num_attention_heads": 32, "multi_query_attention": True, "multi_query_group_num": 2}
    text |= {"add_qkv_bias": True, "rmsnorm": True, "apply_query_key_layer_scaling": True, "original_rope": True}
    reads = {"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"}
    return Model(
        lambda: sdxl_unet(**reads, projection_class_embeddings_input_dim=5632),
        lambda: kl(4, scaling_factor=0.13025),
        (lambda: ChatGLMModel(ChatGLMConfig(**text)),),
        unet(4096, 4096, words=256),
        four,
    )


def wan() -> Model:
    """Wan 2.1 1.3B, one frame: one pass for the prompt, one for what guidance leads away from; 512 tokens."""

    def text() -> torch.nn.Module:
        from transformers import UMT5Config, UMT5EncoderModel

        config = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
        return UMT5EncoderModel(UMT5Config(**config))

    def latents(size: int) -> tuple[int, ...]:
        return 1, 16, 1, size // 8, size // 8

    def passes(size: int) -> list[dict[str, Any]]:
        texts = {"encoder_hidden_states": zeros(1, 512, 4096)}
        return [{"hidden_states": zeros(latents(size)), "timestep": zeros(1)} | texts] * 2

    def denoiser() -> torch.nn.Module:
        return diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)

    return Model(denoiser, diffusers.AutoencoderKLWan, (text,), passes, latents)


MODELS = {
    "FLUX.1 dev": flux1(True),
    "FLUX.1 schnell": flux1(False),
    "FLUX.2 dev": flux2(8, 48, 48, 15360, mistral, guidance=True),
    "FLUX.2 Klein 4B": flux2(5, 20, 24, 7680, lambda: qwen3(2560, 9728)),
    "FLUX.2 Klein 9B": flux2(8, 24, 32, 12288, lambda: qwen3(4096, 12288, tied=False)),
    "Qwen-Image": qwen_image(),
    "Z-Image Turbo": z_image(False),
    "Z-Image": z_image(True),
    "Sana 1.6B": sana(masked(32, 32, 2304)),
    "PixArt-Sigma": Model(
        lambda: diffusers.PixArtTransformer2DModel(
            sample_size=128, caption_channels=4096, interpolation_scale=2, use_additional_conditions=False
        ),
        lambda: kl(4, scaling_factor=0.13025),
        (t5_xxl,),
        masked(4, 8, 4096, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
        four,
    ),
    "SDXL": sdxl(),
    "SD 1.5": Model(
        lambda: diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        lambda: kl(4),
        (clip_l,),
        unet(768),
        four,
    ),
    "SD 2.1": Model(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        ),
        lambda: kl(4),
        (lambda: clip(1024, 23),),
        unet(1024),
        four,
    ),
    "SD 3 medium": sd3(24, 192),
    "SD 3.5 medium": sd3(24, 384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
    "SD 3.5 large": sd3(38, 192, qk_norm="rms_norm"),
    "FLUX.2 Klein base 4B": flux2(5, 20, 24, 7680, lambda: qwen3(2560, 9728), count=2),
    "Qwen-Image-2512": qwen_image(),
    "Chroma1 HD": guided(diffusers.ChromaTransformer2DModel, t5_xxl, 4096, 512),
    "Sana Sprint 1.6B": sana(
        masked(32, 32, 2304, rows=1, guidance=zeros(1)), guidance_embeds=True, qk_norm="rms_norm_across_heads"
    ),
    "SDXL Turbo": sdxl(rows=1),
    "Playground v2.5": sdxl(),
    "Kolors": kolors(),
    "Wan 2.1 1.3B, one frame": wan(),
    **NEWER,
}


class KnownScalars(TorchFunctionMode):
    """Numbers given to `torch.where` become tensors, whose values FakeTensorMode follows as it does those of masks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.where:
            args = [torch.tensor(one) if isinstance(one, int) else one for one in args]
        return func(*args, **(kwargs or {}))


def size_of(build: Build) -> int:
    """Parameters."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def measure(model: Model) -> dict[str, Any]:
    """Parameters of the denoiser, the text encoders and the VAE; TFLOP [call, decode] by size."""
    found: dict[str, Any] = {
        "denoiser": size_of(model.denoiser),
        "text": sum(map(size_of, model.encoders)),
        "vae": size_of(model.vae),
    }
    fake_tensor.CONSTANT_NUMEL_LIMIT = 1 << 14  # masks as long as the tokens of a picture keep their values
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), KnownScalars():
        denoiser, vae = (build().eval().requires_grad_(False) for build in (model.denoiser, model.vae))
        for size in catalogue.SIZES:
            call = sum(count_tflop(lambda p=passed: denoiser(**p, return_dict=False)) for passed in model.passes(size))
            decode = count_tflop(lambda size=size: vae.decode(zeros(model.latents(size))))
            found[str(size)] = [round(call, 4), round(decode, 4)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names (default: all)")
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {catalogue.FIGURES.name}")
    arguments = parser.parse_args()
    for name, model in MODELS.items():
        if arguments.names and not any(part.lower() in name.lower() for part in arguments.names):
            continue
        found = measure(model)
        billions = " + ".join(f"{found[part] / 1e9:.2f}" for part in ("denoiser", "text", "vae"))
        costs = "; ".join(
            f"{size} px: call {found[str(size)][0]}, decode {found[str(size)][1]}" for size in catalogue.SIZES
        )
        known = catalogue.figures().get(name)
        same = "" if found == known else f" (stored: {known})"
        print(f"{name}: {billions} billion parameters (denoiser + text + VAE); TFLOP at {costs}{same}", flush=True)
        if arguments.write:
            figures = json.loads(catalogue.FIGURES.read_text()) if catalogue.FIGURES.exists() else {}
            ordered = {key: (figures | {name: found}).get(key) for key in MODELS if key in figures or key == name}
            catalogue.FIGURES.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
