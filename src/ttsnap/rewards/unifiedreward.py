"""UnifiedReward 2.0 (Wang et al., 2025): a vision-language model that writes three ratings of an image, 1 to 5.

    reward = mean of alignment, coherence and style

Its checkpoints are whole models of Qwen2.5-VL or Qwen3-VL, which write greedily (else as their generation_config.json
says); the numbers have many decimals. The instruction is its authors' and not part of ttsnap: the text of their script
for one image is read from a copy of it, which is not run.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttsnap.rewards.clip import check_counts
from ttsnap.rewards.sources import UNIFIEDREWARD, model_folder
from ttsnap.rewards.vision_language import VisionLanguage, load_vision_language, plain

SCRIPT = "inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py"
VARIABLE = "TTSNAP_UNIFIEDREWARD_PROMPT"
TEXT, HOLE = "problem", "prompt"  # names in that script
RATINGS = ("Alignment", "Coherence", "Style")
LENGTH = 96  # tokens of an answer at most; three lines with a number of sixteen digits each take about 80


class UnifiedReward(nn.Module):
    """Alignment, coherence and style of an image, 1 to 5; the reward is their mean.

    Attributes:
        ratings: [n, 3] of the last look; None before the first.
    """

    def __init__(self, reader: VisionLanguage, instruction: str) -> None:
        """Put the parts together.

        Args:
            reader: the model.
            instruction: a text with `{prompt}`.
        """
        super().__init__()
        self.reader, self.instruction = reader.eval(), instruction
        self.ratings: Tensor | None = None

    def forward(self, images: Tensor, prompts: Sequence[str], *, sigma: float = 0.0) -> Tensor:
        """Rewards [n], 1 to 5, of images [n, 3, h, w] in 0..1; takes no notice of `sigma`.

        Raises:
            ValueError: an answer does not hold the three ratings.
        """
        check_counts(images, prompts)
        tokenizer = self.reader.tokenizer
        texts = [self.instruction.replace(f"{{{HOLE}}}", plain(tokenizer, prompt)) for prompt in prompts]
        inputs = {name: t.to(self.reader.device) for name, t in self.reader.inputs(images, texts, left=True).items()}
        written = self.reader.model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
        answers = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.ratings = torch.tensor([read_ratings(answer) for answer in answers], device=written.device)
        return self.ratings.mean(1)


def read_ratings(answer: str) -> list[float]:
    """The three numbers of an answer.

    Raises:
        ValueError: one of them is not there, or not 0 to 10; quotes the answer.
    """
    found = []
    for name in RATINGS:
        match = re.search(rf"{name}\s+Score\s*(?:\(1-5\))?\s*:\s*(\d+(?:\.\d+)?)", answer, re.IGNORECASE)
        if not match or float(match[1]) > 10:
            brief = " ".join(answer.split())
            raise ValueError(f"reward unifiedreward wrote no {name.lower()} rating but {brief[:200]!r}")
        found.append(float(match[1]))
    return found


def load_unifiedreward(
    device: Any = "cpu", path: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> UnifiedReward:
    """UnifiedReward 2.0.

    Args:
        device: where it runs.
        path: the directory or hub repository of one of its sizes (default: the 7B on Qwen2.5-VL).
        dtype: of its weights.

    Raises:
        ValueError: the model or the instruction is not there, or not what it should be.
    """
    instruction = find_instruction()
    folder = model_folder("unifiedreward", path or UNIFIEDREWARD.repo)
    return UnifiedReward(load_vision_language("unifiedreward", folder, device, dtype), instruction)


def find_instruction() -> str:
    """The authors' instruction, a text with `{prompt}`, of the script that TTSNAP_UNIFIEDREWARD_PROMPT names.

    Raises:
        ValueError: it names none, or it does not hold the text.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        raise ValueError(
            "reward unifiedreward asks in its authors' words, which are not part of ttsnap: name a copy of their "
            f"script {SCRIPT} (github.com/CodeGoat24/UnifiedReward) in {VARIABLE}; it is read, not run"
        )
    file = Path(named).expanduser()
    try:
        parsed = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"the instruction of reward unifiedreward cannot be read from {file}: {error}") from error
    for node in parsed.body:
        if isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == [TEXT]:
            text = _template(node.value)
            if f"{{{HOLE}}}" in text:
                return text
    raise ValueError(
        f"{file} does not hold the instruction of reward unifiedreward: a text {TEXT} with {{{HOLE}}} in it"
    )


def _template(node: ast.expr) -> str:
    """A text in a script, with the names of what is put into it in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_template, node.values))
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return f"{{{node.value.id}}}"
    return ""
