"""Forty odd files, made here, with what is to be said of each: a picture's colour, or the words of its fault."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

SIDE = 24
RED, GREEN, BLUE, WHITE, GREY = (200, 30, 40), (30, 160, 60), (20, 40, 200), (255, 255, 255), (128, 128, 128)
Wanted = tuple[int, int, int] | str


def make(folder: Path) -> dict[str, Wanted]:
    """Write the files; by name the colour of the pixel in the upper left quarter, or part of the fault."""
    return _ordinary(folder) | _modes(folder) | _damaged(folder) | _no_pictures(folder)


def _red(mode: str = "RGB") -> Image.Image:
    """Red above, blue below."""
    picture = Image.new("RGB", (SIDE, SIDE), RED)
    picture.paste(BLUE, (0, SIDE // 2, SIDE, SIDE))
    return picture.convert(mode)


def _bytes(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _ordinary(folder: Path) -> dict[str, Wanted]:
    red, found = _red(), {}
    for suffix, kind in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("avif", "AVIF"), ("bmp", "BMP"),
                         ("tif", "TIFF"), ("gif", "GIF"), ("ppm", "PPM"), ("tga", "TGA"), ("jp2", "JPEG2000"),
                         ("ico", "ICO")):  # fmt: skip
        red.save(folder / f"plain.{suffix}", kind)
        found[f"plain.{suffix}"] = RED
    for turned in (3, 6, 8):  # how a camera was held; a viewer turns the picture back
        exif = Image.Exif()
        exif[0x0112] = turned
        way = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[turned]
        red.transpose(way).save(folder / f"turned{turned}.jpg", exif=exif, quality=95)
        found[f"turned{turned}.jpg"] = RED
    (folder / "PHOTO.JPEG").write_bytes(_bytes(red, "JPEG"))
    (folder / "wrong name.png").write_bytes(_bytes(red, "WEBP"))
    (folder / "no suffix").write_bytes(_bytes(red, "PNG"))
    (folder / "name\nof [bold]two lines.png").write_bytes(_bytes(red, "PNG"))
    (folder / os.fsdecode(b"not utf-8 \xff.png")).write_bytes(_bytes(red, "PNG"))
    (folder / "linked.png").symlink_to("plain.png")
    names = ("PHOTO.JPEG", "wrong name.png", "no suffix", r"name\nof [bold]two lines.png", "not utf-8 \\udcff.png")
    return found | dict.fromkeys((*names, "linked.png"), RED)


def _modes(folder: Path) -> dict[str, Wanted]:
    found: dict[str, Wanted] = {}

    def keep(name: str, data: bytes, wanted: Wanted) -> None:
        (folder / name).write_bytes(data)
        found[name] = wanted

    clear = _red("RGBA")
    clear.putalpha(0)
    keep("transparent.png", _bytes(clear, "PNG"), WHITE)
    half = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 128))
    keep("half.webp", _bytes(half, "WEBP", lossless=True), (127, 127, 127))
    palette = Image.new("P", (SIDE, SIDE), 1)
    palette.putpalette([*WHITE, *GREEN])
    keep("palette.png", _bytes(palette, "PNG"), GREEN)
    keep("palette-transparent.png", _bytes(palette, "PNG", transparency=1), WHITE)
    keep("grey.png", _bytes(Image.new("L", (SIDE, SIDE), 128), "PNG"), GREY)
    keep("grey-alpha.png", _bytes(Image.new("LA", (SIDE, SIDE), (0, 0)), "PNG"), WHITE)
    keep("one-bit.png", _bytes(Image.new("1", (SIDE, SIDE), 1), "PNG"), WHITE)
    deep = Image.fromarray(np.full((SIDE, SIDE), 32896, dtype=np.uint16))
    keep("16bit.png", _bytes(deep, "PNG"), GREY)
    keep("16bit.tif", _bytes(deep, "TIFF"), GREY)
    keep("16bit-colour.png", _png16(RED), RED)
    keep("float.tif", _bytes(Image.fromarray(np.full((SIDE, SIDE), 0.5, dtype=np.float32)), "TIFF"), GREY)
    keep("heights.tif", _bytes(Image.fromarray(np.full((SIDE, SIDE), 8848.0, dtype=np.float32)), "TIFF"), "up to 8848")
    keep("cmyk.jpg", _bytes(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0))
    keep("lab.tif", _bytes(_lab(RED), "TIFF"), RED)
    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))
    keep("profile.png", _bytes(_red(), "PNG", icc_profile=wide.tobytes()[:-40]), RED)  # cut, so that it counts as none
    frames = [_red(), Image.new("RGB", (SIDE, SIDE), GREEN)]
    for name, kind in (("moving.gif", "GIF"), ("moving.webp", "WEBP"), ("moving.png", "PNG")):
        options = {"lossless": True} if kind == "WEBP" else {}
        keep(name, _bytes(frames[0], kind, save_all=True, append_images=frames[1:], **options), RED)
    keep("pages.tif", _bytes(frames[0], "TIFF", save_all=True, append_images=frames[1:]), RED)
    keep("tiny.png", _bytes(Image.new("RGB", (1, 1), GREEN), "PNG"), GREEN)
    return found


def _damaged(folder: Path) -> dict[str, Wanted]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name, kind in (("cut.png", "PNG"), ("cut.jpg", "JPEG"), ("cut.webp", "WEBP"), ("cut.gif", "GIF"),
                       ("cut.avif", "AVIF")):  # fmt: skip
        data = _bytes(noise, kind)
        (folder / name).write_bytes(data[: len(data) // 2])
    data = bytearray(_bytes(noise, "PNG"))
    data[60:64] = b"\xff\xff\xff\xff"
    (folder / "flipped.png").write_bytes(data)
    (folder / "bomb.png").write_bytes(_png_of_size(60_000, 60_000))
    (folder / "large.png").write_bytes(_png_of_size(10_000, 9_000))
    (folder / "text bomb.png").write_bytes(_text_bomb())
    (folder / "ribbon.png").write_bytes(_bytes(Image.new("RGB", (3000, 2)), "PNG"))
    (folder / "broken exif.jpg").write_bytes(_bytes(_red(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff"))
    return {
        "cut.png": "truncated",
        "cut.jpg": "truncated",
        "cut.gif": "truncated",
        "cut.webp": "is damaged",
        "cut.avif": "AVIF, damaged or cut off",
        "flipped.png": "is damaged",
        "bomb.png": "60000 x 60000 pixels|too many pixels",
        "large.png": "10000 x 9000 pixels",
        "text bomb.png": "is damaged",
        "ribbon.png": "3000 x 2 pixels",
        "broken exif.jpg": RED,
    }


def _no_pictures(folder: Path) -> dict[str, Wanted]:
    kept = {
        "empty.png": (b"", "is empty"),
        "text.png": (b"a red circle\n", "is text"),
        "page.jpg": (b"<!DOCTYPE html><html></html>", "is a web page"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        "film.gif": (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "is a video"),
        "noise.jpg": (np.random.default_rng(0).bytes(500), "is not a picture"),
    }
    for name, (data, _) in kept.items():
        (folder / name).write_bytes(data)
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    found = {name: fault for name, (_, fault) in kept.items()}
    found |= {
        "dangling.png": "is a link to nowhere.png",
        "loop.png": "cannot be read",
        "pipe.png": "not a regular file",
    }
    if os.geteuid():  # root reads everything
        (folder / "locked.png").write_bytes(_bytes(_red(), "PNG"))
        (folder / "locked.png").chmod(0)
        found["locked.png"] = "cannot be read: Permission denied"
    (folder / "notes.txt").write_text("not a picture, and no picture's name")
    return found


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int, rows: bytes, *more: bytes) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _png16(colour: tuple[int, int, int]) -> bytes:
    """A PNG of 16 bits per channel."""
    row = b"\0" + b"".join(struct.pack(">H", level * 257) for level in colour) * SIDE
    return _png(SIDE, SIDE, 16, row * SIDE)


def _png_of_size(width: int, height: int) -> bytes:
    """A small file that says it is a large picture."""
    return _png(width, height, 8, b"\0" * 100)


def _text_bomb() -> bytes:
    """A PNG with a text that is small only while it is compressed."""
    return _png(SIDE, SIDE, 8, b"\0" * 100, _chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * (80 << 20))))


def _lab(colour: tuple[int, int, int]) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), colour)
    lab = ImageCms.profileToProfile(
        picture, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    return lab
