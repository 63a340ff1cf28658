"""Small vision-language models with random weights, saved in the layout in which theirs are published."""

from __future__ import annotations

import json

import torch

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def turn(text, tokens):
    """What the template makes of an image of so many tokens and a text, written down."""
    image = f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>"
    return (
        f"<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n{image}{text}<|im_end|>\n<|im_start|>assistant\n"
    )


def qwen_tokenizer():
    """One token per byte, "Yes" and the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ye", "Yes"]
    model = models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[("Y", "e"), ("Ye", "s")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL,
    )


def qwen_config(kind, tokenizer, vocabulary=None):
    """The sizes of a small model as a transformers config: 2 or 3 layers of 32."""
    from transformers import AutoConfig

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {
        "vocab_size": vocabulary or len(tokenizer) + 5,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": rope,
    }
    tower = {"depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
    vision = {
        "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
        "qwen2_5_vl": tower | {"fullatt_block_indexes": [1], "window_size": 56},
        "qwen3_vl": tower | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    }[kind]
    if kind == "qwen3_vl":
        text |= {"head_dim": 8}
    names = {f"{name}_token_id": f"<|{name}_pad|>" for name in ("image", "video")}
    names |= {f"vision_{side}_token_id": f"<|vision_{side}|>" for side in ("start", "end")}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    return AutoConfig.for_model(kind, text_config=text, vision_config=vision, **ids)


def random_weights(model, seed=0):
    """Weights that matter: norms near 1, biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + values * 0.1 if parameter.ndim < 2 else values / max(1, parameter.shape[-1]) ** 0.5)
    return model.eval()


def make_qwen(kind, seed=0):
    """A small model and its tokenizer."""
    from transformers import AutoModelForImageTextToText

    tokenizer = qwen_tokenizer()
    return random_weights(AutoModelForImageTextToText.from_config(qwen_config(kind, tokenizer)), seed), tokenizer


def preprocessor(kind):
    """What preprocessor_config.json says; small images keep few tokens."""
    patch = 16 if kind == "qwen3_vl" else 14
    half = [0.5] * 3
    means = {"image_mean": half, "image_std": half} if kind == "qwen3_vl" else {}
    size = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 16 * (2 * patch) ** 2}
    limits = (
        {"size": size}
        if kind == "qwen3_vl"
        else {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    )
    return {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, **means, **limits}


def save_qwen(folder, kind, seed=0):
    """A directory as Qwen publishes it: shards, the tokenizer, its chat template apart, a flat config of Qwen2-VL."""
    model, tokenizer = make_qwen(kind, seed)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    config = json.loads((folder / "config.json").read_text())
    if kind == "qwen2_vl":
        config |= config.pop("text_config")
        config |= {"model_type": kind, "rope_theta": config["rope_parameters"].pop("rope_theta")}
        rope = config.pop("rope_parameters")
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor(kind)))
    return model, tokenizer


def published_processor(kind):
    """The library's own image processor with the same settings: PIL, one image at a time."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**preprocessor(kind))


def t5_tokenizer():
    """A few words, each a token, and the end of a text after every one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [
        "Yes",
        "No",
        "a",
        "red",
        "circle",
        "blue",
        "square",
        "USER",
        ":",
        "Does",
        "this",
        "figure",
        "show",
        '"',
        "?",
    ]
    words += ["Please", "answer", "yes", "or", "no", ".", "ASSISTANT", "A", "chat", "between"]
    vocabulary = {word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_flant5(seed=0):
    """CLIP's tower, the projector and T5 of a small CLIP-FlanT5, as transformers' own modules, and its config."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    sizes = {
        "vocab_size": len(t5_tokenizer()) + 4,
        "d_model": 24,
        "d_kv": 6,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    }
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    tower, t5 = CLIPVisionModel(vision), T5ForConditionalGeneration(T5Config(**sizes))
    t5.lm_head.weight = torch.nn.Parameter(torch.empty_like(t5.lm_head.weight))  # FLAN's is its own
    projector = torch.nn.Sequential(torch.nn.Linear(128, 24), torch.nn.GELU(), torch.nn.Linear(24, 24))
    tower, projector, t5 = (random_weights(part, seed + n) for n, part in enumerate((tower, projector, t5)))
    return (
        tower,
        projector,
        t5,
        sizes | {"model_type": "clip_t5", "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
    )


def save_flant5(folder, *, shards=True, seed=0):
    """A directory as CLIP-FlanT5 is published: pickles in two shards (XXL) or in one (XL), bfloat16."""
    tower, projector, t5, config = make_flant5(seed)
    state = {f"vision_tower.vision_tower.vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
    state |= {f"mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    state |= dict(t5.state_dict()) | {"embed_tokens.weight": t5.shared.weight}
    state = {name: tensor.detach().to(torch.bfloat16) for name, tensor in state.items()}
    (folder / "config.json").write_text(json.dumps(config))
    t5_tokenizer().save_pretrained(folder)
    if not shards:
        torch.save(state, folder / "pytorch_model.bin")
        return tower, projector, t5
    names = sorted(state)
    files = {name: f"pytorch_model-{1 + (n > len(names) // 2):05d}-of-00002.bin" for n, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return tower, projector, t5
