"""ImageReward from a checkpoint in the original layout against a plain forward."""

from __future__ import annotations

import pytest
import torch

from tests.rewards import reference as ref
from ttsnap import rewards
from ttsnap.rewards import blip, preprocess

PROMPTS = ["a red circle", "a blue square left of a green triangle", "a red circle"]
IMAGES = torch.rand(3, 3, 40, 56, generator=ref.generator(1))


@pytest.fixture(scope="module")
def tokenizer():
    return ref.bert_tokenizer()


@pytest.fixture(scope="module")
def state(tokenizer):
    return ref.imagereward_state(len(tokenizer))


@pytest.fixture
def reward(tmp_path, state):
    ref.save_imagereward(tmp_path, "ImageReward.pt", state)
    return rewards.load(f"imagereward={tmp_path}")["imagereward"]


def expected(state, tokenizer, images=IMAGES, **changes):
    read = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    pixels = preprocess.shortest_crop(images, ref.BLIP_SIDE)
    return ref.run_imagereward(state, pixels, read.input_ids, read.attention_mask, **changes)


def judge(reward, images=IMAGES, prompts=PROMPTS):
    with torch.no_grad():
        return reward(images, prompts, sigma=0.0)


def test_the_raw_head_output_of_the_original_layout(reward, state, tokenizer):
    wanted = expected(state, tokenizer)
    torch.testing.assert_close(judge(reward), wanted, atol=1e-5, rtol=1e-5)
    assert wanted.std() > 0.01
    for wrong in ({"text_heads": 2}, {"eps": 1e-2}):
        assert (expected(state, tokenizer, **wrong) - wanted).abs().max() > 1e-4
    reward.normalised = True
    torch.testing.assert_close(judge(reward), (wanted - 0.16717362830052426) / 1.0333394966054072, atol=1e-5, rtol=1e-5)
    assert not any(tensor.is_meta for tensor in [*reward.parameters(), *reward.buffers()])


def test_the_published_sizes():
    from accelerate import init_empty_weights
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    with init_empty_weights():
        vision = BlipVisionModel(BlipVisionConfig(**blip.SIZES["vision_config"]))
        text = BlipTextModel(BlipTextConfig(**blip.SIZES["text_config"]), add_pooling_layer=False)
    assert (vision.config.layer_norm_eps, text.config.layer_norm_eps) == (1e-6, 1e-12)
    assert (vision.config.num_attention_heads, text.config.num_attention_heads) == (16, 12)
    assert text.encoder.layer[0].crossattention.self.key.in_features == 1024
    assert (text.config.hidden_dropout_prob, text.config.attention_probs_dropout_prob) == (0.1, 0.1)
    assert sum(p.numel() for p in vision.parameters()) == 303_301_632


def test_every_key_is_accounted_for(tmp_path, state):
    def refused(saved, message):
        file = ref.save_imagereward(tmp_path, "ImageReward.pt", saved)
        with pytest.raises(ValueError, match=message) as caught:
            rewards.load(f"imagereward={file}")
        assert str(file) in str(caught.value)

    def without(name):
        return {key: value for key, value in state.items() if key != name}

    refused(without("mlp.layers.7.bias"), "lacks head.7.bias$")
    refused(
        without("blip.visual_encoder.blocks.1.attn.qkv.weight"), "lacks vision.encoder.layers.1.self_attn.qkv.weight$"
    )
    refused(state | {"blip.text_decoder.x": torch.ones(1)}, "blip.text_decoder.x has no place in it")
    key = "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight"
    refused(state | {key: torch.ones(36, 36)}, r"has shape \[36, 36\], not \[36, 48\]")
    refused(ref.open_clip_state(20), "its keys are those of open_clip")


def test_tokens_are_kept_and_nothing_that_depends_on_weights(reward):
    seen = []
    inner = reward.tokenizer
    reward.tokenizer = lambda text, **options: seen.append(text) or inner(text, **options)
    reward.tokenizer.decode = inner.decode
    first = judge(reward)
    count = len(seen)
    assert set(seen) == set(PROMPTS)
    assert torch.equal(judge(reward), first)
    assert len(seen) == count
    with torch.no_grad():
        reward.text.embeddings.word_embeddings.weight.mul_(2)
    assert not torch.equal(judge(reward), first)
    with pytest.warns(UserWarning, match="imagereward reads 35 tokens"):
        judge(reward, prompts=["red circle " * 40] * 3)


def test_scores_in_full_precision(reward):
    exact = judge(reward)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(judge(reward), exact)
