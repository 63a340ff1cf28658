"""What each model costs at full size: parameters, and TFLOP of one call and one decode at 512 and 1024 pixels.

    python benchmarks/models.py                # prints the table; --write keeps it for `ttsnap models`
    python benchmarks/models.py FLUX.2 Sana    # models whose name contains one of these

No weights are needed. The models are built without data (fake tensors) from the configurations below; docs/models.md
says what they were compared with. They are run through the adapters of `ttsnap.samplers`, guidance included. Text
encoders are built for their number of parameters only. A prompt is as long as the adapter pads it to; where it keeps
its length (Qwen-Image, Z-Image), it has 64 tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ttsnap import catalogue, samplers
from ttsnap.samplers import flops

WORDS = 64  # tokens of a prompt that keeps its length


@dataclass(frozen=True)
class Model:
    """How to build one model at full size.

    Attributes:
        pipeline: class of the pipeline.
        parts: name of a part -> builds it.
        encoders: build the text encoders.
        text: what the adapter makes of a prompt, as zeros.
        scheduler: builds the scheduler.
        options: of the adapter.
        others: further arguments of the pipeline.
    """

    pipeline: str
    parts: dict[str, Callable[[], torch.nn.Module]]
    encoders: tuple[Callable[[], torch.nn.Module], ...]
    text: Callable[[], Any]
    scheduler: Callable[[], Any] = lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    options: dict[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ("tokenizer", "text_encoder")


def kl(channels: int, **options: Any) -> torch.nn.Module:
    """The autoencoder of SD, SDXL, FLUX and Z-Image, for so many latent channels."""
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        layers_per_block=2,
        **options,
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
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
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


def dc_ae() -> torch.nn.Module:
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    return diffusers.AutoencoderDC(
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def flux2_dit(double: int, single: int, heads: int, joint: int, *, guidance: bool = False) -> torch.nn.Module:
    return diffusers.Flux2Transformer2DModel(
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=heads,
        joint_attention_dim=joint,
        guidance_embeds=guidance,
    )


def flux_text() -> Any:
    from ttsnap.samplers.flux import FluxText

    return FluxText(torch.zeros(1, 512, 4096), torch.zeros(1, 768)), None


def masked_text(width: int) -> Any:
    from ttsnap.samplers.pixart import MaskedText

    return (MaskedText(torch.zeros(1, 300, width), torch.ones(1, 300)),) * 2


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


def sdxl_unet() -> torch.nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def unet_text(width: int, pooled: int | None = None) -> Any:
    from ttsnap.samplers.unet import UNetText

    return (UNetText(torch.zeros(1, 77, width), None if pooled is None else torch.zeros(1, pooled)),) * 2


def sd3_text() -> Any:
    from ttsnap.samplers.stable_diffusion_3 import SD3Text

    return (SD3Text(torch.zeros(1, 77 + 256, 4096), torch.zeros(1, 2048)),) * 2


def sd3(layers: int, positions: int, **options: Any) -> Model:
    def transformer() -> torch.nn.Module:
        return diffusers.SD3Transformer2DModel(
            num_layers=layers,
            num_attention_heads=layers,
            caption_projection_dim=64 * layers,
            pos_embed_max_size=positions,
            **options,
        )

    return Model(
        "StableDiffusion3Pipeline",
        {"transformer": transformer, "vae": lambda: kl16()},
        (lambda: clip(768, 12, projection=True), lambda: clip(1280, 32, projection=True), t5_xxl),
        sd3_text,
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        others=tuple(f"{part}{end}" for part in ("tokenizer", "text_encoder") for end in ("", "_2", "_3")),
    )


def flux1(guidance: bool) -> Model:
    return Model(
        "FluxPipeline",
        {"transformer": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=guidance), "vae": kl16},
        (clip_l, t5_xxl),
        flux_text,
        others=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
    )


def klein(double: int, single: int, heads: int, joint: int, text: Callable[[], torch.nn.Module]) -> Model:
    return Model(
        "Flux2KleinPipeline",
        {"transformer": lambda: flux2_dit(double, single, heads, joint), "vae": diffusers.AutoencoderKLFlux2},
        (text,),
        lambda: (torch.zeros(1, 512, joint), None),
        options={"guidance_scale": 1.0},
    )


def z_image(guidance: float) -> Model:
    return Model(
        "ZImagePipeline",
        {"transformer": diffusers.ZImageTransformer2DModel, "vae": kl16},
        (lambda: qwen3(2560, 9728),),
        lambda: (torch.zeros(WORDS + 8, 2560), torch.zeros(8, 2560)),
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        {"guidance_scale": guidance},
    )


MODELS = {
    "FLUX.1 dev": flux1(True),
    "FLUX.1 schnell": flux1(False),
    "FLUX.2 dev": Model(
        "Flux2Pipeline",
        {
            "transformer": lambda: flux2_dit(8, 48, 48, 15360, guidance=True),
            "vae": diffusers.AutoencoderKLFlux2,
        },
        (mistral,),
        lambda: (torch.zeros(1, 512, 15360), None),
    ),
    "FLUX.2 Klein 4B": klein(5, 20, 24, 7680, lambda: qwen3(2560, 9728)),
    "FLUX.2 Klein 9B": klein(8, 24, 32, 12288, lambda: qwen3(4096, 12288, tied=False)),
    "Qwen-Image": Model(
        "QwenImagePipeline",
        {"transformer": diffusers.QwenImageTransformer2DModel, "vae": diffusers.AutoencoderKLQwenImage},
        (qwen25_vl,),
        lambda: (torch.zeros(1, WORDS + 5, 3584), torch.zeros(1, 6, 3584)),
    ),
    "Z-Image Turbo": z_image(0.0),
    "Z-Image": z_image(4.0),
    "Sana 1.6B": Model(
        "SanaPipeline",
        {"transformer": diffusers.SanaTransformer2DModel, "vae": dc_ae},
        (gemma2,),
        lambda: masked_text(2304),
        lambda: diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        ),
    ),
    "PixArt-Sigma": Model(
        "PixArtSigmaPipeline",
        {
            "transformer": lambda: diffusers.PixArtTransformer2DModel(
                sample_size=128, caption_channels=4096, interpolation_scale=2, use_additional_conditions=False
            ),
            "vae": lambda: kl(4, scaling_factor=0.13025),
        },
        (t5_xxl,),
        lambda: masked_text(4096),
        diffusers.DPMSolverMultistepScheduler,
    ),
}


STABLE_DIFFUSION = {
    "SDXL": Model(
        "StableDiffusionXLPipeline",
        {"unet": lambda: sdxl_unet(), "vae": lambda: kl(4, scaling_factor=0.13025)},
        (clip_l, lambda: clip(1280, 32, projection=True)),
        lambda: unet_text(2048, 1280),
        diffusers.EulerDiscreteScheduler,
        others=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
    ),
    "SD 1.5": Model(
        "StableDiffusionPipeline",
        {"unet": lambda: diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768), "vae": lambda: kl(4)},
        (clip_l,),
        lambda: unet_text(768),
        diffusers.DDIMScheduler,
    ),
    "SD 2.1": Model(
        "StableDiffusionPipeline",
        {
            "unet": lambda: diffusers.UNet2DConditionModel(
                sample_size=96,
                cross_attention_dim=1024,
                attention_head_dim=(5, 10, 20, 20),
                use_linear_projection=True,
            ),
            "vae": lambda: kl(4),
        },
        (lambda: clip(1024, 23),),
        lambda: unet_text(1024),
        diffusers.DDIMScheduler,
    ),
    "SD 3 medium": sd3(24, 192),
    "SD 3.5 medium": sd3(24, 384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
    "SD 3.5 large": sd3(38, 192, qk_norm="rms_norm"),
}
MODELS |= {name: model for name, model in STABLE_DIFFUSION.items() if model.pipeline in samplers.SAMPLERS}


def parameters(build: Callable[[], torch.nn.Module]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def measure(model: Model) -> dict[str, Any]:
    """Parameters of the denoiser, the text encoders and the VAE; TFLOP [call, decode] by size."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.device("cpu"):
        parts = {name: build().eval().requires_grad_(False) for name, build in model.parts.items()}
    pipe = getattr(diffusers, model.pipeline)(
        scheduler=model.scheduler(), **parts, **dict.fromkeys(model.others), **extra(model.pipeline)
    )
    found: dict[str, Any] = {
        "denoiser": sum(p.numel() for p in parts[next(iter(parts))].parameters()),
        "text": sum(parameters(build) for build in model.encoders),
        "vae": sum(p.numel() for p in parts["vae"].parameters()),
    }
    for size in catalogue.SIZES:
        sampler = samplers.for_pipeline(pipe, num_steps=20, height=size, width=size, **model.options)
        sampler._encoded["a"] = model.text()
        with fake:
            call, decode, _ = flops._count_parts(sampler)
        found[str(size)] = [round(call, 4), round(decode, 4)]
    return found


def extra(pipeline: str) -> dict[str, Any]:
    """Arguments that only one pipeline takes."""
    if pipeline == "StableDiffusionPipeline":
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {"is_distilled": True} if pipeline == "Flux2KleinPipeline" else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names (default: all)")
    parser.add_argument("--docs", action="store_true", help="count nothing; renew the tables of docs/models.md")
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {catalogue.FIGURES.name}")
    arguments = parser.parse_args()
    if arguments.docs:
        document = Path(__file__).parents[1] / "docs" / "models.md"
        document.write_text(catalogue.renewed(document.read_text()))
        return
    for name, model in MODELS.items():
        if arguments.names and not any(part.lower() in name.lower() for part in arguments.names):
            continue
        found = measure(model)
        billions = " + ".join(f"{found[part] / 1e9:.2f}" for part in ("denoiser", "text", "vae"))
        costs = "; ".join(
            f"{size} px: call {found[str(size)][0]}, decode {found[str(size)][1]}" for size in catalogue.SIZES
        )
        print(f"{name}: {billions} billion parameters (denoiser + text + VAE); TFLOP at {costs}", flush=True)
        if arguments.write:
            figures = json.loads(catalogue.FIGURES.read_text()) if catalogue.FIGURES.exists() else {}
            ordered = {key: (figures | {name: found}).get(key) for key in MODELS if key in figures or key == name}
            catalogue.FIGURES.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
