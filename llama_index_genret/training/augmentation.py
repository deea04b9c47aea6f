"""Style augmentation of images: flat colours, dark outlines, shifted hues, another size.

Depends on images; independent of models and training. Restyled versions keep a model from memorising the style of one
rendering instead of the shape of the object.
Source: stylised training images of Geirhos et al. (arXiv:1811.12231), here with palettes and edges instead of a second
network.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

from llama_index_genret.corpus.images import load_image

SMALLEST, LARGEST = 0.7, 1.1
"""Range of the scale factor."""
MOST_TURNED = 12
"""Maximum rotation in degrees, in either direction."""
FEWEST_COLOURS, MOST_COLOURS = 4, 12
"""Range of the palette size."""
MOST_HUE = 24
"""Maximum shift of the hue in either direction. The circle of hues has 256 steps."""
LARGEST_SIDE = 512
"""Maximum side of a redrawn image in pixels, so that outlines 1 to 3 pixels wide stay visible."""
EDGE = 40
"""Edge strength, from 0 to 255, above which an outline is drawn."""


def load_version(path: Path, row: int, version: int, *, seed: int) -> Image.Image:
    """Load the image for version 0; `redraw` it for any other version, with a seed from `seed`, `row` and `version`.

    Raises:
        ImageError: see `load_image`.
    """
    image = load_image(path)
    return redraw(image, seed=(seed, row, version)) if version else image


def redraw(image: Image.Image, *, seed: tuple[int, ...]) -> Image.Image:
    """Return a restyled RGB copy with sides of at most LARGEST_SIDE pixels. Equal seeds give equal results.

    The content is rotated and scaled a little, and the corner colour fills the background. Each further step has a
    probability: reduction to a few flat colours, outlines between colours, a shift of the hues, a change of saturation.

    Args:
        image: an image of any size and mode.
    """
    draw = np.random.default_rng(seed)
    image = _move(_shrink(image.convert("RGB")), draw)
    flat = image
    if draw.random() < 0.8:
        flat = _flatten(image, int(draw.integers(FEWEST_COLOURS, MOST_COLOURS, endpoint=True)))
    outlines = _outlines(flat, width=int(draw.integers(1, 3, endpoint=True))) if draw.random() < 0.7 else None
    recoloured = _recolour(flat, draw)
    return ImageChops.multiply(recoloured, outlines) if outlines else recoloured


def _shrink(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return small


def _move(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    width, height = image.size
    background = image.getpixel((0, 0))
    scale = draw.uniform(SMALLEST, LARGEST)
    across, down = (draw.uniform(-0.5, 0.5) * max(0.0, 1 - scale) * length for length in (width, height))
    angle = np.deg2rad(draw.uniform(-MOST_TURNED, MOST_TURNED))
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    middle_x, middle_y = width / 2, height / 2
    x, y = middle_x + across, middle_y + down
    matrix = (cos, sin, middle_x - cos * x - sin * y, -sin, cos, middle_y + sin * x - cos * y)
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=background
    )


def _flatten(image: Image.Image, n_colours: int) -> Image.Image:
    """Reduce an image to a palette, at half the size, which takes a fifth of the time."""
    half = image.reduce(2).filter(ImageFilter.MedianFilter(3))
    few = half.quantize(n_colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    return few.resize(image.size, Image.Resampling.BICUBIC)


def _outlines(image: Image.Image, *, width: int) -> Image.Image:
    """Return a white image with dark lines where neighbouring colours differ by more than EDGE."""
    edges = image.filter(ImageFilter.FIND_EDGES)
    strongest = ImageChops.lighter(ImageChops.lighter(*edges.split()[:2]), edges.split()[2])
    right, bottom = strongest.width - 1, strongest.height - 1
    ImageDraw.Draw(strongest).rectangle((0, 0, right, bottom), outline=0)  # the filter leaves the border as it was
    lines = strongest.point([255 if level > EDGE else 0 for level in range(256)])
    thick = lines.filter(ImageFilter.MaxFilter(2 * width - 1)) if width > 1 else lines
    return ImageChops.invert(thick.filter(ImageFilter.GaussianBlur(0.6))).convert("RGB")


def _recolour(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    if draw.random() < 0.5:
        turn = int(draw.integers(-MOST_HUE, MOST_HUE, endpoint=True))
        hue = hue.point([(level + turn) % 256 for level in range(256)])
    image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    image = ImageEnhance.Color(image).enhance(0.0 if draw.random() < 0.1 else draw.uniform(0.6, 1.5))
    return ImageEnhance.Brightness(image).enhance(draw.uniform(1.0, 1.25))
