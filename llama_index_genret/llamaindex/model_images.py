"""Provide the image file that a model reads: upright, RGB, and scaled down to a limit.

A plain PNG or JPEG within the limit is used unchanged. Any other image is decoded, scaled down and written once to a
temporary folder of this process. A changed file is converted again.

Depends on Pillow and files; independent of models and LlamaIndex.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock

from PIL import Image

from llama_index_genret.corpus.images import load_image, sniff_mime
from llama_index_genret.errors import ImageError

MAX_IMAGE_PIXELS = 2**20
"""Default limit of pixels per image: about as many as today's models read of one image."""

MAX_COPIES = 1000
"""Largest number of cached images."""

_PLAIN = {"image/png": "PNG", "image/jpeg": "JPEG"}
_ORIENTATION = 0x0112
_JPEG_QUALITY = 90


@dataclass(frozen=True)
class ModelImage:
    """A PNG or JPEG file that any server reads. width, height: in pixels."""

    path: Path
    mime: str
    width: int
    height: int


def model_image(source: Path | bytes, *, max_pixels: int | None = MAX_IMAGE_PIXELS) -> ModelImage:
    """Return the file that a model reads for an image.

    Args:
        source: an image file, or the content of one.
        max_pixels: a larger image is scaled down in proportion. Default `MAX_IMAGE_PIXELS`, None for no limit.

    Raises:
        ImageError: the file is missing, damaged, too large (`PIL.Image.MAX_IMAGE_PIXELS`), or no raster image.
    """
    if max_pixels is not None and max_pixels < 1:
        raise ImageError(f"expected at least 1 or None (no limit), got max_image_pixels={max_pixels}.")
    return _CACHE.get(source, max_pixels)


class _ModelImageCache:
    """A cache of the `MAX_COPIES` images used last, keyed by content or by path, inode, size and modification time."""

    def __init__(self) -> None:
        self._pictures: OrderedDict[str, ModelImage] = OrderedDict()
        self._lock = Lock()

    def get(self, source: Path | bytes, max_pixels: int | None) -> ModelImage:
        key = _key(source, max_pixels)
        with self._lock:
            known = self._pictures.get(key)
            if known is not None and known.path.is_file():
                self._pictures.move_to_end(key)
                return known
        picture = _plain(source, max_pixels) or self._copy(source, max_pixels, key)
        with self._lock:
            self._pictures[key] = picture
            while len(self._pictures) > MAX_COPIES:
                _, oldest = self._pictures.popitem(last=False)
                if oldest.path.parent == self._folder:
                    oldest.path.unlink(missing_ok=True)
        return picture

    def _copy(self, source: Path | bytes, max_pixels: int | None, key: str) -> ModelImage:
        image = load_image(source)
        if max_pixels is not None and image.width * image.height > max_pixels:
            image = image.resize(_fit_size(image.width, image.height, max_pixels), Image.Resampling.LANCZOS)
        mime = "image/jpeg" if sniff_mime(source) == "image/jpeg" else "image/png"
        path = self._folder / f"{key}.{_PLAIN[mime].lower()}"
        temporary = self._folder / uuid.uuid4().hex  # two threads may write the same copy
        image.save(temporary, _PLAIN[mime], quality=_JPEG_QUALITY)
        temporary.replace(path)
        return ModelImage(path, mime, image.width, image.height)

    @cached_property
    def _folder(self) -> Path:
        self._removed_at_exit = tempfile.TemporaryDirectory(prefix="genret-pictures-")
        return Path(self._removed_at_exit.name)


_CACHE = _ModelImageCache()


def _key(source: Path | bytes, max_pixels: int | None) -> str:
    if isinstance(source, bytes):
        stamp = hashlib.sha256(source).hexdigest()
    else:
        try:
            status = source.stat()
        except (OSError, ValueError) as error:
            raise ImageError(f"{source} is missing or cannot be read: {error}. Restore it.") from error
        stamp = f"{source.absolute()} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(f"{stamp} {max_pixels}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _plain(source: Path | bytes, max_pixels: int | None) -> ModelImage | None:
    """Return the file itself if any server reads it correctly, else None. Decoding it raises ImageError if damaged."""
    mime = sniff_mime(source)
    if isinstance(source, bytes) or mime not in _PLAIN:
        return None
    upright = load_image(source)
    with Image.open(source, formats=[_PLAIN[mime]]) as image:
        plain = image.mode in {"RGB", "L"} and "transparency" not in image.info
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    if not plain or turned or (max_pixels is not None and upright.width * upright.height > max_pixels):
        return None
    return ModelImage(source.absolute(), mime, upright.width, upright.height)


def _fit_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return the largest (width, height) of at most `max_pixels` in proportion, with sides of at least one pixel."""
    scale = math.sqrt(max_pixels / (width * height))
    low = max(1, int(height * scale))
    narrow = min(max(1, int(width * scale)), max_pixels // low)
    return narrow, min(low, max_pixels // narrow)
