"""HPSv3 (Ma et al., 2025): Qwen2-VL-7B with a small head where the token `<|Reward|>` stands.

    mu, log sigma = head(h),    head = Linear, ReLU, Linear, ReLU, Linear

mu is the reward; sigma, how unsure the model is of it, is kept as `sigma` of the last look. Two things would load as
well and be silently wrong: positions count on through the image, as the authors' forward leaves them, instead of Qwen's
own by time, height and width; and an instruction in other words. The instruction is the authors' and not part of
ttsnap: its two constants are read, without running anything, from their installed package or from a file.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttsnap.rewards import conversion
from ttsnap.rewards.clip import check_counts
from ttsnap.rewards.sources import HPSV3, QWEN
from ttsnap.rewards.vision_language import Sight, VisionLanguage, chat_template, hub_template, plain

TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28
CONSTANTS = ("INSTRUCTION", "prompt_with_special_token")
FILE = "hpsv3/dataset/data_collator_qwen.py"
VARIABLE = "TTSNAP_HPSV3_PROMPT"

# Qwen2-VL-7B-Instruct's config; the vocabulary is that of the checkpoint, cut to its tokenizer and the new token.
SIZES: dict[str, Any] = {
    "model_type": "qwen2_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"embed_dim": 1280, "hidden_size": 3584, "depth": 32, "num_heads": 16, "mlp_ratio": 4},
}


class Instruction(NamedTuple):
    """What the model is told: a text with `{text_prompt}`, and one with the token whose state is read."""

    before: str
    after: str

    def about(self, prompt: str) -> str:
        """The whole text about a prompt."""
        return self.before.replace("{text_prompt}", prompt) + self.after


class HPSv3(nn.Module):
    """Human preference, about 0 to 15, of a vision-language model.

    Attributes:
        sigma: standard deviations [n] that the model gave with the last look's rewards; None before the first.
    """

    trained = r"reader\.model\.model\.language_model\.(layers|norm)\..*|rm_head\..*"
    lora_targets = r"reader\.model\.model\.language_model\.layers\..*\.([qkvo]_proj|gate_proj|up_proj|down_proj)"

    def __init__(self, reader: VisionLanguage, instruction: Instruction) -> None:
        super().__init__()
        width = int(reader.model.config.text_config.hidden_size)
        self.reader = reader
        self.rm_head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )
        self.instruction = instruction
        self.token = int(reader.tokenizer.convert_tokens_to_ids(TOKEN))
        self.sigma: Tensor | None = None
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: Sequence[str], *, sigma: float = 0.0) -> Tensor:
        """Rewards [n] of images [n, 3, h, w] in 0..1; takes no notice of the noise level `sigma`."""
        mu, self.sigma = self.distribution(images, prompts)
        return mu

    def distribution(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Means [n] and standard deviations [n] of what people would say."""
        check_counts(images, prompts)
        texts = [self.instruction.about(plain(self.reader.tokenizer, prompt)) for prompt in prompts]
        inputs = self.reader.inputs(images, texts)
        rows, length = inputs["input_ids"].shape
        hidden = self.reader.hidden(inputs, torch.arange(length).expand(3, rows, -1))
        place = (inputs["input_ids"] == self.token).int().argmax(1)
        mu, log_sigma = self.rm_head(hidden[torch.arange(rows), place].float()).unbind(-1)
        return mu, log_sigma.exp()

    def gradient_checkpointing_enable(self) -> None:
        """Save memory in training: compute the language model's activations again."""
        self.reader.model.gradient_checkpointing_enable({"use_reentrant": False})


def load_hpsv3(device: Any = "cpu", path: str | None = None, dtype: torch.dtype = torch.bfloat16) -> HPSv3:
    """HPSv3.

    Args:
        device: where it runs.
        path: its file, or a directory that holds it, a tokenizer and perhaps a config.json (default: the hub's).
        dtype: of its weights; the head's are fp32.

    Raises:
        ValueError: weights, tokenizer or instruction are not there, or not what they should be.
    """
    from transformers import AutoTokenizer

    instruction = find_instruction()
    weights = HPSV3.weights(path)
    what = "an HPSv3 checkpoint"
    tensors = conversion.qwen2_vl_tensors(conversion.read_state(weights))
    embedding = "reader.model.model.language_model.embed_tokens.weight"
    conversion.expect_keys(tensors, (embedding, "rm_head.0.weight"), weights, what)
    tokenizer = HPSV3.load_tokenizer(AutoTokenizer, weights)
    template = chat_template(weights.parent) or tokenizer.chat_template or hub_template(QWEN)
    beside = weights.parent / "config.json"
    sizes = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else SIZES
    reward = empty_hpsv3(sizes, tokenizer, instruction, len(tensors[embedding]), template, dtype)
    if reward.token >= len(tensors[embedding]):
        raise ValueError(f"{weights} has {len(tensors[embedding])} words and no place for {TOKEN}, word {reward.token}")
    conversion.load_strictly(reward, tensors, weights, what, as_made=True)
    return reward.to(device)


def empty_hpsv3(
    sizes: dict[str, Any], tokenizer: Any, instruction: Instruction, words: int, template: str | None, dtype: Any
) -> HPSv3:
    """The network without data.

    Args:
        sizes: Qwen2-VL's config.
        tokenizer: Qwen2-VL's; the token is added to it.
        instruction: see `find_instruction`.
        words: of the vocabulary, the token among them.
        template: chat template.
        dtype: of the weights.
    """
    from accelerate import init_empty_weights
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer.add_tokens([TOKEN], special_tokens=True)
    config = Qwen2VLConfig.from_dict(sizes)
    config.text_config.vocab_size = words
    with init_empty_weights(include_buffers=False):
        model = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype)
        model.lm_head = nn.Identity()  # it writes nothing
        return HPSv3(VisionLanguage(model, tokenizer, Sight(least=PIXELS, most=PIXELS), template), instruction)


def find_instruction() -> Instruction:
    """The authors' instruction: of the file that TTSNAP_HPSV3_PROMPT names, else of their installed package.

    Raises:
        ValueError: neither is there, or it does not hold the two constants.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return read_instruction(Path(named).expanduser())
    package = importlib.util.find_spec("hpsv3")
    for folder in (package.submodule_search_locations or []) if package else []:
        file = Path(folder).parent / FILE
        if file.is_file():
            return read_instruction(file)
    raise ValueError(
        "reward hpsv3 asks in its authors' words, which are not part of ttsnap: `pip install --no-deps hpsv3` (nothing "
        f"of it is run), or name a copy of its file {FILE} in {VARIABLE}"
    )


def read_instruction(file: Path) -> Instruction:
    """The two constants of a Python file, which is not run.

    Raises:
        ValueError: it cannot be read, or does not hold them.
    """
    try:
        parsed = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"the instruction of reward hpsv3 cannot be read from {file}: {error}") from error
    found: dict[str, Any] = {}
    for node in parsed.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    before, after = (found.get(name) for name in CONSTANTS)
    if not (isinstance(before, str) and "{text_prompt}" in before and isinstance(after, str) and TOKEN in after):
        raise ValueError(
            f"{file} does not hold the instruction of reward hpsv3: a text {CONSTANTS[0]} with {{text_prompt}}, and a "
            f"text {CONSTANTS[1]} with {TOKEN}"
        )
    return Instruction(before, after)
