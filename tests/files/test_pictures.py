"""Pictures that a pipeline is given are read as a viewer shows them, and named so that they can be read again."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from PIL import Image

import ttsnap
from ttsnap.files.pictures import read_picture
from ttsnap.pipelines.conditions import Pictures
from ttsnap.pipelines.outputs import written


def half(mode="RGB"):
    """Red above, blue below."""
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:4, :, 0] = pixels[4:, :, 2] = 255
    return Image.fromarray(pixels).convert(mode)


def test_a_photo_on_its_side_is_upright_and_the_line_reads_it_so(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it a quarter to the right
    half().save(tmp_path / "turned.png", exif=exif)
    picture = read_picture(tmp_path / "turned.png")
    assert picture.size == (8, 16)
    assert picture.getpixel((7, 8)) == (255, 0, 0)
    assert picture.getpixel((0, 8)) == (0, 0, 255)
    again = eval(written("image", picture), {"ttsnap": ttsnap, "PIL": PIL})
    assert again.tobytes() == picture.tobytes()


def test_16_bits_transparency_and_ink_are_shown_as_a_viewer_does(tmp_path):
    Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
    clear = half("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    half("CMYK").save(tmp_path / "ink.jpg")
    assert read_picture(tmp_path / "ink.jpg").mode == "RGB"


def test_an_ordinary_picture_keeps_the_plain_line(tmp_path):
    half().save(tmp_path / "plain.png")
    picture = read_picture(tmp_path / "plain.png")
    assert written("image", picture) == f"PIL.Image.open({str(tmp_path / 'plain.png')!r}).convert('RGB')"
    assert Pictures(image=(tmp_path / "plain.png",)).settings()["image"]


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(ValueError, match=r"text\.png is not a picture"):
        read_picture(tmp_path / "text.png")
    Image.new("RGB", (400, 4)).save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match=r"strip\.png has 400 x 4 pixels; no side may be more than 32 times"):
        read_picture(tmp_path / "strip.png")
