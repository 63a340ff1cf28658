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


def save(path, state):
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
    return path
