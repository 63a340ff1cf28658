"""Noise-aware checkpoints in the published layouts: each level against a plain forward with that level's weights."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import ttsnap
from tests.rewards import reference as ref
from ttsnap import rewards
from ttsnap.rewards import Spec, clip, preprocess
from ttsnap.rewards.published import find_steps, load_published

PROMPTS = ["a red circle", "a blue square"]
IMAGES = torch.rand(2, 3, 40, 56, generator=ref.generator(1))
SIGMAS = [1.0, 0.9, 0.6, 0.3]


def bert(prompts):
    tokenizer = ref.bert_tokenizer()
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")


def imagereward(state):
    read = bert(PROMPTS)
    pixels = preprocess.shortest_crop(IMAGES, ref.BLIP_SIDE)
    return ref.run_imagereward(state, pixels, read.input_ids, read.attention_mask)


def cosine(state, pixels):
    tokenizer = ref.clip_tokenizer()
    ids = tokenizer(PROMPTS, padding="max_length", max_length=ref.LENGTH, return_tensors="pt").input_ids
    text = ref.open_clip_text(state, ids, tokenizer.eos_token_id)
    return F.cosine_similarity(ref.open_clip_image(state, pixels), text)


def pickscore(state):
    return state["logit_scale"].exp() * cosine(state, clip.transformers_crop(IMAGES, ref.SIDE))


def hpsv2(state):
    return cosine(state, preprocess.longest_pad(IMAGES, ref.SIDE))


def prefixed(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def plain(state):
    return state


CASES = {
    # reward: make a state, its clean file, the forward, how a level's file is written, the folder's names
    "imagereward": (
        lambda seed: ref.imagereward_state(len(ref.bert_tokenizer()), seed),
        (ref.save_imagereward, "ImageReward.pt", plain),
        imagereward,
        prefixed("module."),
        ("imagereward", "imr"),
    ),
    "pickscore": (
        lambda seed: ref.open_clip_state(len(ref.clip_tokenizer()), seed),
        (ref.save_clip, "model.safetensors", ref.to_transformers),
        pickscore,
        ref.to_transformers,
        ("pickscore", "pick"),
    ),
    "hpsv2": (
        lambda seed: ref.open_clip_state(len(ref.clip_tokenizer()), seed),
        (ref.save_clip, "HPS_v2_compressed.pt", plain),
        hpsv2,
        prefixed("model."),
        ("hpsv2", "hps"),
    ),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """Reward, spec, forward, its states (clean, then two levels), a writer of level files, the folder's names."""
    make, (save, file, layout), forward, wrap, folders = CASES[request.param]
    states = [make(seed) for seed in range(3)]
    (tmp_path / "clean").mkdir()
    save(tmp_path / "clean", file, layout(states[0]))
    spec = Spec(request.param, str(tmp_path / "clean"))
    return request.param, spec, forward, states, lambda path, state: ref.save(path, wrap(state)), folders


def judge(reward, sigma):
    with torch.no_grad():
        return reward(IMAGES, PROMPTS, sigma=sigma)


def check(reward, forward, states):
    """States: of sigma 0.9, of sigma 0.3, clean."""
    assert reward.sigmas == (0.3, 0.9)
    for _ in range(2):  # the second time with weights and prompts that are kept
        for sigma, state in ((0.9, states[1]), (0.3, states[2]), (1.0, states[1]), (0.0, states[0])):
            torch.testing.assert_close(judge(reward, sigma), forward(state), atol=1e-5, rtol=1e-5)


def test_trainers_files_counted_from_zero(case, tmp_path):
    name, spec, forward, states, write, _ = case
    folder = tmp_path / "aware"
    folder.mkdir()
    write(folder / "Ct1.pt", states[1])
    write(folder / "Ct3.pt", states[2])
    with pytest.raises(ValueError, match=r"not which noise levels they are of: write .*levels\.json"):
        rewards.load(f"{name}={spec.path}+{folder}")
    (folder / "levels.json").write_text(json.dumps({"sigmas": SIGMAS, "counted": "ids"}))
    loaded = rewards.load(f"{name}={spec.path}+{folder}")
    assert list(loaded) == [f"{name}+{folder}"]
    check(loaded[f"{name}+{folder}"], forward, states)
    pictures = [Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in IMAGES]
    for sigma, state in ((0.9, states[1]), (0.0, states[0])):
        found = ttsnap.score(pictures, reward=f"{name}={spec.path}+{folder}", sigma=sigma, prompt=PROMPTS)
        said = {picture.prompt: picture.rewards[f"{name}+{folder}"] for picture in found.ranked}
        torch.testing.assert_close(torch.tensor([said[p] for p in PROMPTS]), forward(state), atol=1e-4, rtol=1e-5)


def test_a_hub_repository_is_found_by_its_name_and_told_of_where_it_is_not(tmp_path, monkeypatch):
    import huggingface_hub.constants

    make, (save, file, layout), forward, wrap, _ = CASES["pickscore"]
    states = [make(seed) for seed in range(3)]
    (clean := tmp_path / "clean").mkdir()
    save(clean, file, layout(states[0]))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    named = f"pickscore={clean}+TerryYu/DOGTrim"
    with pytest.raises(ValueError, match=r"in TerryYu/DOGTrim are not on this machine .* get them with `hf download"):
        rewards.load(named)
    folder = tmp_path / "models--TerryYu--DOGTrim"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (place := folder / "snapshots" / "abc" / "pickscore").mkdir(parents=True)
    ref.save(place / "step2.pt", wrap(states[1]))
    ref.save(place / "step4.pt", wrap(states[2]))
    with pytest.raises(ValueError, match=r"not which noise levels they are of: write .*levels\.json"):
        rewards.load(named)
    (place.parent / "levels.json").write_text(json.dumps({"sigmas": SIGMAS, "counted": "calls"}))
    loaded = rewards.load(named)
    assert list(loaded) == ["pickscore+TerryYu/DOGTrim"]
    check(loaded["pickscore+TerryYu/DOGTrim"], forward, states)


def test_the_later_layout_counted_in_calls(case, tmp_path):
    name, spec, forward, states, write, folders = case
    for number, sub in enumerate(folders):
        folder = tmp_path / f"aware{number}"
        (folder / sub).mkdir(parents=True)
        write(folder / sub / "step2.pt", states[1])
        write(folder / sub / "step4.pt", states[2])
        check(load_published(folder, spec, sigmas=SIGMAS, counted="calls"), forward, states)
    write(folder / "Ct2.pt", states[1])
    with pytest.raises(ValueError, match="are both of step 2"):
        find_steps(folder, name)


def test_a_file_that_does_not_fit_is_refused_by_name(case, tmp_path):
    name, spec, _, states, write, _ = case
    folder = tmp_path / "aware"
    folder.mkdir()

    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            load_published(folder, spec, **{"sigmas": SIGMAS, "counted": "ids", **options})

    refused(f"holds no noise-aware checkpoints of {name}")
    write(folder / "Ct4.pt", states[1])
    refused(r"Ct4\.pt would be of call 5, but there are sigmas of calls 1 to 4")
    refused("counted as one of ids, calls, got 'steps'", counted="steps")
    (folder / "Ct4.pt").rename(folder / "Ct0.pt")
    refused(r"Ct0\.pt would be of call 0", counted="calls")
    broken = dict(states[1])
    broken.pop(next(key for key in broken if key.endswith("bias")))
    if name != "pickscore":  # its writer needs the whole state
        write(folder / "Ct0.pt", broken)
        refused(rf"Ct0\.pt is not a noise-aware {name} checkpoint: it lacks")
    foreign = ref.to_transformers(ref.open_clip_state(20)) if name != "pickscore" else ref.open_clip_state(20)
    ref.save(folder / "Ct0.pt", foreign)
    refused(rf"Ct0\.pt is not a noise-aware {name} checkpoint: its keys are those of")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"sigmas": [], "counted": "ids"}',
        '{"sigmas": [1, "x"], "counted": "ids"}',
        '{"sigmas": [1]}',
        '{"sigmas": [1], "counted": "ids", "x": 1}',
    ],
)
def test_levels_that_say_something_else(tmp_path, text):
    torch.save({"a": torch.ones(1)}, tmp_path / "Ct0.pt")
    (tmp_path / "levels.json").write_text(text)
    with pytest.raises(ValueError, match=r"levels\.json (cannot be read|must look like)"):
        load_published(tmp_path, Spec("hpsv2", "nowhere"))
