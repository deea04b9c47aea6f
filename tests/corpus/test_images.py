"""`load_image` decodes every raster format to RGB, and raises ImageError for all other files."""

from __future__ import annotations

import contextlib
import hashlib
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llama_index_genret.corpus import read_corpus
from llama_index_genret.corpus.images import image_sha256, load_image, sniff_mime
from llama_index_genret.errors import ImageError
from tests.corpus.conftest import RED, save

WHITE = (255, 255, 255)

# Files that are not images


def noise(path: Path, **options: object) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_a_truncated_image_with_a_whole_header_is_an_error(tmp_path, suffix):
    path = noise(tmp_path / f"x.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(ImageError, match=rf"x\.{suffix} does not decode as image/"):
        read_corpus(tmp_path)


@pytest.mark.parametrize(
    ("content", "mime"),
    [
        (b"", "application/octet-stream"),
        (b"plain text, whatever the suffix says", "application/octet-stream"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "image/svg+xml"),
        (b"\xef\xbb\xbf  <svg/>", "image/svg+xml"),
        (b"%PDF-1.7\n", "application/pdf"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "application/"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "image/heic"),
    ],
)
def test_a_file_of_another_type_is_an_error_with_its_type(folder, content, mime):
    (folder / "a.png").write_bytes(content)
    assert sniff_mime(folder / "a.png").startswith(mime)
    with pytest.raises(ImageError, match=rf"a\.png is not a readable raster image.*{re.escape(mime)}.* Convert it"):
        read_corpus(folder)


@pytest.mark.parametrize("name", ["logo.svg", "photo.HEIC"])
def test_an_image_that_needs_converting_is_an_error(folder, name):
    (folder / name).write_bytes(b"<svg/>")
    with pytest.raises(ImageError, match=name):
        read_corpus(folder)


def test_the_content_decides_not_the_suffix(folder):
    save(folder / "sub" / "x.png", color=(0, 255, 0)).rename(folder / "a.jpg")
    (folder / "a.png").unlink()
    assert sniff_mime(folder / "a.jpg") == "image/png"
    assert load_image(read_corpus(folder).by_id["a"].path).getpixel((0, 0)) == (0, 255, 0)


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data_follows = struct.pack(">I", 1000) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data_follows


@pytest.mark.parametrize("side", [9_500, 60_000])
@pytest.mark.parametrize("warnings_are", ["ignore", "error"])
def test_a_decompression_bomb_is_refused_before_decoding(tmp_path, side, warnings_are):
    """Pillow only warns at 9500 x 9500, and raises an error at 60000 x 60000."""
    (tmp_path / "x.png").write_bytes(png_header(side, side))
    message = rf"x\.png has more than {Image.MAX_IMAGE_PIXELS} pixels"
    with warnings.catch_warnings():
        warnings.simplefilter(warnings_are)
        with pytest.raises(ImageError, match=message):
            read_corpus(tmp_path)


def test_the_size_limit_is_pillows_own(tmp_path, monkeypatch):
    save(tmp_path / "x.png", size=(11, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(tmp_path / "x.png").size == (11, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 110)
    assert load_image(tmp_path / "x.png").size == (11, 10)


@given(st.binary(max_size=200), st.sampled_from(["png", "gif", "bmp", "ppm", "webp", "ico", "tiff", "jpg"]))
def test_damage_is_always_an_image_error(tmp_path_factory, damage, suffix):
    """Random bytes after a valid beginning raise no error other than ImageError."""
    folder = tmp_path_factory.mktemp("damaged")
    path = noise(folder / f"x.{suffix}")
    path.write_bytes(path.read_bytes()[:40] + damage)
    with contextlib.suppress(ImageError):
        assert load_image(path).mode == "RGB"


# load_image, sniff_mime, image_sha256


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path, orientation):
    """Each orientation stores one upright image as a camera held in that way saves it."""
    upright = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]], [[99, 99, 99], [200, 0, 200]]], np.uint8)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo(upright))).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "x.png")), upright)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path, mode):
    pixels = np.array([[[0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    image = Image.fromarray(pixels)
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "x.png")
    assert np.asarray(load_image(tmp_path / "x.png")).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_colour_declared_transparent_becomes_white(tmp_path, mode):
    Image.new(mode, (2, 2), 0).save(tmp_path / "x.png", transparency=0 if mode == "L" else (0, 0, 0))
    assert load_image(tmp_path / "x.png").getpixel((0, 0)) == WHITE


def test_half_transparent_is_mixed_with_white(tmp_path):
    save(tmp_path / "x.png", color=(255, 0, 0, 51))
    assert load_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 204, 204)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB"])
def test_every_opaque_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / {"CMYK": "x.tiff", "YCbCr": "x.jpg"}.get(mode, "x.png")  # Pillow 11 cannot read its YCbCr TIFF
    Image.new("RGB", (8, 6), WHITE).convert(mode).save(path)
    image = load_image(path)
    assert (image.mode, image.size, image.getpixel((3, 3))) == ("RGB", (8, 6), WHITE)


def test_a_cmyk_jpeg_keeps_its_colour(tmp_path):
    Image.new("RGB", (16, 16), RED).convert("CMYK").save(tmp_path / "x.jpg", quality=100)
    assert np.abs(np.subtract(load_image(tmp_path / "x.jpg").getpixel((8, 8)), RED)).max() < 12


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 1000, 128 * 257]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    assert np.asarray(load_image(tmp_path / f"x.{suffix}"))[0, :, 0].tolist() == [0, 4, 128]


@pytest.mark.parametrize(
    "values", [[-1.0, 0.0, 1.0], [float("nan"), 0.0, 0.0], [0, 500_000, 1_000_000], [5.0, 5.0, 5.0]]
)
def test_wide_integers_and_floats_are_stretched(tmp_path, values):
    array = np.array([values], np.float32 if isinstance(values[0], float) else np.int32)
    Image.fromarray(array).save(tmp_path / "x.tiff")
    grey = np.asarray(load_image(tmp_path / "x.tiff"))[0, :, 0].tolist()
    assert grey == ([0, 0, 0] if len(set(values[1:])) == 1 else [0, 128, 255])


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, (0, 0, 255))]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    assert np.abs(np.subtract(load_image(tmp_path / f"x.{suffix}").getpixel((4, 4)), RED)).max() < 8


@pytest.mark.parametrize("read", [load_image, sniff_mime])
def test_a_missing_image_is_named(tmp_path, read):
    with pytest.raises(ImageError, match=r"gone\.png is missing"):
        read(tmp_path / "gone.png")


@pytest.mark.parametrize(
    ("suffix", "mime"),
    [("png", "png"), ("jpg", "jpeg"), ("gif", "gif"), ("webp", "webp"), ("bmp", "bmp"), ("tiff", "tiff")],
)
def test_the_type_is_sniffed(tmp_path, suffix, mime):
    save(tmp_path / f"x.{suffix}").rename(tmp_path / "x")
    assert sniff_mime(tmp_path / "x") == f"image/{mime}"


def test_a_large_file_is_hashed_in_pieces_like_its_bytes(tmp_path):
    content = bytes(range(256)) * 10_000
    (tmp_path / "x").write_bytes(content)
    assert image_sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()
