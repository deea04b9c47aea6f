"""Draw recalled images: a row for each query, with its images in order.

Below each image are its caption and its score, as a number and as a share of the best.
"""

from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path

from IPython.display import Image as Shown
from llama_index.core.schema import NodeWithScore
from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, LABEL, TEXT, LINE = 120, 16, 250, 19, 25
INK, FAINT, BAR, TRACK = "#1b1f24", "#687076", "#2f8f5b", "#e4e7eb"

Item = NodeWithScore | tuple[Path | str, str]


def strips(rows: Mapping[str, Iterable[Item]]) -> Shown:
    """Draw a row for each label: recalled nodes with captions and scores, or pairs of an image and a text."""
    rows = {label: list(items) for label, items in rows.items()}
    label = LABEL if any(rows) else 0
    height = SIDE + 2 * LINE + 12 + GAP
    width = GAP + label + max(len(items) for items in rows.values()) * (SIDE + GAP)
    canvas = Image.new("RGB", (width, len(rows) * height + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (text, items) in enumerate(rows.items()):
        top = GAP + number * height
        lines = _wrapped(text, label - GAP)
        for place, line in enumerate(lines):
            draw.text((GAP, top + SIDE / 2 + (place - len(lines) / 2) * LINE), line, INK, _font())
        best = max((item.score or 0.0 for item in items if isinstance(item, NodeWithScore)), default=0.0)
        for place, item in enumerate(items):
            _draw(canvas, draw, item, GAP + label + place * (SIDE + GAP), top, best)
    texts = {text: ", ".join(" ".join(_text_and_score(item)).strip() for item in items) for text, items in rows.items()}
    return _jpeg(canvas, alt="; ".join(f"{text}: {shown}" if text else shown for text, shown in texts.items()))


def gallery(folder: Path | str, *, columns: int = 8) -> Shown:
    """Draw the images of a folder."""
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix != ".jsonl")
    rows = [[(path, path.stem) for path in paths[at : at + columns]] for at in range(0, len(paths), columns)]
    side = SIDE + GAP
    canvas = Image.new("RGB", (GAP + columns * side, len(rows) * (side + LINE) + GAP), "white")
    for number, row in enumerate(rows):
        for place, item in enumerate(row):
            _draw(canvas, ImageDraw.Draw(canvas), item, GAP + place * side, GAP + number * (side + LINE))
    return _jpeg(canvas, alt=", ".join(path.stem for path in paths))


def picture(path: Path | str, alt: str, *, width: int = 1000) -> Shown:
    """Shrink a large image to a small file. alt: the text for readers who do not see it."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((width, 10 * width))
    return _jpeg(image, alt=alt, scale=1.0)


def _draw(canvas: Image.Image, draw: ImageDraw.ImageDraw, item: Item, x: int, y: int, best: float = 1.0) -> None:
    """Draw an image with its text and score bar. best: the score of a full bar."""
    path = item.node.image_path if isinstance(item, NodeWithScore) else item[0]
    text = _text_and_score(item)[0]
    canvas.paste(Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
    for place, line in enumerate(_wrapped(text, SIDE + GAP - 4)[: 1 if isinstance(item, NodeWithScore) else 2]):
        draw.text((x, y + SIDE + 4 + place * LINE), line, INK, _font())
    if isinstance(item, NodeWithScore) and item.score and best:
        bar = y + SIDE + LINE + 14
        draw.text((x, bar - 7), _text_and_score(item)[1], FAINT, _font(16))
        draw.rectangle((x + 50, bar, x + SIDE, bar + 6), TRACK)
        draw.rectangle((x + 50, bar, x + 50 + item.score / best * (SIDE - 50), bar + 6), BAR)


def _text_and_score(item: Item) -> tuple[str, str]:
    """Return the text below the image, and its score."""
    if not isinstance(item, NodeWithScore):
        return item[1], ""
    caption = item.node.text.partition("\n")[0] or item.node.node_id
    return caption, "" if item.score is None else f"{item.score:.3f}"


def _wrapped(text: str, width: int) -> list[str]:
    """Wrap text to `width` pixels, between words or symbols. A longer line is cut with an ellipsis."""
    lines: list[str] = []
    for word in text.replace("><", "> <").split():
        if lines and _font().getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_cut(line, width) for line in lines]


def _cut(line: str, width: int) -> str:
    if _font().getlength(line) <= width:
        return line
    while line and _font().getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


def _font(size: int = TEXT) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _jpeg(canvas: Image.Image, *, alt: str, scale: float = 0.75) -> Shown:
    data = BytesIO()
    canvas.save(data, "JPEG", quality=80, optimize=True)
    return Shown(data.getvalue(), format="jpeg", width=round(canvas.width * scale), alt=alt)
