"""Draws an identifier tree: one band per first symbol, in it one box per second symbol, in the box its images.

Depends on identifiers, image files and Pillow; independent of indexes and models. The plot is deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import ImageError
from llama_index_genret.files import make_folder, write_file, writing
from llama_index_genret.identifiers.base import Identifier

WIDTH = 1440
MARGIN, GAP, PADDING = 24, 10, 8
THUMBNAIL = 64
LABEL_WIDTH = 150
HEADER = 62
"""Height of the title and the line of figures."""

CAPTION = 22
"""Height of the line above the thumbnails of a box."""

MOST_IN_BOX, MOST_BOXES, MOST_BANDS = 6, 24, 60
"""Largest number of images per box, boxes per band, and bands. A label counts the rest."""

PAGE, PAPER, INK, FAINT, LINE = "#ffffff", "#f6f7f9", "#1b1f24", "#687076", "#d5d9de"
COLOURS = ("#3b6fb6", "#c2571a", "#2f8f5b", "#8a4fb0", "#b3364c", "#0f8a99", "#8c7413", "#5a6570")


@dataclass(frozen=True)
class Box:
    """The layout of one node of the second level.

    label: the second symbol.
    rows: rows of all its images, in drawing order.
    x: left edge in pixels, within the band.
    y: top edge in pixels, within the band.
    """

    label: str
    rows: tuple[int, ...]
    x: int
    y: int

    @property
    def width(self) -> int:
        """Return the width in pixels: the thumbnails shown, and space for a count of the rest."""
        shown = min(len(self.rows), MOST_IN_BOX)
        return 2 * PADDING + shown * THUMBNAIL + (shown - 1) * PADDING + (THUMBNAIL if self.hidden else 0)

    @property
    def hidden(self) -> int:
        """Return the number of images that are counted but not shown."""
        return len(self.rows) - min(len(self.rows), MOST_IN_BOX)


@dataclass(frozen=True)
class Band:
    """The layout of one node of the first level.

    label: the first symbol.
    n_images: number of all its images.
    n_boxes: number of all its second symbols.
    boxes: the boxes that are shown.
    height: in pixels.
    """

    label: str
    n_images: int
    n_boxes: int
    boxes: tuple[Box, ...]
    height: int

    @property
    def hidden_images(self) -> int:
        """Return the number of images in boxes that are not shown."""
        return self.n_images - sum(len(box.rows) for box in self.boxes)


BOX_HEIGHT = CAPTION + THUMBNAIL + 2 * PADDING
INNER = WIDTH - 2 * MARGIN - LABEL_WIDTH
"""Width in pixels for the boxes of a band."""


def draw_tree(identifiers: Sequence[Identifier], images: Sequence[Path], out: Path, *, title: str = "") -> None:
    """Write a PNG that is WIDTH pixels wide and as tall as needed.

    Args:
        identifiers: one for each image, with readable symbols.
        images: the image file of each identifier. A broken file is drawn as a grey square.
        out: the PNG. Missing folders are created.
        title: default "": "Identifiers".
    Raises:
        NotWritten: `out` is a folder, or the disk is full or read-only.
    """
    bands = layout(identifiers)
    shown = bands[:MOST_BANDS]
    rest = len(bands) - len(shown)
    height = 2 * MARGIN + HEADER + sum(band.height + GAP for band in shown) + (CAPTION if rest else 0)
    canvas = Image.new("RGB", (WIDTH, height), PAGE)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN - 4), _shorten(title or "Identifiers", 26, WIDTH - 2 * MARGIN), INK, _font(26))
    nodes = sum(band.n_boxes for band in bands)
    facts = f"{len(identifiers):,} images · {len(bands):,} first symbols · {nodes:,} prefixes of two symbols"
    draw.text((MARGIN, MARGIN + 28), facts, FAINT, _font(15))
    y = MARGIN + HEADER
    for number, band in enumerate(shown):
        _draw_band(canvas, draw, band, y, COLOURS[number % len(COLOURS)], images)
        y += band.height + GAP
    if rest:
        left = sum(band.n_images for band in bands[MOST_BANDS:])
        draw.text((MARGIN, y), f"+ {rest:,} more first symbols with {left:,} images", FAINT, _font(15))
    content = BytesIO()
    canvas.save(content, "PNG")
    with writing(out):
        make_folder(out.parent)
        write_file(out, content.getvalue())


def layout(identifiers: Sequence[Identifier]) -> list[Band]:
    """Return the bands in the order of their symbols. The boxes of each wrap into rows of INNER pixels."""
    tree: dict[str, dict[str, list[int]]] = {}
    for row in sorted(range(len(identifiers)), key=lambda row: [_natural(symbol) for symbol in identifiers[row]]):
        first, second = (*identifiers[row], "")[:2]
        tree.setdefault(first, {}).setdefault(second, []).append(row)
    bands = []
    for first, children in tree.items():
        boxes: list[Box] = []
        x = y = 0
        for second, rows in list(children.items())[:MOST_BOXES]:
            box = Box(second, tuple(rows), 0, 0)
            if x and x + box.width > INNER:
                x, y = 0, y + BOX_HEIGHT + GAP
            boxes.append(Box(second, tuple(rows), x, y))
            x += box.width + GAP
        n_images = sum(map(len, children.values()))
        more = CAPTION if len(children) > MOST_BOXES else 0
        bands.append(Band(first, n_images, len(children), tuple(boxes), y + BOX_HEIGHT + 2 * PADDING + more))
    return bands


def _draw_band(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, band: Band, top: int, colour: str, images: Sequence[Path]
) -> None:
    draw.rounded_rectangle((MARGIN, top, WIDTH - MARGIN, top + band.height - 1), 8, PAPER)
    draw.rounded_rectangle((MARGIN, top, MARGIN + 6, top + band.height - 1), 3, colour)
    draw.text(
        (MARGIN + 18, top + PADDING + 2), _shorten(band.label or "(end)", 20, LABEL_WIDTH - 26), colour, _font(20)
    )
    noun = "image" if band.n_images == 1 else "images"
    draw.text((MARGIN + 18, top + PADDING + 30), f"{band.n_images:,} {noun}", FAINT, _font(14))
    left = MARGIN + LABEL_WIDTH
    for box in band.boxes:
        _draw_box(canvas, draw, box, left + box.x, top + PADDING + box.y, images)
    if band.n_boxes > len(band.boxes):
        more = f"+ {band.n_boxes - len(band.boxes):,} more second symbols with {band.hidden_images:,} images"
        draw.text((left, top + band.height - CAPTION - 2), more, FAINT, _font(14))


def _draw_box(canvas: Image.Image, draw: ImageDraw.ImageDraw, box: Box, x: int, y: int, images: Sequence[Path]) -> None:
    draw.rounded_rectangle((x, y, x + box.width - 1, y + BOX_HEIGHT - 1), 6, PAGE, LINE)
    label = _shorten(box.label or "(end)", 13, box.width - 2 * PADDING)
    draw.text((x + PADDING, y + 5), label, FAINT, _font(13))
    at = x + PADDING
    for row in box.rows[:MOST_IN_BOX]:
        canvas.paste(_thumbnail(images[row]), (at, y + CAPTION + PADDING // 2))
        at += THUMBNAIL + PADDING
    if box.hidden:
        draw.text((at, y + CAPTION + THUMBNAIL // 2 - 12), f"+{box.hidden:,}", INK, _font(15))
        draw.text((at, y + CAPTION + THUMBNAIL // 2 + 6), "more", FAINT, _font(13))


def _thumbnail(path: Path) -> Image.Image:
    try:
        image = ImageOps.contain(load_image(path), (THUMBNAIL, THUMBNAIL))
    except ImageError:
        return Image.new("RGB", (THUMBNAIL, THUMBNAIL), LINE)
    return ImageOps.pad(image, (THUMBNAIL, THUMBNAIL), color=PAGE)


def _shorten(text: str, size: int, width: int) -> str:
    """Return the text, shortened with an ellipsis if it is wider than `width` pixels."""
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _natural(symbol: str) -> tuple[str, int, str]:
    """Return a sort key that puts `<g0_9>` before `<g0_10>`: the text before the last number, then the number."""
    body = symbol.rstrip(">")
    head = body.rstrip("0123456789")
    number = body[len(head) :]
    return (head, int(number) if number.isascii() and number else -1, symbol)
