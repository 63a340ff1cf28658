"""Tiny pipelines as single files in the layouts that models were first published in: the way back from diffusers' keys.

Written from what the original files hold; diffusers' own conversion, which is what is tested, goes the other way.
"""

from __future__ import annotations

import re

import torch

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
LATENT_VAE = "first_stage_model."
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _renamed(key: str, names: dict[str, str]) -> str:
    """A key with the first of the names that it begins with replaced."""
    for new, old in names.items():
        if key.startswith(new + "."):
            return old + key[len(new) :]
    return key


def unet(model) -> dict[str, torch.Tensor]:
    """Latent diffusion's UNet: blocks numbered through, with their resnet, attention and resampling as 0, 1, 2."""
    per = model.config.layers_per_block + 1
    found = {}
    for key, value in model.state_dict().items():
        if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", key):
            way, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            number = block * per + layer + (way == "down")
            blocks = "input_blocks" if way == "down" else "output_blocks"
            rest = _renamed(rest, RESNET) if kind == "resnets" else rest
            name = f"{blocks}.{number}.{int(kind == 'attentions')}.{rest}"
        elif match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", key):
            name = f"input_blocks.{(int(match[1]) + 1) * per}.0.op.{match[2]}"
        elif match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", key):
            attends = hasattr(model.up_blocks[int(match[1])], "attentions")
            name = f"output_blocks.{int(match[1]) * per + per - 1}.{1 + attends}.conv.{match[2]}"
        elif match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", key):
            resnet = match[1] == "resnets"
            rest = _renamed(match[3], RESNET) if resnet else match[3]
            name = f"middle_block.{2 * int(match[2]) if resnet else 1}.{rest}"
        else:
            name = _renamed(key, UNET)
            assert name != key, key
        found[f"model.diffusion_model.{name}"] = value
    return found


def vae(model, prefix: str) -> dict[str, torch.Tensor]:
    """Latent diffusion's autoencoder: levels counted from the image on both sides, attention as 1 x 1 convolutions."""
    levels = len(model.config.block_out_channels)
    found = {}
    for key, value in model.state_dict().items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
        name = re.sub(r"up\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2", name)
        name = re.sub(r"up\.(\d+)\.upsamplers\.0", r"up.\1.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        if "mid_block.attentions.0." in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out")
            name = re.sub(r"to_([qkv])", r"\1", name)
            value = value[:, :, None, None] if value.ndim == 2 else value
        found[prefix + name] = value
    return found


def clip(model, prefix: str) -> dict[str, torch.Tensor]:
    """OpenAI's CLIP as transformers had it then."""
    states = model.state_dict().items()
    return {f"{prefix}text_model.{key.removeprefix('text_model.')}": value for key, value in states}


def open_clip(model, prefix: str) -> dict[str, torch.Tensor]:
    """OpenCLIP: query, key and value in one matrix, the projection the other way round."""
    states = {key.removeprefix("text_model."): value for key, value in model.state_dict().items()}
    found = {
        "positional_embedding": states.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": states.pop("embeddings.token_embedding.weight"),
        "text_projection": states.pop("text_projection.weight").T,
        "ln_final.weight": states.pop("final_layer_norm.weight"),
        "ln_final.bias": states.pop("final_layer_norm.bias"),
    }
    names = {"layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn"}
    for key in list(states):
        if "k_proj" in key or "v_proj" in key:
            continue
        value, name = states[key], key.replace("encoder.layers.", "transformer.resblocks.")
        if "q_proj" in key:
            value = torch.cat([states[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("q_proj.", "in_proj_")
        for new, old in names.items():
            name = name.replace(new, old)
        found[name] = value
    return {prefix + key: value for key, value in found.items()}


def flux(model, prefix: str = "") -> dict[str, torch.Tensor]:
    """FLUX.1 as Black Forest Labs publish it: query, key and value (and the MLP's input) in one matrix."""
    states = dict(model.state_dict())
    found = {}

    def move(new: str, old: str, *parts: str) -> None:
        for end in ("weight", "bias"):
            if f"{(parts or (new,))[0]}.{end}" in states:
                found[f"{old}.{end}"] = torch.cat([states.pop(f"{part}.{end}") for part in parts or (new,)])

    def norm(new: str, old: str) -> None:
        found[f"{old}.scale"] = states.pop(f"{new}.weight")

    for new, old in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        move(f"time_text_embed.{new}_embedder.linear_1", f"{old}_in.in_layer")
        move(f"time_text_embed.{new}_embedder.linear_2", f"{old}_in.out_layer")
    move("context_embedder", "txt_in")
    move("x_embedder", "img_in")
    move("proj_out", "final_layer.linear")
    for end in ("weight", "bias"):
        scale, shift = states.pop(f"norm_out.linear.{end}").chunk(2)
        found[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
    for i in range(model.config.num_layers):
        new, old = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for ours, theirs, q, added, out, ff in (
            ("norm1", "img", "to_{}", "", "to_out.0", "ff"),
            ("norm1_context", "txt", "add_{}_proj", "added_", "to_add_out", "ff_context"),
        ):
            move(f"{new}.{ours}.linear", f"{old}.{theirs}_mod.lin")
            move("", f"{old}.{theirs}_attn.qkv", *(f"{new}.attn.{q.format(part)}" for part in "qkv"))
            norm(f"{new}.attn.norm_{added}q", f"{old}.{theirs}_attn.norm.query_norm")
            norm(f"{new}.attn.norm_{added}k", f"{old}.{theirs}_attn.norm.key_norm")
            move(f"{new}.attn.{out}", f"{old}.{theirs}_attn.proj")
            move(f"{new}.{ff}.net.0.proj", f"{old}.{theirs}_mlp.0")
            move(f"{new}.{ff}.net.2", f"{old}.{theirs}_mlp.2")
    for i in range(model.config.num_single_layers):
        new, old = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        move(f"{new}.norm.linear", f"{old}.modulation.lin")
        move("", f"{old}.linear1", *(f"{new}.attn.to_{part}" for part in "qkv"), f"{new}.proj_mlp")
        norm(f"{new}.attn.norm_q", f"{old}.norm.query_norm")
        norm(f"{new}.attn.norm_k", f"{old}.norm.key_norm")
        move(f"{new}.proj_out", f"{old}.linear2")
    assert not states, list(states)
    return {prefix + key: value for key, value in found.items()}


def flux2(model) -> dict[str, torch.Tensor]:
    """FLUX.2 as Black Forest Labs publish it."""
    states = dict(model.state_dict())
    found = {}

    def move(old: str, *parts: str, end: str = "weight") -> None:
        found[f"{old}.{end}"] = torch.cat([states.pop(f"{part}.weight") for part in parts])

    move("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1")
    move("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2")
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        move(f"{name}.lin", f"{name}.linear")
    for old, new in (("img_in", "x_embedder"), ("txt_in", "context_embedder"), ("final_layer.linear", "proj_out")):
        move(old, new)
    scale, shift = states.pop("norm_out.linear.weight").chunk(2)
    found["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    for i in range(model.config.num_layers):
        for theirs, q, added, out, ff in (
            ("img", "to_{}", "", "to_out.0", "ff"),
            ("txt", "add_{}_proj", "added_", "to_add_out", "ff_context"),
        ):
            old, new = f"double_blocks.{i}.{theirs}", f"transformer_blocks.{i}"
            move(f"{old}_attn.qkv", *(f"{new}.attn.{q.format(part)}" for part in "qkv"))
            move(f"{old}_attn.norm.query_norm", f"{new}.attn.norm_{added}q", end="scale")
            move(f"{old}_attn.norm.key_norm", f"{new}.attn.norm_{added}k", end="scale")
            move(f"{old}_attn.proj", f"{new}.attn.{out}")
            move(f"{old}_mlp.0", f"{new}.{ff}.linear_in")
            move(f"{old}_mlp.2", f"{new}.{ff}.linear_out")
    for i in range(model.config.num_single_layers):
        old, new = f"single_blocks.{i}", f"single_transformer_blocks.{i}.attn"
        move(f"{old}.linear1", f"{new}.to_qkv_mlp_proj")
        move(f"{old}.linear2", f"{new}.to_out")
        move(f"{old}.norm.query_norm", f"{new}.norm_q", end="scale")
        move(f"{old}.norm.key_norm", f"{new}.norm_k", end="scale")
    assert not states, list(states)
    return found


def z_image(model) -> dict[str, torch.Tensor]:
    """Z-Image as it is repackaged for ComfyUI: query, key and value in one matrix."""
    names = {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder."}
    names |= {".to_out.0.": ".out.", ".norm_k.": ".k_norm.", ".norm_q.": ".q_norm."}
    states, found = dict(model.state_dict()), {}
    for key in [key for key in states if ".to_q." in key]:
        parts = [states.pop(key.replace(".to_q.", f".to_{part}.")) for part in "qkv"]
        found[key.replace(".to_q.", ".qkv.")] = torch.cat(parts)
    for key, value in states.items():
        name = key
        for new, old in names.items():
            name = name.replace(new, old)
        found[name] = value
    return {f"model.diffusion_model.{key}": value for key, value in found.items()}


def stable_diffusion(pipe) -> dict[str, torch.Tensor]:
    """Stable Diffusion 1.x."""
    text = clip(pipe.text_encoder, "cond_stage_model.transformer.")
    return unet(pipe.unet) | vae(pipe.vae, LATENT_VAE) | text


def sdxl(pipe) -> dict[str, torch.Tensor]:
    """SDXL."""
    text = clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
    text |= open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    return unet(pipe.unet) | vae(pipe.vae, LATENT_VAE) | text


SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def sd3_transformer(model) -> dict[str, torch.Tensor]:
    """Stable Diffusion 3: query, key and value in one matrix, and the last norms' shift before their scale."""
    found, states, last = {}, dict(model.state_dict()), model.config.num_layers - 1
    for i in range(model.config.num_layers):
        for block, name in (("x_block", "attn.to_{}"), ("context_block", "attn.add_{}_proj")):
            for end in ("weight", "bias"):
                parts = [states.pop(f"transformer_blocks.{i}.{name.format(part)}.{end}") for part in "qkv"]
                found[f"joint_blocks.{i}.{block}.attn.qkv.{end}"] = torch.cat(parts)
    for key, value in states.items():
        if match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", key):
            name = f"joint_blocks.{match[1]}.{_renamed(match[2], SD3_BLOCK)}"
        else:
            name = SD3.get(key) or _renamed(key, SD3)
        if key.startswith(("norm_out.", f"transformer_blocks.{last}.norm1_context.")):
            value = torch.cat(value.chunk(2)[::-1])
        found[name] = value
    return {"model.diffusion_model." + key: value for key, value in found.items()}


def sd3(pipe) -> dict[str, torch.Tensor]:
    """Stable Diffusion 3 as it was first published: transformer and VAE, without text encoders."""
    return sd3_transformer(pipe.transformer) | vae(pipe.vae, LATENT_VAE)


def sd3_with_encoders(pipe) -> dict[str, torch.Tensor]:
    """The same with CLIP-L, CLIP-G and T5, as in `sd3_medium_incl_clips_t5xxlfp8`; CLIP-L has no projection there."""
    parts = {"clip_l": pipe.text_encoder, "clip_g": pipe.text_encoder_2, "t5xxl": pipe.text_encoder_3}
    found = sd3(pipe)
    for name, part in parts.items():
        for key, value in part.state_dict().items():
            if (name, key) != ("clip_l", "text_projection.weight"):
                found[f"text_encoders.{name}.transformer.{key}"] = value
    return found
