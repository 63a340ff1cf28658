"""Random checkpoints in the published layouts, and plain forwards to compare with.

Written from the papers' architectures alone: they share nothing with the code under test, neither names nor classes.
"""

from __future__ import annotations

import json
import math

import torch
from torch.nn import functional as F

SIDE, PATCH, LENGTH = 28, 14, 16
WIDTH, TEXT_WIDTH, EMBED, HEADS, LAYERS = 48, 32, 24, 4, 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_state(shapes, seed=0):
    """Tensors of these shapes: norms near 1, the others small but large enough to matter."""
    g = generator(seed)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=g) * 0.2
        state[name] = values + 1 if len(shape) == 1 and name.endswith("weight") else values
    return state


# --- open_clip -------------------------------------------------------------------------------------------------------


def _resblocks(prefix, width):
    shapes = {}
    for n in range(LAYERS):
        block = f"{prefix}transformer.resblocks.{n}."
        shapes |= {
            f"{block}ln_1.weight": (width,),
            f"{block}ln_1.bias": (width,),
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
            f"{block}attn.out_proj.weight": (width, width),
            f"{block}attn.out_proj.bias": (width,),
            f"{block}ln_2.weight": (width,),
            f"{block}ln_2.bias": (width,),
            f"{block}mlp.c_fc.weight": (4 * width, width),
            f"{block}mlp.c_fc.bias": (4 * width,),
            f"{block}mlp.c_proj.weight": (width, 4 * width),
            f"{block}mlp.c_proj.bias": (width,),
        }
    return shapes


def open_clip_state(vocabulary, seed=0):
    """A checkpoint of open_clip's CLIP with both towers."""
    shapes = {
        "positional_embedding": (LENGTH, TEXT_WIDTH),
        "text_projection": (TEXT_WIDTH, EMBED),
        "logit_scale": (),
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": ((SIDE // PATCH) ** 2 + 1, WIDTH),
        "visual.proj": (WIDTH, EMBED),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "visual.ln_pre.weight": (WIDTH,),
        "visual.ln_pre.bias": (WIDTH,),
        **_resblocks("visual.", WIDTH),
        "visual.ln_post.weight": (WIDTH,),
        "visual.ln_post.bias": (WIDTH,),
        **_resblocks("", TEXT_WIDTH),
        "token_embedding.weight": (vocabulary, TEXT_WIDTH),
        "ln_final.weight": (TEXT_WIDTH,),
        "ln_final.bias": (TEXT_WIDTH,),
    }
    state = random_state(shapes, seed)
    state["logit_scale"] = torch.tensor(math.log(20.0))
    return state


def clip_config(vocabulary, end, act="gelu"):
    """The same sizes as a transformers config."""
    shared = {"num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "hidden_act": act, "projection_dim": EMBED}
    return {
        "projection_dim": EMBED,
        "text_config": {
            **shared,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 4 * TEXT_WIDTH,
            "vocab_size": vocabulary,
            "max_position_embeddings": LENGTH,
            "eos_token_id": end,
        },
        "vision_config": {
            **shared,
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
    }


def attend(x, context, q, k, v, heads, mask=None):
    """Multi-head attention with projections (weight, bias); mask is added to the logits."""

    def split(y, projection):
        y = F.linear(y, *projection)
        return y.reshape(*y.shape[:2], heads, -1).permute(0, 2, 1, 3)

    q, k, v = split(x, q), split(context, k), split(context, v)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits + mask
    return (logits.softmax(-1) @ v).permute(0, 2, 1, 3).flatten(2)


def norm(x, state, name, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def pair(state, name):
    return state[f"{name}.weight"], state[f"{name}.bias"]


def _run_resblocks(x, state, prefix, act, mask=None):
    for n in range(LAYERS):
        block = f"{prefix}transformer.resblocks.{n}"
        y = norm(x, state, f"{block}.ln_1", 1e-5)
        weights = state[f"{block}.attn.in_proj_weight"].chunk(3)
        biases = state[f"{block}.attn.in_proj_bias"].chunk(3)
        y = attend(y, y, *zip(weights, biases, strict=True), HEADS, mask)
        x = x + F.linear(y, *pair(state, f"{block}.attn.out_proj"))
        y = norm(x, state, f"{block}.ln_2", 1e-5)
        y = act(F.linear(y, *pair(state, f"{block}.mlp.c_fc")))
        x = x + F.linear(y, *pair(state, f"{block}.mlp.c_proj"))
    return x


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def open_clip_image(state, pixels, act=F.gelu):
    """Image features [n, EMBED], not normalised."""
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = norm(x + state["visual.positional_embedding"], state, "visual.ln_pre", 1e-5)
    x = _run_resblocks(x, state, "visual.", act)
    return norm(x[:, 0], state, "visual.ln_post", 1e-5) @ state["visual.proj"]


def open_clip_text(state, ids, end, act=F.gelu):
    """Text features [n, EMBED], not normalised, read at the first end-of-text token."""
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
    x = norm(_run_resblocks(x, state, "", act, mask), state, "ln_final", 1e-5)
    where = (ids == end).int().argmax(-1)
    return x[torch.arange(len(ids)), where] @ state["text_projection"]


def to_transformers(state):
    """An open_clip checkpoint as `transformers.CLIPModel` stores it, written down name by name."""
    new = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.final_layer_norm.weight": state["ln_final.weight"],
        "text_model.final_layer_norm.bias": state["ln_final.bias"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
    }
    for kind in ("weight", "bias"):
        new[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        new[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
        for tower, prefix in (("text", ""), ("vision", "visual.")):
            for n in range(LAYERS):
                old, place = f"{prefix}transformer.resblocks.{n}.", f"{tower}_model.encoder.layers.{n}."
                q, k, v = state[f"{old}attn.in_proj_{kind}"].chunk(3)
                new[f"{place}self_attn.q_proj.{kind}"] = q
                new[f"{place}self_attn.k_proj.{kind}"] = k
                new[f"{place}self_attn.v_proj.{kind}"] = v
                new[f"{place}self_attn.out_proj.{kind}"] = state[f"{old}attn.out_proj.{kind}"]
                new[f"{place}layer_norm1.{kind}"] = state[f"{old}ln_1.{kind}"]
                new[f"{place}layer_norm2.{kind}"] = state[f"{old}ln_2.{kind}"]
                new[f"{place}mlp.fc1.{kind}"] = state[f"{old}mlp.c_fc.{kind}"]
                new[f"{place}mlp.fc2.{kind}"] = state[f"{old}mlp.c_proj.{kind}"]
    return {name: tensor.contiguous() for name, tensor in new.items()}


def head_state(width, seed=0):
    """The layers of ImageReward's and the aesthetic predictor's head."""
    sizes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    shapes = {f"layers.{n}.weight": size for n, size in sizes.items()}
    return random_state(shapes | {f"layers.{n}.bias": size[:1] for n, size in sizes.items()}, seed)


def run_head(state, x, prefix=""):
    for n in (0, 2, 4, 6, 7):
        x = F.linear(x, *pair(state, f"{prefix}layers.{n}"))
    return x[:, 0]


# --- ImageReward -----------------------------------------------------------------------------------------------------

BLIP_SIDE, BLIP_PATCH, BLIP_WIDTH, BLIP_TEXT, BLIP_HEADS, BLIP_TEXT_HEADS = 32, 16, 48, 36, 4, 3


def imagereward_config(vocabulary):
    """The sizes of a small ImageReward."""
    from ttsnap.rewards.blip import SIZES

    return {
        "vision_config": SIZES["vision_config"]
        | {
            "hidden_size": BLIP_WIDTH,
            "intermediate_size": 4 * BLIP_WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": BLIP_HEADS,
            "image_size": BLIP_SIDE,
            "patch_size": BLIP_PATCH,
        },
        "text_config": SIZES["text_config"]
        | {
            "vocab_size": vocabulary,
            "hidden_size": BLIP_TEXT,
            "intermediate_size": 4 * BLIP_TEXT,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": BLIP_TEXT_HEADS,
            "encoder_hidden_size": BLIP_WIDTH,
            "max_position_embeddings": 40,
        },
    }


def imagereward_state(vocabulary, seed=0):
    """A checkpoint of the original ImageReward, with the parts that scoring does not use."""
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    w, d = BLIP_WIDTH, BLIP_TEXT
    shapes = {
        f"{v}cls_token": (1, 1, w),
        f"{v}pos_embed": (1, (BLIP_SIDE // BLIP_PATCH) ** 2 + 1, w),
        f"{v}patch_embed.proj.weight": (w, 3, BLIP_PATCH, BLIP_PATCH),
        f"{v}patch_embed.proj.bias": (w,),
        f"{v}norm.weight": (w,),
        f"{v}norm.bias": (w,),
        f"{t}embeddings.word_embeddings.weight": (vocabulary, d),
        f"{t}embeddings.position_embeddings.weight": (40, d),
        f"{t}embeddings.LayerNorm.weight": (d,),
        f"{t}embeddings.LayerNorm.bias": (d,),
        "blip.vision_proj.weight": (8, w),
        "blip.vision_proj.bias": (8,),
        "blip.text_proj.weight": (8, d),
        "blip.text_proj.bias": (8,),
    }

    def linear(name, outputs, inputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def layer_norm(name, width):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    for n in range(LAYERS):
        block = f"{v}blocks.{n}."
        layer_norm(f"{block}norm1", w)
        linear(f"{block}attn.qkv", 3 * w, w)
        linear(f"{block}attn.proj", w, w)
        layer_norm(f"{block}norm2", w)
        linear(f"{block}mlp.fc1", 4 * w, w)
        linear(f"{block}mlp.fc2", w, 4 * w)
        block = f"{t}encoder.layer.{n}."
        for kind, source in (("attention", d), ("crossattention", w)):
            linear(f"{block}{kind}.self.query", d, d)
            linear(f"{block}{kind}.self.key", d, source)
            linear(f"{block}{kind}.self.value", d, source)
            linear(f"{block}{kind}.output.dense", d, d)
            layer_norm(f"{block}{kind}.output.LayerNorm", d)
        linear(f"{block}intermediate.dense", 4 * d, d)
        linear(f"{block}output.dense", d, 4 * d)
        layer_norm(f"{block}output.LayerNorm", d)
    state = random_state(shapes, seed)
    head = {f"mlp.{name}": tensor for name, tensor in head_state(d, seed).items()}
    return state | head | {f"{t}embeddings.position_ids": torch.arange(40)[None]}


def run_imagereward(state, pixels, ids, mask, *, text_heads=BLIP_TEXT_HEADS, eps=1e-6):
    """Raw rewards [n]: fused q, k, v; pre-norm image tower; post-norm text tower that sees both ways; position 0."""
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    x = F.conv2d(pixels, *pair(state, f"{v}patch_embed.proj"), stride=BLIP_PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{v}cls_token"].expand(len(x), -1, -1), x], dim=1) + state[f"{v}pos_embed"]
    for n in range(LAYERS):
        block = f"{v}blocks.{n}"
        y = norm(x, state, f"{block}.norm1", eps)
        parts = zip(*(part.chunk(3) for part in pair(state, f"{block}.attn.qkv")), strict=True)
        x = x + F.linear(attend(y, y, *parts, BLIP_HEADS), *pair(state, f"{block}.attn.proj"))
        y = F.gelu(F.linear(norm(x, state, f"{block}.norm2", eps), *pair(state, f"{block}.mlp.fc1")))
        x = x + F.linear(y, *pair(state, f"{block}.mlp.fc2"))
    patches = norm(x, state, f"{v}norm", eps)
    x = state[f"{t}embeddings.word_embeddings.weight"][ids]
    x = x + state[f"{t}embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x, state, f"{t}embeddings.LayerNorm", 1e-12)
    hidden = (1 - mask[:, None, None, :].float()) * -1e9
    for n in range(LAYERS):
        block = f"{t}encoder.layer.{n}"
        for kind, context, hide in (("attention", None, hidden), ("crossattention", patches, None)):
            names = (f"{block}.{kind}.self.{part}" for part in ("query", "key", "value"))
            y = attend(x, x if context is None else context, *(pair(state, name) for name in names), text_heads, hide)
            y = F.linear(y, *pair(state, f"{block}.{kind}.output.dense"))
            x = norm(x + y, state, f"{block}.{kind}.output.LayerNorm", 1e-12)
        y = F.gelu(F.linear(x, *pair(state, f"{block}.intermediate.dense")))
        x = norm(x + F.linear(y, *pair(state, f"{block}.output.dense")), state, f"{block}.output.LayerNorm", 1e-12)
    return run_head(state, x[:, 0], "mlp.")


# --- files -----------------------------------------------------------------------------------------------------------


def clip_tokenizer():
    """A small CLIP tokenizer: the embedded model's."""
    from transformers import CLIPTokenizer

    from ttsnap.shapes.reward import WEIGHTS

    return CLIPTokenizer.from_pretrained(WEIGHTS.parent / "pipeline" / "tokenizer")


def save_clip(folder, name, state, wrap=None, act="gelu"):
    """A checkpoint file with its config and tokenizer beside it; returns the file."""
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(clip_config(len(tokenizer), tokenizer.eos_token_id, act)))
    return save(folder / name, wrap(state) if wrap else state)


def bert_tokenizer():
    """A small BERT tokenizer."""
    from transformers import BertTokenizer

    words = ["a", "red", "green", "blue", "circle", "square", "triangle", "left", "of", "##s"]
    return BertTokenizer(
        vocab={word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    )


def save_imagereward(folder, name, state):
    """A checkpoint file with its config and tokenizer beside it; returns the file."""
    tokenizer = bert_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(imagereward_config(len(tokenizer))))
    return save(folder / name, state)


def save(path, state):
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
    return path
