"""Prompts in the metadata of pictures."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ttsnap.files.decoding import decode
from ttsnap.files.embedded_prompt import embedded_prompt

A1111 = "a corgi,\nastronaut (1.2)\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1"
ENCODED = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1]}}
STABLE = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 5, "positive": ["6", 0], "negative": ["7", 0]}},
    "6": ENCODED | {"inputs": {"text": "a corgi"}},
    "7": ENCODED | {"inputs": {"text": "blurry"}},
}
FLUX = {
    "13": {"class_type": "SamplerCustomAdvanced", "inputs": {"noise": ["25", 0], "guider": ["22", 0]}},
    "22": {"class_type": "BasicGuider", "inputs": {"model": ["30", 0], "conditioning": ["26", 0]}},
    "25": {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
    "26": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["6", 0]}},
    "30": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux"}},
    "6": ENCODED | {"inputs": {"text": ["40", 0], "clip": ["30", 0]}},
    "40": {"class_type": "PrimitiveString", "inputs": {"value": "a corgi"}},
}
LOOP = {"1": {"class_type": "KSampler", "inputs": {"positive": ["1", 0]}}}


@pytest.mark.parametrize(
    ("info", "wanted"),
    [
        ({"parameters": A1111}, "a corgi, astronaut (1.2)"),
        ({"parameters": "a corgi\nSteps: 20, Sampler: Euler"}, "a corgi"),
        ({"parameters": "{red|blue} corgi"}, "{red|blue} corgi"),
        ({"parameters": json.dumps({"prompt": "a corgi"})}, "a corgi"),
        ({"parameters": "Negative prompt: blurry\nSteps: 20"}, None),
        ({"ttsnap": json.dumps({"prompt": "mine"}), "parameters": A1111}, "mine"),
        ({"prompt": json.dumps(STABLE)}, "a corgi"),
        ({"prompt": json.dumps(FLUX)}, "a corgi"),
        ({"prompt": json.dumps(LOOP)}, None),
        ({"prompt": "{" * 100_000}, None),
        ({"prompt": json.dumps([1]), "ttsnap": "no JSON"}, None),
        ({"invokeai_metadata": json.dumps({"positive_prompt": "a corgi"})}, "a corgi"),
        ({"dpi": (72, 72)}, None),
    ],
)
def test_it_is_what_was_asked_for(info, wanted):
    assert embedded_prompt(info) == wanted


def test_it_is_read_from_files(tmp_path):
    info = PngInfo()
    info.add_itxt("parameters", "ein Corgi, süß\nNegative prompt: x")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", exif=exif)
    graph = Image.Exif()
    graph[0x0110] = "prompt:" + json.dumps(STABLE)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.webp", exif=graph)
    found = {}
    for path in sorted(tmp_path.iterdir()):
        picture = decode(path.read_bytes())
        found[path.name] = embedded_prompt(picture.info, picture.exif)
    wanted = "a corgi, astronaut (1.2)"
    assert found == {"a.png": "ein Corgi, süß", "a.jpg": wanted, "a.webp": wanted, "b.webp": "a corgi"}
