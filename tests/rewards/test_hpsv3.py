"""HPSv3 from a small checkpoint in the published layout against a plain forward written apart from it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from tests.rewards import reference as ref
from tests.rewards import vision_models as small
from ttsnap import rewards
from ttsnap.pipelines.counting import Unmultiplied, count_tflop
from ttsnap.pipelines.flops import count_look
from ttsnap.rewards import hpsv3
from ttsnap.rewards.trainable import adapt, save_memory

PROMPTS = ["a red circle", "a blue square {left} of a green triangle", "a red circle"]
SIZES = ((512, 512), (300, 460), (448, 448))  # height, width; the last is not resized
IMAGES = (torch.rand(3, 3, 60, 84, generator=ref.generator(1)) * 255).round() / 255
COLLATOR = '''
import a_package_that_is_not_there
INSTRUCTION = """
Judge this.
Prompt - {text_prompt}

"""
INSTRUCTION_debug = "{text_prompt}"
prompt_with_special_token = """
The rating: <|Reward|>
END
"""
raise SystemExit
'''
WIDTH, HEADS, GROUPS, TOWER_HEADS = 32, 4, 2, 4


@pytest.fixture(autouse=True)
def instruction(tmp_path, monkeypatch):
    file = tmp_path / "collator.py"
    file.write_text(COLLATOR)
    monkeypatch.setenv("TTSNAP_HPSV3_PROMPT", str(file))
    monkeypatch.setattr(hpsv3, "PIXELS", 12 * 28 * 28)  # as 200,704 are too many for a test
    return file


@pytest.fixture(scope="module")
def model():
    return small.make_qwen("qwen2_vl")


@pytest.fixture(scope="module")
def state(model):
    """The published names: `visual.`, `model.`, `lm_head.`, `rm_head.`; one word more than the tokenizer has."""
    network, tokenizer = model
    old = {}
    for name, tensor in network.state_dict().items():
        name = name.removeprefix("model.")
        if name.startswith("language_model."):
            name = name.replace("language_model.", "model.")
        if "embed_tokens" in name or "lm_head" in name:
            tensor = tensor[: len(tokenizer) + 1]
        old[name] = tensor.clone()
    sizes = {0: (1024, WIDTH), 3: (16, 1024), 5: (2, 16)}
    head = {f"rm_head.{n}.weight": size for n, size in sizes.items()}
    head |= {f"rm_head.{n}.bias": size[:1] for n, size in sizes.items()}
    return old | ref.random_state(head)


def save(folder, state, model):
    config = json.loads(model[0].config.to_json_string())
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = small.qwen_tokenizer()
    tokenizer.chat_template = small.TEMPLATE
    tokenizer.save_pretrained(folder)
    save_file(state, folder / "HPSv3.safetensors")
    return folder / "HPSv3.safetensors"


# --- a plain forward -------------------------------------------------------------------------------------------------


def rms(x, weight, eps):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def turned(x, angles):
    """Pairs (i, i + half) of the last axis rotated by angles [..., half]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def heads(x, count):
    return x.reshape(*x.shape[:-1], count, -1).transpose(-3, -2)


def tower(state, patches, down, across):
    """Image tokens [patches / 4, width]: a transformer that sees the whole image, positions by row and column."""
    v = "visual."
    x = patches @ state[f"{v}patch_embed.proj.weight"].flatten(1).T
    blocks = [(r, c) for r in range(0, down, 2) for c in range(0, across, 2)]  # four patches of a token lie together
    places = torch.tensor([(r + i, c + j) for r, c in blocks for i in (0, 1) for j in (0, 1)])
    size = x.shape[-1] // TOWER_HEADS
    inverse = 10000.0 ** -(torch.arange(0, size // 2, 2) / (size // 2))
    angles = torch.cat([places[:, :1] * inverse, places[:, 1:] * inverse], dim=-1)
    for n in range(2):
        block = f"{v}blocks.{n}."
        y = ref.norm(x, state, f"{block}norm1", 1e-6)
        q, k, value = (
            heads(part, TOWER_HEADS) for part in F.linear(y, *ref.pair(state, f"{block}attn.qkv")).chunk(3, -1)
        )
        logits = turned(q, angles) @ turned(k, angles).transpose(-1, -2) / math.sqrt(size)
        y = (logits.softmax(-1) @ value).transpose(0, 1).flatten(1)
        x = x + F.linear(y, *ref.pair(state, f"{block}attn.proj"))
        y = F.linear(ref.norm(x, state, f"{block}norm2", 1e-6), *ref.pair(state, f"{block}mlp.fc1"))
        x = x + F.linear(ref.quick_gelu(y), *ref.pair(state, f"{block}mlp.fc2"))
    x = ref.norm(x, state, f"{v}merger.ln_q", 1e-6).reshape(len(x) // 4, -1)
    return F.linear(F.gelu(F.linear(x, *ref.pair(state, f"{v}merger.mlp.0"))), *ref.pair(state, f"{v}merger.mlp.2"))


def language(state, x, eps, theta=1e4):
    """Last hidden states of a row [length, width]; positions count 0, 1, 2 ... through the image, too."""
    length, size = len(x), WIDTH // HEADS
    angles = torch.arange(length)[:, None] * theta ** -(torch.arange(0, size, 2) / size)
    hidden = torch.full((length, length), -torch.inf).triu(1)
    for n in range(2):
        layer = f"model.layers.{n}."
        y = rms(x, state[f"{layer}input_layernorm.weight"], eps)
        q = heads(F.linear(y, *ref.pair(state, f"{layer}self_attn.q_proj")), HEADS)
        k, v = (heads(F.linear(y, *ref.pair(state, f"{layer}self_attn.{part}_proj")), GROUPS) for part in "kv")
        k, v = (part.repeat_interleave(HEADS // GROUPS, dim=0) for part in (turned(k, angles), v))
        logits = turned(q, angles) @ k.transpose(-1, -2) / math.sqrt(size) + hidden
        x = x + (logits.softmax(-1) @ v).transpose(0, 1).flatten(1) @ state[f"{layer}self_attn.o_proj.weight"].T
        y = rms(x, state[f"{layer}post_attention_layernorm.weight"], eps)
        gate, up = (y @ state[f"{layer}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ state[f"{layer}mlp.down_proj.weight"].T
    return rms(x, state["model.norm.weight"], eps)


def expected(state, model, image, prompt):
    """[mu, sigma] of one image."""
    network, tokenizer = model[0], small.qwen_tokenizer()
    size = {"shortest_edge": hpsv3.PIXELS, "longest_edge": hpsv3.PIXELS}
    picture = Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype("uint8"))
    seen = small.published_processor("qwen2_vl")(images=[picture], size=size, return_tensors="pt")
    _, down, across = seen["image_grid_thw"][0].tolist()
    tokens = down * across // 4
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    text = "\nJudge this.\nPrompt - " + prompt + "\n\n\nThe rating: <|Reward|>\nEND\n"
    ids = torch.tensor(tokenizer(small.turn(text, tokens)).input_ids)
    words = state["model.embed_tokens.weight"][ids]
    words[ids == network.config.image_token_id] = tower(state, seen["pixel_values"], down, across)
    hidden = language(state, words, network.config.text_config.rms_norm_eps)
    x = hidden[ids.tolist().index(len(tokenizer) - 1)]
    for n in (0, 3, 5):
        x = F.linear(x, *ref.pair(state, f"rm_head.{n}"))
        x = x if n == 5 else x.relu()
    return x[0], x[1].exp()


def judge(reward, images=IMAGES, prompts=PROMPTS):
    with torch.no_grad():
        return reward(images, prompts, sigma=0.5)


def test_mean_and_sigma_of_the_published_layout(tmp_path, state, model):
    save(tmp_path, state, model)
    reward = hpsv3.load_hpsv3("cpu", str(tmp_path), torch.float32)
    assert reward.sigma is None
    found = judge(reward)
    mu, sigma = (
        torch.stack(each)
        for each in zip(*(expected(state, model, *p) for p in zip(IMAGES, PROMPTS, strict=True)), strict=True)
    )
    torch.testing.assert_close(found, mu, rtol=5e-3, atol=5e-4)
    torch.testing.assert_close(reward.sigma, sigma, rtol=5e-3, atol=0)
    assert mu.std() > 0.05
    alone = [judge(reward, IMAGES[n : n + 1], PROMPTS[n : n + 1]) for n in range(3)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)
    # Qwen's own positions load as well and are wrong.
    inputs = reward.reader.inputs(IMAGES[:1], [reward.instruction.about(PROMPTS[0])])
    with torch.no_grad():
        by_rows = reward.rm_head(reward.reader.hidden(inputs))[inputs["input_ids"] == reward.token][0, 0]
    assert abs(float(by_rows - mu[0])) > 10 * float((found - mu).abs().max())


def test_its_look_is_counted_on_a_copy_that_computes_no_product(tmp_path, state, model):
    save(tmp_path, state, model)
    reward = hpsv3.load_hpsv3("cpu", str(tmp_path), torch.float32)
    exact = judge(reward, IMAGES[:1], PROMPTS[:1])
    reward.sigma = None
    counted = count_look(reward, "cpu", 60, 84, PROMPTS[0])
    assert reward.sigma is None
    assert torch.equal(judge(reward, IMAGES[:1], PROMPTS[:1]), exact)
    assert counted.text == 0
    # The prompt with which it is counted has some more tokens.
    short, long = (count_tflop(lambda p=p: judge(reward, IMAGES[:1], [p])) for p in (PROMPTS[0], PROMPTS[0] + " 1234"))
    assert short < counted.look < 1.05 * long
    with Unmultiplied():
        zeros = reward.rm_head[0](torch.ones(1, WIDTH))
    assert not zeros.any()


def test_weights_are_bfloat16_and_the_head_is_not(tmp_path, state, model):
    save(tmp_path, state | {"rm_head.5.bias": torch.tensor([1 / 3, 0.0])}, model)
    (reward,) = rewards.load(f"hpsv3={tmp_path}").values()
    assert {p.dtype for p in reward.reader.parameters()} == {torch.bfloat16}
    assert reward.rm_head[5].bias[0] == torch.tensor(1 / 3)
    assert judge(reward).dtype == torch.float32
    exact = judge(hpsv3.load_hpsv3("cpu", str(tmp_path), torch.float32))
    torch.testing.assert_close(judge(reward), exact, rtol=0.05, atol=0.05)


def test_adapters_learn_with_checkpointing_or_without(tmp_path, state, model):
    pytest.importorskip("peft")
    save(tmp_path, state, model)
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        reward = hpsv3.load_hpsv3("cpu", str(tmp_path), torch.float32)
        before = judge(reward)
        trained = adapt(reward, "lora", 2, 4.0)
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert not any("visual" in name for name in trained)
        if checkpointing:
            save_memory(reward)
        torch.testing.assert_close(judge(reward), before)
        reward.train()
        reward.rm_head[2].p = 0.0  # dropout
        adam = torch.optim.AdamW(trained.values(), lr=1e-2)
        for _ in range(6):
            loss = (reward(IMAGES, PROMPTS, sigma=0.5) - before - 1).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        assert all(parameter.grad is not None for parameter in trained.values())
        found.append(loss.item())
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] < 0.8  # 1 at first


def test_full_training_is_in_full_precision(tmp_path, state, model):
    save(tmp_path, state, model)
    reward = hpsv3.load_hpsv3("cpu", str(tmp_path))
    trained = adapt(reward, "full", 1, 1.0)
    assert {p.dtype for p in reward.parameters()} == {torch.float32}
    reward(IMAGES, PROMPTS, sigma=0.5).sum().backward()
    assert all(parameter.grad is not None for parameter in trained.values())


def test_every_key_is_accounted_for_in_both_layouts(tmp_path, state, model):
    def refused(saved, message):
        file = save(tmp_path, saved, model)
        with pytest.raises(ValueError, match=message) as caught:
            rewards.load(f"hpsv3={file}")
        assert str(file) in str(caught.value)

    def without(name):
        return {key: value for key, value in state.items() if key != name}

    new = {name.replace("visual.", "model.visual.", 1) if name.startswith("visual.") else
           name.replace("model.", "model.language_model.", 1): tensor for name, tensor in state.items()}  # fmt: skip
    save(tmp_path, new, model)
    assert rewards.load(f"hpsv3={tmp_path}")
    refused(without("rm_head.0.weight"), "lacks rm_head.0.weight$")
    refused(without("visual.merger.mlp.2.bias"), "lacks reader.model.model.visual.merger.mlp.2.bias$")
    refused(state | {"model.x": torch.ones(1)}, "language_model.x has no place in it")
    refused(state | {"rm_head.5.weight": torch.ones(4, 16)}, r"has shape \[4, 16\], not \[2, 16\]")
    short = {name: tensor[:-1] if "embed_tokens" in name else tensor for name, tensor in state.items()}
    refused(short, r"no place for <\|Reward\|>")
    refused({"blip.visual_encoder.cls_token": torch.ones(1)}, "is not an HPSv3 checkpoint: it lacks reader.model")


def test_the_instruction_is_read_and_not_run(tmp_path, instruction, monkeypatch):
    found = hpsv3.find_instruction()
    assert found.about("x {y}") == "\nJudge this.\nPrompt - x {y}\n\n\nThe rating: <|Reward|>\nEND\n"
    instruction.write_text("INSTRUCTION = 'no place for a prompt'")
    with pytest.raises(ValueError, match=r"does not hold the instruction .* INSTRUCTION with \{text_prompt\}"):
        hpsv3.find_instruction()
    instruction.unlink()
    with pytest.raises(ValueError, match="cannot be read from"):
        hpsv3.find_instruction()
    monkeypatch.delenv("TTSNAP_HPSV3_PROMPT")
    with pytest.raises(ValueError, match="pip install --no-deps hpsv3"):
        hpsv3.find_instruction()
    (tmp_path / "hpsv3" / "dataset").mkdir(parents=True)
    (tmp_path / "hpsv3" / "__init__.py").write_text("raise SystemExit")
    (tmp_path / "hpsv3" / "dataset" / "data_collator_qwen.py").write_text(COLLATOR)
    monkeypatch.syspath_prepend(tmp_path)
    assert hpsv3.find_instruction() == found


@pytest.mark.slow
def test_the_authors_own_class_says_the_same(tmp_path, monkeypatch):
    """The wheel's class, resizing and instruction, with the libraries of its day, in a process of their own."""
    old, work = tmp_path / "old", tmp_path / "work"
    work.mkdir()
    packages = ["transformers==4.45.2", "tokenizers==0.20.3", "huggingface_hub==0.26.5", "hpsv3==1.0.0"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(old), *packages]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip("the original packages cannot be installed")
    tokenizer = small.qwen_tokenizer()
    tokenizer.chat_template = small.TEMPLATE
    tokenizer.save_pretrained(work)
    config = json.loads(small.qwen_config("qwen2_vl", tokenizer).to_json_string())
    text = config.pop("text_config")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": text.pop("rope_parameters")["mrope_section"]}
    config |= text | {"rope_theta": 1e4, "model_type": "qwen2_vl", "torch_dtype": "float32"}
    config = {name: value for name, value in config.items() if name not in ("dtype", "layer_types")}
    (work / "config.json").write_text(json.dumps(config))
    images = [(torch.rand(3, *size, generator=ref.generator(n)) * 255).round() / 255 for n, size in enumerate(SIZES)]
    cases = []
    for n, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
        Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype("uint8")).save(work / f"{n}.png")
        turn = small.turn("TEXT", 1).replace("<|image_pad|>", "IMAGE")
        cases.append({"image": f"{n}.png", "prompt": prompt.replace("{left}", "left"), "turn": turn})
    (work / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).parent / "originals" / "by_hpsv3.py"
    ran = subprocess.run(
        [sys.executable, str(script), str(work)],
        env=os.environ | {"PYTHONPATH": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    monkeypatch.setattr(hpsv3, "PIXELS", 256 * 28 * 28)
    monkeypatch.setenv("TTSNAP_HPSV3_PROMPT", str(old / hpsv3.FILE))
    reward = hpsv3.load_hpsv3("cpu", str(work), torch.float32)
    found = []
    for image, case in zip(images, cases, strict=True):
        mu = judge(reward, image[None], [case["prompt"]])
        found.append([float(mu), float(reward.sigma.log())])
    wanted = json.loads((work / "found.json").read_text())
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.ptp([mu for mu, _ in wanted]) > 1e-3
    print(wanted, np.abs(np.subtract(found, wanted)).max())
