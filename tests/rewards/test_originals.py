"""The original packages, installed into a folder of their own for the test, against ours on the same random weights.

torchvision comes as a CUDA build that does not go with CPU torch; only its Python parts are used, in a process of
their own that leaves out what the operators need.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.rewards import reference as ref
from ttsnap import rewards

pytestmark = pytest.mark.slow

PROMPTS = [
    "a red circle left of a blue square",
    "A photo of   two CATS &amp; one dog's bowl, 35mm!",
    "café — naïve ﬁnish &lt;3 🐈‍⬛",
    "a portrait, highly detailed, 8k, artstation, " * 12,
]
TORCHVISION = """
import sys, types
import torch
sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
"""
OPEN_CLIP = (
    TORCHVISION
    + """
import json, sys
from pathlib import Path
import open_clip
from open_clip.model import CLIP
folder = Path(sys.argv[1])
torch.manual_seed(0)
model = CLIP(
    embed_dim=24,
    vision_cfg={"image_size": 28, "layers": 2, "width": 48, "head_width": 12, "patch_size": 14},
    text_cfg={"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
).eval()
for parameter in model.parameters():
    parameter.data += torch.randn_like(parameter) * 0.1
torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2_compressed.pt")
prompts, pixels = json.loads((folder / "prompts.json").read_text()), torch.load(folder / "pixels.pt")
tokens = open_clip.get_tokenizer("ViT-H-14")(prompts)
with torch.no_grad():
    image, text = model.encode_image(pixels, normalize=True), model.encode_text(tokens[: len(pixels)], normalize=True)
torch.save({"tokens": tokens, "rewards": (image * text).sum(-1)}, folder / "expected.pt")
"""
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder with the original packages, apart from the environment of the tests."""
    folder = tmp_path_factory.mktemp("originals")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, "open_clip_torch==3.3.0", "torchvision"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the original packages cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder


def run(code, originals, folder):
    path = os.pathsep.join([str(originals), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def published_tokenizer(originals: Path):
    """CLIP's real vocabulary, which open_clip brings along, as a transformers tokenizer."""
    from transformers import CLIPTokenizer

    file = originals / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(rest))]
    words = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    pairs = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=pairs)


def test_open_clip(originals, tmp_path):
    prompts = PROMPTS + shared_prompts()
    images = torch.rand(len(PROMPTS), 3, 40, 56, generator=ref.generator())
    from ttsnap.rewards import preprocess
    from ttsnap.rewards.clip import clean_text

    torch.save(preprocess.longest_pad(images, 28), tmp_path / "pixels.pt")
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    run(OPEN_CLIP, originals, tmp_path)
    expected = torch.load(tmp_path / "expected.pt")
    tokenizer = published_tokenizer(originals)
    tokenizer.save_pretrained(tmp_path)
    config = ref.clip_config(49408, 49407)
    config["text_config"]["max_position_embeddings"] = 77
    (tmp_path / "config.json").write_text(json.dumps(config))
    (reward,) = rewards.load(f"hpsv2={tmp_path}").values()
    with pytest.warns(UserWarning, match="reads 77 tokens"):
        ours = reward(images, PROMPTS).detach()
    torch.testing.assert_close(ours, expected["rewards"], atol=1e-6, rtol=1e-5)
    end = tokenizer.eos_token_id
    for prompt, theirs in zip(prompts, expected["tokens"], strict=True):
        ids = tokenizer(clean_text(prompt), truncation=True, max_length=77).input_ids
        assert ids == theirs[: int((theirs == end).int().argmax()) + 1].tolist(), prompt


def shared_prompts():
    """Prompts that people wrote, where they are beside the project."""
    folder = Path(__file__).parents[3] / "shared" / "prompts"
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    texts = [text for file in files for text in json.loads(file.read_text()) if isinstance(text, str)]
    return texts[:1000]
