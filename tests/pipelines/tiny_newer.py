"""Tiny random pipelines of families whose tests in diffusers take a tokenizer from a hub; theirs are made here.

Where a pipeline takes a processor that needs torchvision, a stand-in gives its tokenizer's answers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.pipelines.tiny_flow import DYNAMIC, _qwen_sizes, _ready, byte_tokenizer, flow_scheduler, kl_vae, sana
from tests.pipelines.tiny_sd import sdxl

ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}


class Processor:
    """What a pipeline asks of a processor about texts."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, **options):
        return self.tokenizer(text, **options)

    def apply_chat_template(self, messages, tokenize=True, **options):
        messages = messages[0] if isinstance(messages[0], list) else messages
        plain = [
            {"role": one["role"], "content": text if isinstance(text := one["content"], str) else text[0]["text"]}
            for one in messages
        ]
        made = self.tokenizer.apply_chat_template(plain, tokenize=tokenize, **options)
        return [made] if tokenize else made


class DrawingProcessor(Processor):
    """What GLM-Image asks of its processor: tokens of a text, and the grids that its language model is to draw."""

    def apply_chat_template(self, messages, target_h, target_w, **options):
        from transformers import BatchFeature

        made = self.tokenizer([one[0]["content"][-1]["text"] for one in messages], padding=True, return_tensors="pt")
        grids = [[1, target_h // 32, target_w // 32], [1, 2, 2]]  # the picture, and a small one before it
        grids = torch.tensor(grids * len(messages))
        counts = torch.tensor([2] * len(messages))
        return BatchFeature({**made, "image_grid_thw": grids, "images_per_sample": counts})


def sana_sprint():
    """Sana Sprint: two calls, a guidance that is embedded, and a scheduler of its own."""
    from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

    parts = sana().components
    torch.manual_seed(0)
    config = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
    config |= {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    parts |= {"transformer": SanaTransformer2DModel.from_config(config), "scheduler": SCMScheduler()}
    return _ready(SanaSprintPipeline(**parts))


def longcat():
    """LongCat-Image, a FLUX with Qwen2.5-VL."""
    from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    transformer = LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[8, 4, 4],
    )
    config = Qwen2_5_VLConfig(text_config={**_qwen_sizes(16, 2), "rope_parameters": ROPE}, vision_config=VISION)
    text, tokenizer = Qwen2_5_VLForConditionalGeneration(config), byte_tokenizer()
    vae = kl_vae(
        latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.7
    )
    pipe = LongCatImagePipeline(flow_scheduler(**DYNAMIC), vae, text, tokenizer, Processor(tokenizer), transformer)
    pipe.tokenizer_max_length = 48  # of words; each byte is one here
    return _ready(pipe)


def qwen_image_21():
    """Qwen-Image 2.1 with Qwen3-VL and its own autoencoder."""
    from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    vision = VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = {**_qwen_sizes(16, 2), "head_dim": 8, "rope_parameters": ROPE}
    encoder = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))
    return _ready(
        QwenImage21Pipeline(flow_scheduler(**DYNAMIC), vae, encoder, Processor(byte_tokenizer()), transformer)
    )


def hidream():
    """HiDream with two CLIPs, T5 and Llama, and a mixture of experts."""
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel
    from transformers import LlamaConfig, LlamaForCausalLM

    parts = sdxl().components
    from tests.pipelines.tiny_any import _t5

    tokenizer, encoder = _t5()
    torch.manual_seed(0)
    widths = sum(parts[name].config.projection_dim for name in ("text_encoder", "text_encoder_2"))
    clip = [type(parts["text_encoder_2"])(parts[name].config) for name in ("text_encoder", "text_encoder_2")]
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[encoder.config.d_model, 16],
        text_emb_dim=widths,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    llama = LlamaForCausalLM(LlamaConfig(**_qwen_sizes(16, 2)))
    vae = kl_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.7)
    return _ready(
        HiDreamImagePipeline(
            flow_scheduler(shift=3.0),
            vae,
            clip[0],
            parts["tokenizer"],
            clip[1],
            parts["tokenizer_2"],
            encoder,
            tokenizer,
            llama,
            byte_tokenizer(),
            transformer,
        )
    )


def kolors():
    """Kolors, an SDXL with ChatGLM, whose tokenizer is trained on letters here."""
    import sentencepiece
    from diffusers import EulerDiscreteScheduler, KolorsPipeline, UNet2DConditionModel
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    from tests.pipelines.tiny_sd import vae

    folder = Path(tempfile.mkdtemp())
    letters = "abcdefghijklmnopqrstuvwxyz"
    (folder / "text.txt").write_text("\n".join(f"a {one}{two} {two}{one}" for one in letters for two in letters))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        model_type="char",
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=3,
    )
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 16,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=128,
        hidden_size=16,
        ffn_hidden_size=16,
        kv_channels=8,
        num_attention_heads=2,
        seq_length=256,
        multi_query_attention=True,
        add_qkv_bias=True,
        original_rope=True,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.014, "beta_schedule": "scaled_linear"}
    scheduler = EulerDiscreteScheduler(**betas, steps_offset=1, timestep_spacing="leading", num_train_timesteps=1100)
    tokenizer = ChatGLMTokenizer(str(folder / "tokenizer.model"))
    text = ChatGLMModel(config)
    for parameter in text.parameters():  # which it leaves as the memory was
        torch.nn.init.normal_(parameter, std=0.2)
    return _ready(KolorsPipeline(vae(), text, tokenizer, unet, scheduler))


def flux3_klein():
    """FLUX.3 Klein, distilled: a modular pipeline with Qwen3-VL."""
    from diffusers import AutoencoderKLFlux2, Flux3Transformer2DModel
    from diffusers.modular_pipelines.flux3 import Flux3DistilledAutoBlocks
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    transformer = Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8 * 16,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        flow_map=True,
    )
    vae = kl_vae(AutoencoderKLFlux2.__name__)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    vision = VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = {**_qwen_sizes(16, 33), "head_dim": 8, "rope_parameters": ROPE}
    encoder = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))
    blocks = Flux3DistilledAutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")  # a language model that writes a longer prompt
    pipe = blocks.init_pipeline()
    pipe.update_components(
        transformer=transformer,
        vae=vae,
        text_encoder=encoder,
        tokenizer=Processor(byte_tokenizer()),
        scheduler=flow_scheduler(shift=3.0),
    )
    return _ready(pipe)


def glm_image():
    """GLM-Image: a language model draws tokens first, by the global random state that the seed sets."""
    from diffusers import GlmImagePipeline, GlmImageTransformer2DModel
    from transformers import ByT5Tokenizer, GlmImageConfig, GlmImageForConditionalGeneration, T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 300, "num_hidden_layers": 2, "num_key_value_heads": 2, "vision_vocab_size": 128}
    text |= {"max_position_embeddings": 512, "rope_parameters": {"rope_theta": 1e4, "mrope_section": (4, 2, 2)}}
    text |= {"pad_token_id": 0, "eos_token_id": 299}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "image_size": 32, "patch_size": 8, "intermediate_size": 32}
    codes = {"embed_dim": 32, "num_embeddings": 128, "latent_channels": 32}
    config = GlmImageConfig(text_config=text, vision_config=vision, vq_config=codes, image_token_id=290)
    transformer = GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=128,
    )
    four = {"block_out_channels": (4, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4}
    vae = kl_vae(**four, up_block_types=("UpDecoderBlock2D",) * 4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    encoder = T5EncoderModel(T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    drawer, processor = GlmImageForConditionalGeneration(config), DrawingProcessor(byte_tokenizer())
    return _ready(GlmImagePipeline(ByT5Tokenizer(), processor, encoder, drawer, vae, transformer, flow_scheduler()))
