"""CLIP rewards from checkpoints in the published layouts against a plain forward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.rewards import reference as ref
from ttsnap import rewards
from ttsnap.rewards import clip, conversion, preprocess

PROMPTS = ["a red circle", "a blue square left of a green triangle", "a red circle"]
IMAGES = torch.rand(3, 3, 40, 56, generator=ref.generator(1))


@pytest.fixture(scope="module")
def tokenizer():
    return ref.clip_tokenizer()


@pytest.fixture(scope="module")
def state(tokenizer):
    return ref.open_clip_state(len(tokenizer))


def cosine(state, tokenizer, pixels, prompts=PROMPTS, act=F.gelu):
    ids = tokenizer(
        prompts, padding="max_length", max_length=ref.LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    image = ref.open_clip_image(state, pixels, act)
    text = ref.open_clip_text(state, ids, tokenizer.eos_token_id, act)
    return F.cosine_similarity(image, text)


def judge(reward, images=IMAGES, prompts=PROMPTS):
    with torch.no_grad():
        return reward(images, prompts, sigma=0.0)


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
def test_hps_is_the_raw_cosine_of_an_open_clip_checkpoint(tmp_path, state, tokenizer, name):
    half = {key: value.half() for key, value in state.items()}  # the published file is compressed so
    file = ref.save_clip(tmp_path, "HPS_v2_compressed.pt", half, lambda state: {"state_dict": state})
    (reward,) = rewards.load(f"{name}={file}").values()
    exact = {key: value.float() for key, value in half.items()}
    expected = cosine(exact, tokenizer, preprocess.longest_pad(IMAGES, ref.SIDE))
    torch.testing.assert_close(judge(reward), expected, atol=1e-6, rtol=1e-5)
    assert {p.dtype for p in reward.parameters()} == {torch.float32}
    assert not any(p.is_meta for p in [*reward.parameters(), *reward.buffers()])


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_pickscore_is_the_scaled_cosine_of_a_transformers_checkpoint(tmp_path, state, tokenizer, file):
    old = {"text_model.embeddings.position_ids": torch.arange(ref.LENGTH)[None]}  # a buffer that old versions stored
    ref.save_clip(tmp_path, file, ref.to_transformers(state) | old)
    (reward,) = rewards.load(f"pickscore={tmp_path}").values()
    expected = 20 * cosine(state, tokenizer, clip.transformers_crop(IMAGES, ref.SIDE))
    torch.testing.assert_close(judge(reward), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_clipscore_of_openai_towers(tmp_path, state, tokenizer, layout):
    saved = state if layout == "open_clip" else ref.to_transformers(state)
    ref.save_clip(tmp_path, "model.safetensors", saved, act="quick_gelu")
    (reward,) = rewards.load(f"clipscore={tmp_path}").values()
    pixels = clip.transformers_crop(IMAGES, ref.SIDE)
    expected = 100 * cosine(state, tokenizer, pixels, act=ref.quick_gelu)
    torch.testing.assert_close(judge(reward), expected, atol=1e-4, rtol=1e-5)
    wrong = 100 * cosine(state, tokenizer, pixels, act=F.gelu)
    assert (judge(reward) - wrong).abs().max() > 1e-2  # the other activation loads as well and would be wrong


def test_aesthetic_is_a_linear_head_on_normalised_features(tmp_path, state):
    (tmp_path / "clip").mkdir()
    ref.save_clip(tmp_path / "clip", "model.safetensors", ref.to_transformers(state), act="quick_gelu")
    head = ref.head_state(ref.EMBED)
    ref.save(tmp_path / "sac+logos+ava1-l14-linearMSE.pth", head)
    (reward,) = rewards.load(f"aesthetic={tmp_path}").values()
    features = ref.open_clip_image(state, preprocess.shortest_crop(IMAGES, ref.SIDE), ref.quick_gelu)
    expected = ref.run_head(head, F.normalize(features, dim=-1))
    torch.testing.assert_close(judge(reward), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(judge(reward, prompts=["x", "y", "z"]), expected, atol=1e-5, rtol=1e-5)


def test_the_published_sizes_have_the_published_keys():
    from accelerate import init_empty_weights
    from transformers import CLIPConfig, CLIPModel

    with init_empty_weights():
        h, large = (CLIPModel(CLIPConfig.from_dict(sizes)) for sizes in (clip.VIT_H, clip.VIT_L))
    fused = sum(name.endswith(("k_proj.weight", "k_proj.bias")) for name, _ in h.named_parameters())
    assert len(h.state_dict()) - 2 * fused == 686  # open_clip keeps q, k and v in one
    assert sum(p.numel() for p in h.parameters()) == 986_109_441
    assert sum(p.numel() for p in large.parameters()) == 427_616_513
    acts = [(m.config.vision_config.hidden_act, m.config.text_config.hidden_act) for m in (h, large)]
    assert acts == [("gelu", "gelu"), ("quick_gelu", "quick_gelu")]


def test_a_wrong_file_is_refused_by_name(tmp_path, state):
    other = ref.to_transformers(state)
    cases = {
        "hpsv2": (other, r"hps\.pt is not an hpsv2 checkpoint \(open_clip's ViT-H-14\): .* those of transformers CLIP"),
        "pickscore": (state, r"hps\.pt is not a PickScore checkpoint .*: its keys are those of open_clip"),
        "aesthetic": (state, r"hps\.pt is not the aesthetic predictor's head: its keys are those of open_clip"),
        "clipscore": ({"what": torch.ones(1)}, r"hps\.pt is not a CLIP ViT-L/14 checkpoint: it holds what"),
    }
    for name, (saved, message) in cases.items():
        file = ref.save_clip(tmp_path, "hps.pt", saved)
        with pytest.raises(ValueError, match=message):
            rewards.load(f"{name}={file}")


def test_every_key_is_accounted_for(tmp_path, state):
    def refused(saved, message):
        file = ref.save_clip(tmp_path, "hps.pt", saved)
        with pytest.raises(ValueError, match=message) as caught:
            rewards.load(f"hpsv2={file}")
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)

    refused({k: v for k, v in state.items() if k != "visual.proj"}, "it lacks visual_projection.weight$")
    block = "transformer.resblocks.1.attn.in_proj_weight"
    refused({k: v for k, v in state.items() if k != block}, r"lacks text_model\S*k_proj.weight \(and 2 more\)")
    refused(state | {"visual.extra": torch.ones(1)}, "visual.extra has no place in it")
    refused(state | {"visual.proj": torch.ones(3, 3)}, r"visual_projection.weight has shape \[3, 3\], not \[24, 48\]")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"lacks .* more\)"):  # without a config beside it the published sizes hold
        rewards.load(f"hpsv2={ref.save(tmp_path / 'hps.pt', state)}")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    file = tmp_path / "evil.pt"
    torch.save({"state_dict": Evil()}, file)
    with pytest.raises(ValueError, match=r"evil\.pt is no checkpoint of tensors alone"):
        conversion.read_state(file)
    for content in (b"", b"garbage", b"PK\x03\x04 cut off"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"evil\.pt"):
            conversion.read_state(file)
    (tmp_path / "x.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read"):
        conversion.read_state(tmp_path / "x.safetensors")
    torch.save([torch.ones(1)], file)
    with pytest.raises(ValueError, match="does not hold tensors by name"):
        conversion.read_state(file)
    with pytest.raises(ValueError, match="cannot be read"):
        conversion.read_state(tmp_path / "missing.pt")


def test_wrappers_are_taken_off(tmp_path, state):
    wrapped = {f"module._orig_mod.model.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "a.pt")
    found = conversion.read_state(tmp_path / "a.pt")
    assert found.keys() == state.keys()
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert conversion.read_state(tmp_path / "old.pt").keys() == state.keys()


def test_hps_cleans_prompts_and_the_others_do_not(tmp_path, state):
    dirty = ["a&amp;amp; red  circle", "a red\tcircle ", "a ﬁne circle", "â€œredâ€\x9d circle", "1 < 2 &amp;amp; red"]
    assert [clip.clean_text(text) for text in dirty] == [
        "a& red circle",
        "a red circle",
        "a fine circle",
        '"red" circle',
        "1 < 2 & red",  # beside a < ftfy leaves entities alone, and both rounds are needed
    ]
    ref.save_clip(tmp_path, "a.pt", state)
    (hps,) = rewards.load(f"hpsv2={tmp_path / 'a.pt'}").values()
    ref.save_clip(tmp_path, "b.safetensors", ref.to_transformers(state))
    (pick,) = rewards.load(f"pickscore={tmp_path / 'b.safetensors'}").values()
    odd, plain = ["r&#101;d circle"] * 3, ["red circle"] * 3
    assert torch.equal(judge(hps, prompts=odd), judge(hps, prompts=plain))
    assert not torch.equal(judge(pick, prompts=odd), judge(pick, prompts=plain))


def test_each_prompt_is_encoded_once_but_not_while_its_tower_learns(tmp_path, state):
    ref.save_clip(tmp_path, "a.pt", state)
    (reward,) = rewards.load(f"hpsv2={tmp_path / 'a.pt'}").values()
    seen = []
    inner = reward.tokenize
    reward.tokenize = lambda prompt: seen.append(prompt) or inner(prompt)
    first = judge(reward)
    assert seen == PROMPTS[:2]
    assert torch.equal(judge(reward), first)
    assert seen == PROMPTS[:2]
    reward.clip.text_model.requires_grad_(True)
    reward.clip.text_projection.requires_grad_(True)
    reward(IMAGES, PROMPTS).sum().backward()
    assert seen == PROMPTS[:2] + PROMPTS
    assert reward.clip.text_model.final_layer_norm.weight.grad.abs().sum() > 0


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(tmp_path, state):
    ref.save_clip(tmp_path, "a.pt", state)
    (reward,) = rewards.load(f"hpsv2={tmp_path / 'a.pt'}").values()
    with pytest.warns(UserWarning, match="hpsv2 reads 16 tokens"):
        assert judge(reward, prompts=["a red circle " * 20] * 3).isfinite().all()
    with pytest.raises(ValueError, match="3 images need as many prompts, got 2"):
        judge(reward, prompts=PROMPTS[:2])


def test_scores_in_full_precision_but_trains_in_mixed(tmp_path, state):
    ref.save_clip(tmp_path, "a.pt", state)
    (reward,) = rewards.load(f"hpsv2={tmp_path / 'a.pt'}").values()
    exact = judge(reward)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(judge(reward), exact)
        reward.train()
        assert not torch.equal(judge(reward), exact)
    torch.testing.assert_close(judge(reward.eval(), IMAGES.bfloat16()), judge(reward, IMAGES.bfloat16().float()))


def test_without_weights_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"hf download yuvalkirstain/PickScore_v1 model\.safetensors.*pickscore=PATH"
    ) as e:
        rewards.load("pickscore")
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="there is no file or directory"):
        rewards.load(f"pickscore={tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match=r"should hold HPS_v2\.1_compressed\.pt, it holds no weights"):
        rewards.load(f"hpsv2.1={tmp_path}")
