"""Tiny random pipelines of more of the real classes."""

from __future__ import annotations

import torch

from tests.pipelines.tiny_sd import ready, vae

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}  # of UniPC, as Wan has it


def _blocks():
    return {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "cross_attention_dim": 128,
        "attention_head_dim": 2,
    }


def _unet(**options):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **_blocks(), **options
    )


def _parts(**unet):
    from tools.shapes.text import encoders, tokenizers

    torch.manual_seed(0)
    clip, t5 = tokenizers()
    clip_model, _ = encoders(clip, t5)
    return {
        "vae": vae(),
        "text_encoder": clip_model,
        "tokenizer": clip,
        "unet": _unet(**unet),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def scheduler(kind="DPMSolverMultistepScheduler", **options):
    import diffusers

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, kind)(**betas, **options)


def stable_diffusion(kind="DPMSolverMultistepScheduler", pipeline="StableDiffusionPipeline", unet=None, **options):
    """A random StableDiffusionPipeline, or one of its relatives, that makes 32 x 32 images with this scheduler."""
    import diffusers

    parts = _parts(**(unet or {}))
    if "ControlNet" in pipeline:
        from diffusers import ControlNetModel

        parts["controlnet"] = ControlNetModel(**_blocks(), conditioning_embedding_out_channels=(4, 8))
        zeros = [parts["controlnet"].controlnet_cond_embedding.conv_out, *parts["controlnet"].controlnet_down_blocks]
        for block in zeros:  # which would hide the picture
            torch.nn.init.normal_(block.weight, std=0.3)
    return ready(getattr(diffusers, pipeline)(scheduler=scheduler(kind, **options), **parts))


def _t5():
    from tools.shapes.text import encoders, tokenizers

    torch.manual_seed(0)
    clip, t5 = tokenizers()
    return t5, encoders(clip, t5)[1]


def pixart_alpha():
    """PixArt-alpha: DPM-Solver++, a learned variance, and a call without `callback_on_step_end`."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    tokenizer, encoder = _t5()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=128,
        sample_size=16,
        use_additional_conditions=False,
    )
    return ready(PixArtAlphaPipeline(tokenizer, encoder, vae(), transformer, DPMSolverMultistepScheduler()))


def aura_flow():
    """AuraFlow, a flow-matching model."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    tokenizer, encoder = _t5()
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=128,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return ready(AuraFlowPipeline(tokenizer, encoder, vae(), transformer, FlowMatchEulerDiscreteScheduler(shift=1.7)))


def latent_diffusion():
    """Latent Diffusion, whose call encodes the prompt itself."""
    from diffusers import LDMTextToImagePipeline

    tokenizer, encoder = _t5()
    return ready(LDMTextToImagePipeline(vae(), encoder, tokenizer, _unet(), scheduler("DDIMScheduler")))


def wan(kind="FlowMatchEulerDiscreteScheduler", **options):
    """Wan: 9 frames of 32 x 32."""
    import diffusers

    tokenizer, encoder = _t5()
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=128,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    decoder = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.5, 1.0],
    )
    scheduler = getattr(diffusers, kind)(**options)
    return ready(diffusers.WanPipeline(tokenizer, encoder, decoder, scheduler, transformer))


def ltx(timestep_conditioning=False):
    """LTX-Video: 9 frames of 32 x 32; with timestep conditioning its decoder draws noise."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    tokenizer, encoder = _t5()
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=128,
    )
    decoder = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=timestep_conditioning,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return ready(LTXPipeline(FlowMatchEulerDiscreteScheduler(), decoder, encoder, tokenizer, transformer))
