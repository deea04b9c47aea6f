"""Detect the type of one image file by its content, and decode it to RGB.

Depends on Pillow and `filetype`; independent of folders, metadata and models.
"""

from __future__ import annotations

import base64
import hashlib
from io import BytesIO
from pathlib import Path

import filetype
import numpy as np
from PIL import ExifTags, Image

from llama_index_genret.errors import ImageError

# The detected type selects the one Pillow decoder that reads a file. Decoders that run programs or recognise their
# files weakly are left out: EPS calls Ghostscript, TGA has no signature.
_DECODERS = {
    "image/avif": "AVIF",
    "image/bmp": "BMP",
    "image/gif": "GIF",
    "image/jpeg": "JPEG",
    "image/jpx": "JPEG2000",
    "image/png": "PNG",
    "image/tiff": "TIFF",
    "image/webp": "WEBP",
    "image/x-icon": "ICO",
    "image/x-portable-anymap": "PPM",
}


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that makes an image upright, by its EXIF orientation."""


def load_image(source: Path | str | bytes) -> Image.Image:
    """Decode an image file, or the bytes of one, to RGB with 8 bits per channel.

    The image is turned upright by its EXIF orientation. Transparency becomes white. An animation gives its first frame.
    16-bit grey is scaled by 255/65535. Wider integers and floats define no white, so their range is stretched.

    Args:
        source: a path, or the content of a file.
    Raises:
        ImageError: the file is missing, damaged, too large (`PIL.Image.MAX_IMAGE_PIXELS`), or not a raster image.
    """
    if isinstance(source, bytes):
        return _decode(BytesIO(source), _mime_of(source[:8192]), "an image", len(source))
    return decode_image(Path(source))


def sniff_mime(source: Path | str | bytes) -> str:
    """Return the MIME type of a file by its content. The suffix does not matter; unknown: `application/octet-stream`.

    Raises:
        ImageError: the file is missing or cannot be read.
    """
    return _mime_of(source[:8192]) if isinstance(source, bytes) else _sniff(Path(source), "")


def to_data_url(source: Path | bytes) -> str:
    """Return a `data:` URL with the unchanged bytes of an image file.

    Args:
        source: a path, or the content of a file.
    Raises:
        ImageError: the file is missing, or its content is not a raster image.
    """
    mime = sniff_mime(source)
    content = source if isinstance(source, bytes) else source.read_bytes()
    if mime not in _DECODERS:
        raise _no_raster("an image" if isinstance(source, bytes) else str(source), len(content), mime)
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def from_data_url(url: str) -> bytes:
    """Return the bytes in a base64 `data:` URL.

    Raises:
        ImageError: `url` is not a base64 `data:` URL.
    """
    head, comma, body = url.partition(",")
    try:
        if not comma or not head.startswith("data:") or not head.endswith(";base64"):
            raise ValueError("it does not begin with data:...;base64,")
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        scheme = url.partition(":")[0] if ":" in url[:12] else "something else"  # the rest may hold a key
        raise ImageError(
            f"the image is not a `data:image/...;base64,` URL ({scheme}, {len(url)} characters: {error}). "
            "Nothing is fetched from an address or a file: send the content."
        ) from None


def image_sha256(path: Path | str) -> str:
    """Return the SHA-256 of the file's bytes as 64 hex digits. Reads 1 MiB at a time."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _sniff(path: Path, where: str) -> str:
    scheme, colon, _ = str(path).partition(":")
    if colon and scheme in ("data", "http", "https", "file"):  # not shown: it may hold an image or a key
        raise ImageError(
            f"{where}expected the path of a file, not a {scheme}: address ({len(str(path))} characters). "
            "Nothing is fetched: save the image and give its path."
        )
    try:
        if not path.is_file():
            raise ImageError(f"{where}{path} is missing or not a regular file: restore it, or remove its entry.")
        with path.open("rb") as file:
            head = file.read(8192)
    except (OSError, ValueError) as error:
        raise ImageError(f"{where}{str(path)!r} cannot be read: {error}. Check its name and permissions.") from error
    return _mime_of(head)


def _mime_of(head: bytes) -> str:
    if head[:1] == b"P" and head[1:2] in {b"1", b"2", b"3", b"4", b"5", b"6"} and head[2:3].isspace():
        return "image/x-portable-anymap"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<" and b"<svg" in head.lower():
        return "image/svg+xml"
    kind = filetype.guess(head) if head else None
    mime = str(kind.mime) if kind else "application/octet-stream"
    return "image/png" if mime == "image/apng" else mime


def decode_image(path: Path, where: str = "") -> Image.Image:
    """Decode like `load_image`, with `where` before the message of an error."""
    return _decode(path, _sniff(path, where), f"{where}{path}", path.stat().st_size)


def _decode(source: Path | BytesIO, mime: str, name: str, size: int) -> Image.Image:
    if mime not in _DECODERS:
        raise _no_raster(name, size, mime)
    too_large = f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS): shrink it."
    try:
        with Image.open(source, formats=[_DECODERS[mime]]) as image:
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ImageError(too_large)
            image.load()
            return _to_rgb(_upright(image))
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(too_large) from error
    except Exception as error:  # decoders raise errors of many types on damaged files
        raise ImageError(
            f"{name} does not decode as {mime}: {type(error).__name__}: {error}. Restore it, or remove it."
        ) from error


def _no_raster(name: str, size: int, mime: str) -> ImageError:
    return ImageError(
        f"{name} is not a readable raster image: its content ({size} bytes) is {mime}. "
        "Convert it to PNG or JPEG, or remove it."
    )


def _upright(image: Image.Image) -> Image.Image:
    """Turn the image upright by its EXIF orientation; keep it as stored if the EXIF is unreadable."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the parser raises errors of many types on damaged EXIF
        return image
    transposition = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if transposition is None else image.transpose(transposition)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0.0, neginf=0.0)
        low, high = values.min(), values.max()
        if image.mode != "F" and low >= 0 and high <= 65535:
            low, high = 0, 65535
        grey = np.rint((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)
        if isinstance(image.info.get("transparency"), int):
            grey[values == image.info["transparency"]] = 255
        image = Image.fromarray(grey)
    if image.mode in {"LA", "RGBA"} or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
