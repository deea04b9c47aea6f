"""Unusual images and file names: they give the right pixels, or an error with the file and the fix."""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from llama_index_genret.corpus import read_corpus
from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import DuplicateImage, ImageError, UnsafePath

RED = (255, 0, 0)
BROKEN_EXIF = {
    "garbage": b"Exif\0\0garbage garbage garbage",
    "empty": b"Exif\0\0",
    "cut short": b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01",
    "an offset beyond its end": b"Exif\0\0II*\0\xff\xff\xff\0",
    "an orientation that is a text": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x05\0\0\0\x99\0\0\0\0",
    "an orientation of 99": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
}


def encoded(format, image=None, **options):
    image = image or Image.new("RGB", (8, 8), RED)
    image.save(into := io.BytesIO(), format, **options)
    return into.getvalue()


def png(width, height, depth, color_type, rows, *chunks):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("case", BROKEN_EXIF)
def test_image_with_broken_exif_is_read_as_stored(format, case):
    content = encoded(format, exif=BROKEN_EXIF[case])
    assert np.abs(np.subtract(load_image(content).getpixel((4, 4)), RED)).max() < 4


def test_16_bit_channels_keep_their_colour():
    assert load_image(png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 65535, 128 * 257, 0))).getpixel((0, 0)) == (
        255,
        128,
        0,
    )
    assert load_image(png(1, 1, 16, 6, b"\0" + struct.pack(">HHHH", 65535, 0, 0, 0))).getpixel((0, 0)) == (255,) * 3


def test_transparent_16_bit_grey_becomes_white():
    rows = b"\0" + struct.pack(">HHH", 7, 0, 65535)
    image = load_image(png(3, 1, 16, 0, rows, (b"tRNS", struct.pack(">H", 7))))
    assert np.asarray(image)[0, :, 0].tolist() == [255, 0, 255]


def test_transparent_palette_is_blended_with_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    pixels = np.asarray(load_image(encoded("PNG", image, transparency=bytes([51, 255])))).tolist()
    assert pixels == [[[255, 204, 204], [0, 255, 0]]]


@pytest.mark.parametrize("read", ["file", "bytes"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (png(0, 0, 8, 2, b""), "does not decode as image/png"),
        (png(100, 100, 8, 2, b"\0\1\2"), "truncated"),
        (encoded("JPEG", Image.effect_noise((64, 64), 50))[:-300], "truncated"),
        (
            b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:1/x"/><text>&x;</text></svg>',
            r"image/svg\+xml.*Convert it",
        ),
    ],
)
def test_incomplete_image_is_refused(tmp_path, content, words, read):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ImageError, match=words):
        load_image(content) if read == "bytes" else read_corpus(tmp_path)


def test_huge_compressed_png_text_is_refused():
    info = PngImagePlugin.PngInfo()
    info.add_text("k", "x" * 20_000_000, zip=True)
    content = encoded("PNG", pnginfo=info)
    assert len(content) < 100_000
    with pytest.raises(ImageError, match="too large"):
        load_image(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Image was not the expected size")
def test_icon_with_a_decompression_bomb_is_refused(monkeypatch):
    """The header of the icon declares 16 x 16."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    large = png(130, 130, 8, 0, (b"\0" + bytes(130)) * 130)
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(large), 22) + large
    with pytest.raises(ImageError, match="more than 10000 pixels"):
        load_image(icon)


NAMES = [
    "a\nb.png",
    "\u202egnp.exe.png",
    "\u05d0\u05d1.png",
    "🙂\u200d↕️.png",
    "é" * 125 + "x.png",
    "-rf.png",
    " .png",
    "e\u0301.png",
    "\xe9.png",
]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse some of the names")
def test_names_with_any_characters_are_read_unchanged(tmp_path):
    for name in NAMES:
        (tmp_path / name).write_bytes(encoded("PNG"))
    assert [record.file_name for record in read_corpus(tmp_path)] == sorted(NAMES)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems treat them as one file")
def test_names_that_differ_in_case_are_two_images(tmp_path):
    for name in ("A.png", "a.png"):
        (tmp_path / name).write_bytes(encoded("PNG"))
    assert [record.image_id for record in read_corpus(tmp_path)] == ["A", "a"]
    (tmp_path / "a.PNG").write_bytes(encoded("PNG"))
    with pytest.raises(DuplicateImage, match=r"'a\.png' has the image_id 'a', which 'a\.PNG' already has"):
        read_corpus(tmp_path)


def test_folder_with_the_suffix_of_an_image_is_a_folder(tmp_path):
    (tmp_path / "x.png").mkdir()
    (tmp_path / "x.png" / "y.png").write_bytes(encoded("PNG"))
    assert [record.file_name for record in read_corpus(tmp_path)] == ["x.png/y.png"]


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no devices on this system")
def test_link_to_a_device_is_refused_unread(tmp_path):
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    with pytest.raises(UnsafePath, match="link out of the folder"):
        read_corpus(tmp_path)
