"""Published checkpoints, strictly: every key of a file is mapped, or on the list of those that may be dropped.

A layout is recognised by its keys, never by its file name. A file that does not fit is refused by its name, with what
it seems to be instead. Pickles are read with `weights_only`, so that a checkpoint cannot run code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

State = dict[str, Tensor]

WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes that trainers put before every key: DistributedDataParallel, torch.compile, and a reward's own wrapper."""

MARKS = {
    "open_clip": "visual.conv1.weight",
    "transformers CLIP": "vision_model.embeddings.class_embedding",
    "ImageReward": "blip.visual_encoder.cls_token",
    "linear head": "layers.0.weight",
}
"""One key that only this layout has."""

# Buffers that old versions stored, and parts that a reward does not have.
_CLIP_BUFFERS = r"(text_model|vision_model)\.embeddings\.position_ids|attn_mask"
_IMAGEREWARD_UNUSED = r"blip\.(text_encoder\.embeddings\.position_ids|(vision|text)_proj\.(weight|bias))"
_CLIP_FLANT5_UNUSED = r"t5\.embed_tokens\.weight|vision\.embeddings\.position_ids"
_MPS_UNUSED = r"clip\.(text_model|vision_model)\.embeddings\.position_ids|cross\.\d+\.1\.rotary_emb\.inv_freq"
_CLIP_TEXT = r"text_model\..*|text_projection\.weight|logit_scale"


def read_state(path: str | Path) -> State:
    """The tensors in a `.safetensors` file or a pickle, without what trainers wrap around them.

    Raises:
        ValueError: the file is not there, damaged, or holds something other than tensors by name.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        reason = (str(error).strip() or "it ends too early").splitlines()[0]
        raise ValueError(f"weights {path} cannot be read: {reason}") from error
    for wrapper in ("state_dict", "model"):
        while isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} does not hold tensors by name, as a checkpoint does")
    return unwrap({str(name): tensor for name, tensor in state.items()})


def read_shards(folder: Path) -> State:
    """The tensors of a transformers directory: in one file or in shards, safetensors or pickles.

    Raises:
        ValueError: there is none, or a shard is missing or damaged.
    """
    import json

    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_state(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return {key: tensor for file in files for key, tensor in read_state(folder / file).items()}
    raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin, nor shards of one")


def _unpickle(path: Path) -> Any:
    import pickle

    import torch

    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # files of before torch 1.6 cannot be mapped
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is no checkpoint of tensors alone; nothing else is unpickled") from None


def unwrap(state: State) -> State:
    """The same tensors without the prefixes that every key has."""
    while prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def layout_of(state: Mapping[str, Any]) -> str | None:
    """The layout of a checkpoint by its keys; None if it is none of those in MARKS."""
    return next((layout for layout, mark in MARKS.items() if mark in state), None)


def clip_tensors(state: State, *, vision_only: bool = False) -> State:
    """An open_clip or transformers checkpoint under the names of `transformers.CLIPModel`.

    Args:
        state: keys as read.
        vision_only: drop the text tower, for `CLIPVisionModelWithProjection`.
    """
    if layout_of(state) == "open_clip":
        state = dict(pair for name, tensor in state.items() for pair in _from_open_clip(name, tensor))
    drop = re.compile(f"{_CLIP_BUFFERS}|{_CLIP_TEXT}" if vision_only else _CLIP_BUFFERS)
    return {name: tensor for name, tensor in state.items() if not drop.fullmatch(name)}


def imagereward_tensors(state: State) -> State:
    """An ImageReward checkpoint under the names of `ttsnap.rewards.blip.ImageReward`."""
    drop = re.compile(_IMAGEREWARD_UNUSED)
    return {_renamed(name, _IMAGEREWARD): tensor for name, tensor in state.items() if not drop.fullmatch(name)}


def clip_flant5_tensors(state: State) -> State:
    """A CLIP-FlanT5 checkpoint under the names of `ttsnap.rewards.vqascore.ClipFlanT5`."""
    tensors = {_renamed(name, _CLIP_FLANT5): tensor for name, tensor in state.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not re.fullmatch(_CLIP_FLANT5_UNUSED, name)}
    if "t5.shared.weight" in tensors:
        tensors |= {f"t5.{part}.embed_tokens.weight": tensors["t5.shared.weight"] for part in ("encoder", "decoder")}
    return tensors


def qwen2_vl_tensors(state: State) -> State:
    """An HPSv3 checkpoint, of before or after transformers 5, under the names of `ttsnap.rewards.hpsv3.HPSv3`."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("lm_head.")}
    return {_renamed(name, _HPSV3): tensor for name, tensor in kept.items()}


def mps_tensors(state: State) -> State:
    """An MPS checkpoint under the names of `ttsnap.rewards.mps.MPS`."""
    tensors = {_renamed(name, _MPS): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in tensors.items() if not re.fullmatch(_MPS_UNUSED, name)}


def _from_open_clip(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in transformers' layout of one open_clip key; an unknown key stays as it is."""
    if name in ("visual.proj", "text_projection"):
        tensor = tensor.T.contiguous()
    new = _renamed(name, _OPEN_CLIP)
    if "self_attn.in_proj_" not in new:
        yield new, tensor
        return
    for letter, part in zip("qkv", tensor.chunk(3), strict=True):
        yield new.replace("in_proj_", f"{letter}_proj."), part


_OPEN_CLIP = (
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.weight$", "text_model.embeddings.token_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # spelt so
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"(\.layers\.\d+)\.attn\.", r"\1.self_attn."),
    (r"(\.layers\.\d+)\.ln_([12])\.", r"\1.layer_norm\2."),
    (r"(\.layers\.\d+)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
    (r"(\.layers\.\d+)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
)
_IMAGEREWARD = (
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^vision\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"^vision\.blocks\.", "vision.encoder.layers."),
    (r"^(vision\..*)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"^(vision\..*)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision\..*)\.norm([12])\.", r"\1.layer_norm\2."),
)


_MPS = (
    (r"^model\.", "clip."),
    (r"^cross_model\.layers\.(\d+)\.([01])\.fn\.", r"cross.\1.\2."),
)
_HPSV3 = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!visual\.|language_model\.)", "model.language_model."),
    (r"^model\.", "reader.model.model."),
)
_CLIP_FLANT5 = (
    (r"^vision_tower\.vision_tower\.vision_model\.", "vision."),
    (r"^mm_projector\.", "projector."),
    (r"^(?!vision\.|projector\.)", "t5."),
)


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        name = re.sub(old, new, name)
    return name


def load_strictly(module: nn.Module, tensors: State, path: str | Path, what: str, *, as_made: bool = False) -> None:
    """Put tensors into a module; all must fit and none may be left.

    Args:
        module: it may have been made without data (on the meta device).
        tensors: by the module's names.
        path: the file they are from, for messages.
        what: it should be, for messages: `an ImageReward checkpoint`.
        as_made: keep the dtypes of the module (default: all are fp32).

    Raises:
        ValueError: a key is missing or left over, or a shape differs.
    """
    import torch

    expected = module.state_dict()
    check_strictly(expected, tensors, path, what)
    dtypes = {name: expected[name].dtype if as_made else torch.float32 for name in tensors}
    tensors = {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}
    module.load_state_dict(tensors, strict=True, assign=True)
    module.requires_grad_(False)


def check_strictly(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: str | Path, what: str) -> None:
    """Raise ValueError, which names the file, unless names and shapes agree."""
    missing, left = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or left:
        problem = f"it lacks {_some(missing)}" if missing else f"{_some(left)} has no place in it"
        if missing and left:
            problem += f", and {_some(left)} has no place in it"
        raise ValueError(f"{path} is not {what}: {problem}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path} is not {what}: {name} has shape {list(tensor.shape)}, not {list(expected[name].shape)}"
            )


def _some(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def expect_layout(state: Mapping[str, Any], layouts: tuple[str, ...], path: str | Path, what: str) -> None:
    """Raise ValueError, which names the file and what it seems to be, unless it has one of these layouts."""
    found = layout_of(state)
    if found not in layouts:
        seems = f"its keys are those of {found}" if found else f"it holds {_some(sorted(state))}"
        raise ValueError(f"{path} is not {what}: {seems}")


def expect_keys(state: Mapping[str, Any], keys: tuple[str, ...], path: str | Path, what: str) -> None:
    """Raise ValueError, which names the file and the key, unless all of these are there."""
    if missing := [key for key in keys if key not in state]:
        raise ValueError(f"{path} is not {what}: it lacks {_some(missing)}")
