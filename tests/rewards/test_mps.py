"""MPS from a checkpoint in the published layout against a plain forward, and what is heeded of a prompt."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from tests.rewards import reference as ref
from ttsnap import rewards
from ttsnap.rewards import mps, preprocess

EMBED, HEADS = 128, 2
PROMPTS = ["a red circle", "a blue square left of a green triangle", "a red circle"]
IMAGES = torch.rand(3, 3, 40, 56, generator=ref.generator(1))


@pytest.fixture(scope="module")
def tokenizer():
    return ref.clip_tokenizer()


@pytest.fixture(scope="module")
def open_clip(tokenizer):
    """Towers whose features are two heads wide."""
    state = ref.open_clip_state(len(tokenizer))
    state["visual.proj"] = torch.randn(ref.WIDTH, EMBED, generator=ref.generator(2)) * 0.2
    state["token_embedding.weight"] = state["token_embedding.weight"] * 10  # so that words are unlike each other
    state["ln_final.bias"] = torch.zeros(ref.TEXT_WIDTH)
    state["text_projection"] = torch.randn(ref.TEXT_WIDTH, EMBED, generator=ref.generator(3)) * 0.2
    return state


@pytest.fixture(scope="module")
def cross():
    """The names of the authors' module: a norm's bias and rotary frequencies are buffers of it."""
    shapes = {}
    for n in range(4):
        a, b = f"layers.{n}.0.fn.", f"layers.{n}.1.fn."
        shapes |= {
            f"{a}norm.weight": (EMBED,),
            f"{a}to_q.weight": (HEADS * 64, EMBED),
            f"{a}to_kv.weight": (128, EMBED),
            f"{a}to_out.weight": (EMBED, HEADS * 64),
            f"{a}ff.0.weight": (8 * EMBED, EMBED),
            f"{a}ff.2.weight": (EMBED, 4 * EMBED),
            f"{b}norm.weight": (EMBED,),
            f"{b}fused_attn_ff_proj.weight": (HEADS * 64 + 128 + 8 * EMBED, EMBED),
            f"{b}attn_out.weight": (EMBED, HEADS * 64),
            f"{b}ff_out.1.weight": (EMBED, 4 * EMBED),
        }
    state = {name: tensor * (1 if tensor.ndim == 1 else 0.4) for name, tensor in ref.random_state(shapes, 4).items()}
    for n in range(4):
        state |= {f"layers.{n}.{part}.fn.norm.bias": torch.zeros(EMBED) for part in (0, 1)}
        state[f"layers.{n}.1.fn.rotary_emb.inv_freq"] = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    return state


@pytest.fixture
def saved(tmp_path, tokenizer, open_clip, cross):
    config = ref.clip_config(len(tokenizer), tokenizer.eos_token_id)
    for part in (config, config["text_config"], config["vision_config"]):
        part["projection_dim"] = EMBED
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(tmp_path)
    state = {f"model.{name}": tensor for name, tensor in ref.to_transformers(open_clip).items()}
    return state | {f"cross_model.{name}": tensor for name, tensor in cross.items()}


@pytest.fixture
def reward(tmp_path, saved):
    save_file(saved, tmp_path / "MPS_overall_checkpoint_diffsynth.safetensors")
    return rewards.load(f"mps={tmp_path}")["mps"]


def judge(reward, images=IMAGES, prompts=PROMPTS):
    with torch.no_grad():
        return reward(images, prompts, sigma=0.5)


def heads(x):
    return x.reshape(*x.shape[:-1], HEADS, 64).transpose(-3, -2)


def gated(x):
    return F.silu(x[..., x.shape[-1] // 2 :]) * x[..., : x.shape[-1] // 2]


def look_across(state, x, words, mask):
    """The four layers for one image [tokens, width] and the words [words, width] of its prompt."""
    for n in range(4):
        a, b = f"layers.{n}.0.fn.", f"layers.{n}.1.fn."
        y = ref.norm(x, state, f"{a}norm", 1e-5)
        q = heads(y @ state[f"{a}to_q.weight"].T)
        k, v = (words @ state[f"{a}to_kv.weight"].T).chunk(2, dim=-1)
        y1 = ((q @ k.T / 8 + mask).softmax(-1) @ v).transpose(0, 1).flatten(1) @ state[f"{a}to_out.weight"].T
        x = x + y1 + gated(y @ state[f"{a}ff.0.weight"].T) @ state[f"{a}ff.2.weight"].T
        y = ref.norm(x, state, f"{b}norm", 1e-5) @ state[f"{b}fused_attn_ff_proj.weight"].T
        q, k, v, wide = y.split([HEADS * 64, 64, 64, 8 * EMBED], dim=-1)
        turn = torch.exp(1j * torch.arange(len(x))[:, None] * state[f"{b}rotary_emb.inv_freq"])

        def rotated(z, turn=turn):
            z = torch.complex(z[..., :32], z[..., 32:]) * turn
            return torch.cat([z.real, z.imag], dim=-1)

        logits = rotated(heads(q)) @ rotated(k).T / 8
        y = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1) @ state[f"{b}attn_out.weight"].T
        x = x + y + gated(wide) @ state[f"{b}ff_out.1.weight"].T
    return x


def text(state, ids):
    """Projected tokens [length, EMBED] of a text, and that of its end."""
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    hidden = torch.full((ref.LENGTH, ref.LENGTH), -torch.inf).triu(1)
    return (
        ref.norm(ref._run_resblocks(x, state, "", F.gelu, hidden), state, "ln_final", 1e-5)[0]
        @ state["text_projection"]
    )


def expected(open_clip, cross, tokenizer, threshold=0.3, condition=mps.OVERALL):
    def ids(prompt):
        return tokenizer(
            prompt, padding="max_length", truncation=True, max_length=ref.LENGTH, return_tensors="pt"
        ).input_ids

    pixels = preprocess.shortest_crop(IMAGES, ref.SIDE, halves_up=False)
    found, heeded = [], []
    for image, prompt in zip(pixels, PROMPTS, strict=True):
        x = F.conv2d(image[None], open_clip["visual.conv1.weight"], stride=ref.PATCH).flatten(2).transpose(1, 2)
        x = torch.cat([open_clip["visual.class_embedding"].expand(1, 1, -1), x], dim=1)
        x = ref.norm(x + open_clip["visual.positional_embedding"], open_clip, "visual.ln_pre", 1e-5)
        seen = ref._run_resblocks(x, open_clip, "visual.", F.gelu)[0] @ open_clip["visual.proj"]
        words, conditions = text(open_clip, ids(prompt)), text(open_clip, ids(condition))
        fit = torch.stack([max(w @ c for c in conditions) for w in words])
        mask = torch.where(fit / fit.max() > threshold, 0.0, -torch.inf)
        cls = look_across(cross, seen, words, mask)[0]
        end = words[(ids(prompt)[0] == tokenizer.eos_token_id).int().argmax()]
        found.append(20.0 * (cls @ end) / math.sqrt(float((cls @ cls) * (end @ end))))
        heeded.append(int((mask == 0).sum()))
    return torch.stack(found), heeded


@pytest.mark.filterwarnings("ignore:mps reads 16 tokens")
def test_the_formula_on_the_published_layout(reward, open_clip, cross, tokenizer):
    wanted, _ = expected(open_clip, cross, tokenizer)
    found = judge(reward)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert wanted.std() > 0.01
    alone = [judge(reward, IMAGES[n : n + 1], PROMPTS[n : n + 1]) for n in range(3)]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(judge(reward), found)


@pytest.mark.filterwarnings("ignore:mps reads 16 tokens")
def test_another_condition_judges_otherwise(reward, open_clip, cross, tokenizer):
    before = judge(reward)
    reward.condition = "square"
    wanted, heeded = expected(open_clip, cross, tokenizer, condition="square")
    assert min(heeded) < ref.LENGTH
    assert (expected(open_clip, cross, tokenizer, -9, "square")[0] - wanted).abs().max() > 1e-3
    words = torch.stack([reward._read(prompt)[0] for prompt in PROMPTS])
    assert reward.heeded(words).sum(1).tolist() == heeded
    torch.testing.assert_close(judge(reward), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(judge(reward), before)


def test_every_key_is_accounted_for(tmp_path, saved):
    def refused(changed, message):
        file = tmp_path / "mps.safetensors"
        save_file(changed, file)
        with pytest.raises(ValueError, match=message) as caught:
            rewards.load(f"mps={file}")
        assert str(file) in str(caught.value)

    def without(name):
        return {key: tensor for key, tensor in saved.items() if key != name}

    refused(without("cross_model.layers.3.1.fn.attn_out.weight"), r"lacks cross\.3\.1\.attn_out\.weight$")
    refused(without("model.visual_projection.weight"), r"not an MPS checkpoint: it lacks clip\.visual_projection")
    refused(saved | {"cross_model.layers.4.0.fn.to_q.weight": torch.ones(1)}, r"cross\.4\.0\.to_q\.weight has no place")
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "MPS_overall_checkpoint.pth")  # as the authors publish it
    with pytest.raises(ValueError, match="is no checkpoint of tensors alone"):
        rewards.load(f"mps={tmp_path / 'MPS_overall_checkpoint.pth'}")
    with pytest.raises(ValueError, match="not on the Hugging Face hub; get them with `modelscope download"):
        rewards.load("mps")
