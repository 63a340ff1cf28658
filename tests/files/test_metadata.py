"""What picture files say, read back by ourselves and by a reader of other programs' pictures."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ttsnap.files import metadata
from ttsnap.files.metadata import Metadata, Parameters

IMAGE = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
FIELDS = {"Steps": "20", "Sampler": "Euler", "CFG scale": "3.5", "Seed": "7", "Size": "16x16", "Model": "a, b: c"}
SAYS = Metadata(Parameters('ein "grüner" Kreis 🟢, rot: links', "blurry, dark", FIELDS), {"seed": 7, "text": "ß🟢"})


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("prompt", [SAYS.parameters.prompt, "a red circle", "日本語の猫"])
def test_what_is_written_is_read(kind, prompt):
    says = Metadata(Parameters(prompt, "blurry, dark", FIELDS), SAYS.own)
    assert metadata.read(io.BytesIO(metadata.encode(IMAGE, says, kind=kind))) == says


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.filterwarnings("ignore")
def test_a_reader_of_other_programs_pictures_reads_them(kind, tmp_path):
    from sd_parsers import ParserManager

    file = tmp_path / f"picture.{kind.lower()}"
    file.write_bytes(metadata.encode(IMAGE, SAYS, kind=kind))
    found = ParserManager().parse(file)
    assert [str(prompt.value) for prompt in found.prompts] == [SAYS.parameters.prompt]
    assert [str(prompt.value) for prompt in found.negative_prompts] == ["blurry, dark"]
    (sampler,) = found.samplers
    assert sampler.name == "Euler"
    assert sampler.parameters == {"cfg_scale": "3.5", "seed": "7", "steps": "20"}


def test_exif_is_where_automatic1111_looks_for_it():
    piexif = pytest.importorskip("piexif")
    from piexif.helper import UserComment

    exif = Image.open(io.BytesIO(metadata.encode(IMAGE, SAYS, kind="JPEG"))).info["exif"]
    assert UserComment.load(piexif.load(exif)["Exif"][piexif.ExifIFD.UserComment]) == str(SAYS.parameters)


def test_pictures_of_automatic1111_are_read():
    piexif = pytest.importorskip("piexif")
    from piexif.helper import UserComment

    text = "a girl,\nred hair\nNegative prompt: ugly,\nfat\n"
    text += 'Steps: 20, Sampler: Euler a, Seed: 5, Lora hashes: "x: 1, y: 2"'
    exif = piexif.dump({"Exif": {piexif.ExifIFD.UserComment: UserComment.dump(text, encoding="unicode")}})
    file = io.BytesIO()
    IMAGE.save(file, format="JPEG", exif=exif)
    found = metadata.read(file)
    assert found.own is None
    assert (found.parameters.prompt, found.parameters.negative) == ("a girl,\nred hair", "ugly,\nfat")
    assert found.parameters.fields == {"Steps": "20", "Sampler": "Euler a", "Seed": "5", "Lora hashes": "x: 1, y: 2"}


WORDS = st.text(st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=60).map(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    WORDS.filter(lambda text: not text.startswith("Negative prompt:")), WORDS, st.lists(WORDS, min_size=3, max_size=5)
)
def test_the_text_says_any_prompt(prompt, negative, values):
    says = Parameters(prompt, negative, {f"Field {n}": value for n, value in enumerate(values)})
    found = Parameters.parse(f"{says}")
    assert (found.prompt, found.negative, found.fields) == (prompt, negative, says.fields)


def test_a_jpeg_that_cannot_hold_it_is_saved_without():
    with pytest.warns(UserWarning, match="64 KiB"):
        data = metadata.encode(IMAGE, Metadata(Parameters("x" * 40_000), {}), kind="JPEG")
    with pytest.raises(ValueError, match="does not say how it was made"):
        metadata.read(io.BytesIO(data))


def test_what_says_nothing_or_is_broken_is_named(tmp_path):
    for data, message in (
        (metadata.encode(IMAGE), "does not say how it was made"),
        (b"no picture", "is not a picture that can be read"),
        (metadata.encode(IMAGE, SAYS)[:-30], "cannot read|is not a picture"),
    ):
        (tmp_path / "file.png").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            metadata.read(tmp_path / "file.png")
    with pytest.raises(ValueError, match="it is not there"):
        metadata.read(tmp_path / "nowhere.png")
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("ttsnap", "{broken")
    IMAGE.save(tmp_path / "file.png", pnginfo=chunks)
    with pytest.raises(ValueError, match="not valid JSON"):
        metadata.read(tmp_path / "file.png")


def test_nothing_is_said_where_nothing_shall_be():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = metadata.encode(IMAGE)
    assert not Image.open(io.BytesIO(plain)).info
