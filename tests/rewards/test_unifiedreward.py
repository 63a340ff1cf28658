"""UnifiedReward 2.0: three ratings that a small model writes, against writing one image at a time by hand."""

from __future__ import annotations

import pytest
import torch

from tests.rewards import vision_models as small
from tests.rewards.test_vqascore import IMAGES, PROMPTS, judge, pil
from ttsnap import rewards
from ttsnap.rewards import unifiedreward

SCRIPT = """
import a_package_that_is_not_there
prompt = ''
problem = (
    "Judge the picture. "
    "Answer so:\\n"
    f"Text: [{prompt}]"
)
raise SystemExit
"""


@pytest.fixture(autouse=True)
def script(tmp_path, monkeypatch):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    monkeypatch.setenv("TTSNAP_UNIFIEDREWARD_PROMPT", str(file))
    return file


def written(model, tokenizer, kind, image, prompt, count):
    """Tokens that the model writes, the most probable each time, by whole passes without a cache or padding."""
    seen = small.published_processor(kind)(images=[pil(image)], return_tensors="pt")
    text = small.turn(f"Judge the picture. Answer so:\nText: [{prompt}]", int(seen["image_grid_thw"].prod()) // 4)
    ids = tokenizer(text, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(count):
        types = (ids == model.config.image_token_id).int()
        with torch.no_grad():
            logits = model(input_ids=ids, mm_token_type_ids=types, **seen).logits[0, -1]
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_each_row_of_a_batch_writes_what_it_writes_alone(tmp_path, monkeypatch, kind):
    model, tokenizer = small.save_qwen(tmp_path, kind)
    reward = unifiedreward.load_unifiedreward("cpu", str(tmp_path), torch.float32)
    answers = []
    monkeypatch.setattr(unifiedreward, "LENGTH", 6)
    monkeypatch.setattr(unifiedreward, "read_ratings", lambda answer: answers.append(answer) or [1.0, 2.0, 6.0])
    assert judge(reward).tolist() == [3.0] * 4
    assert reward.ratings.tolist() == [[1.0, 2.0, 6.0]] * 4
    assert answers == [written(model, tokenizer, kind, *pair, 6) for pair in zip(IMAGES, PROMPTS, strict=True)]
    assert len(set(answers)) > 1


def test_a_published_directory_loads_in_bfloat16(tmp_path, monkeypatch):
    small.save_qwen(tmp_path, "qwen2_5_vl")
    (reward,) = rewards.load(f"unifiedreward={tmp_path}").values()
    assert {p.dtype for p in reward.parameters()} == {torch.bfloat16}
    monkeypatch.setattr(unifiedreward, "LENGTH", 3)
    with pytest.raises(ValueError, match="wrote no alignment rating but"):
        judge(reward)


def test_ratings_are_read_and_nothing_is_made_up():
    answer = "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 3\nStyle Score (1-5): 2.8025"
    assert unifiedreward.read_ratings(answer) == [2.694700002670288, 3.0, 2.8025]
    for broken in ("", answer.replace("Style", "Mood"), answer.replace("2.8025", "X"), answer.replace("2.8025", "95")):
        with pytest.raises(ValueError, match=r"wrote no (alignment|style) rating but"):
            unifiedreward.read_ratings(broken)


def test_the_instruction_is_read_and_not_run(script, monkeypatch):
    assert unifiedreward.find_instruction() == "Judge the picture. Answer so:\nText: [{prompt}]"
    script.write_text("problem = 'without a place for it'")
    with pytest.raises(ValueError, match=r"a text problem with \{prompt\} in it"):
        unifiedreward.find_instruction()
    monkeypatch.delenv("TTSNAP_UNIFIEDREWARD_PROMPT")
    with pytest.raises(ValueError, match="name a copy of their script"):
        unifiedreward.find_instruction()
