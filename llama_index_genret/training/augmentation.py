"""The same picture as somebody else might have drawn it: flat colours, dark outlines, other hues, another size.

Knows pictures; nothing of models or training. A model that has seen one rendering of a thing knows that rendering;
one that has seen it redrawn knows its shape.
Source: style as what a network should not go by, of Geirhos et al. (arXiv:1811.12231); here by palettes and edges,
which need no second network.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

from llama_index_genret.corpus.images import load_image

SMALLEST, LARGEST = 0.7, 1.1
"""Size of the redrawn thing, as a multiple of the old one."""
MOST_TURNED = 12
"""Degrees."""
FEWEST_COLOURS, MOST_COLOURS = 4, 12
MOST_HUE = 24
"""Of 256 around the circle of hues, either way."""
LARGEST_SIDE = 512
"""Of a redrawn picture, in pixels: lines of one to three are to be seen."""
EDGE = 40
"""Of 255: colours that differ by more have a line between them."""


def load_version(path: Path, row: int, version: int, *, seed: int) -> Image.Image:
    """Version 0 of the picture of image `row` is the picture; any other is `redraw`, the same for the same seed.

    Raises:
        what `load_image` does.
    """
    picture = load_image(path)
    return redraw(picture, seed=(seed, row, version)) if version else picture


def redraw(picture: Image.Image, *, seed: tuple[int, ...]) -> Image.Image:
    """Another picture of the same thing, RGB, of LARGEST_SIDE at most; the same for the same seed.

    Turned and scaled a little, on the colour of its border; then, each by chance: painted in few flat colours, outlined
    where colours meet, its hues turned, its colours strengthened or taken away.

    Args:
        picture: RGB of any size.
    """
    draw = np.random.default_rng(seed)
    picture = _move(_shrink(picture.convert("RGB")), draw)
    flat = picture
    if draw.random() < 0.8:
        flat = _flat(picture, int(draw.integers(FEWEST_COLOURS, MOST_COLOURS, endpoint=True)))
    outlines = _outlines(flat, width=int(draw.integers(1, 3, endpoint=True))) if draw.random() < 0.7 else None
    painted = _recolour(flat, draw)
    return ImageChops.multiply(painted, outlines) if outlines else painted


def _shrink(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return small


def _move(picture: Image.Image, draw: np.random.Generator) -> Image.Image:
    width, height = picture.size
    ground = picture.getpixel((0, 0))
    scale = draw.uniform(SMALLEST, LARGEST)
    across, down = (draw.uniform(-0.5, 0.5) * max(0.0, 1 - scale) * length for length in (width, height))
    angle = np.deg2rad(draw.uniform(-MOST_TURNED, MOST_TURNED))
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    middle_x, middle_y = width / 2, height / 2
    x, y = middle_x + across, middle_y + down
    matrix = (cos, sin, middle_x - cos * x - sin * y, -sin, cos, middle_y + sin * x - cos * y)
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=ground
    )


def _flat(picture: Image.Image, n_colours: int) -> Image.Image:
    """Computed at half the size, which takes a fifth of the time."""
    half = picture.reduce(2).filter(ImageFilter.MedianFilter(3))
    few = half.quantize(n_colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    return few.resize(picture.size, Image.Resampling.BICUBIC)


def _outlines(picture: Image.Image, *, width: int) -> Image.Image:
    """White, and dark where neighbouring colours differ much."""
    edges = picture.filter(ImageFilter.FIND_EDGES)
    strongest = ImageChops.lighter(ImageChops.lighter(*edges.split()[:2]), edges.split()[2])
    right, bottom = strongest.width - 1, strongest.height - 1
    ImageDraw.Draw(strongest).rectangle((0, 0, right, bottom), outline=0)  # the filter leaves the border as it was
    lines = strongest.point([255 if level > EDGE else 0 for level in range(256)])
    thick = lines.filter(ImageFilter.MaxFilter(2 * width - 1)) if width > 1 else lines
    return ImageChops.invert(thick.filter(ImageFilter.GaussianBlur(0.6))).convert("RGB")


def _recolour(picture: Image.Image, draw: np.random.Generator) -> Image.Image:
    hue, saturation, value = picture.convert("HSV").split()
    if draw.random() < 0.5:
        turn = int(draw.integers(-MOST_HUE, MOST_HUE, endpoint=True))
        hue = hue.point([(level + turn) % 256 for level in range(256)])
    picture = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    picture = ImageEnhance.Color(picture).enhance(0.0 if draw.random() < 0.1 else draw.uniform(0.6, 1.5))
    return ImageEnhance.Brightness(picture).enhance(draw.uniform(1.0, 1.25))
