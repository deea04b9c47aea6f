"""One self-contained HTML page that shows what was recalled: figures, charts, queries and the pictures that they found.

Knows pictures, words and HTML; nothing of indexes, models or metrics: figures arrive as text, charts as SVG.
"""

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image, ImageOps

from llama_index_genret.files import make_folder, write_file, writing

SIDE_PX = 112
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for a bad file


class Cell(NamedTuple):
    """One entry of a table. small: what is set below it, such as an interval."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Table:
    """Figures as they shall be read. Each row begins with its name; `words` are the columns that hold no numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    words: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Chart:
    """svg: an element without size, trusted as it is. note: what is to be seen in it."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class ReportHit:
    """One recalled image. `path` is read when the report is written; a file that is gone becomes a placeholder."""

    image_id: str
    path: Path
    caption: str
    score: float
    is_right: bool


@dataclass(frozen=True)
class ReportQuery:
    """One query with its hits, best first. `expected` are image ids; `kind` is shown beside the query."""

    query: str
    kind: str
    expected: tuple[str, ...]
    hits: tuple[ReportHit, ...]

    @property
    def right_rank(self) -> int | None:
        """Of the best right hit, counted from 1; None for a miss."""
        return next((rank for rank, hit in enumerate(self.hits, start=1) if hit.is_right), None)

    @property
    def outcome(self) -> Literal["first", "later", "missed"]:
        """Where the right image is, in a word."""
        if self.right_rank is None:
            return "missed"
        return "first" if self.right_rank == 1 else "later"


@dataclass(frozen=True)
class ReportAnswer:
    """One question, answered from recalled images."""

    question: str
    answer: str
    sources: tuple[ReportHit, ...]


@dataclass(frozen=True)
class QueryGroup:
    """Queries that are shown together, in the order given."""

    title: str
    queries: tuple[ReportQuery, ...]
    note: str = ""

    def count(self, outcome: str) -> int:
        """Queries of an outcome."""
        return sum(query.outcome == outcome for query in self.queries)


def write_report(
    path: Path,
    *,
    title: str,
    subtitle: str,
    tables: Sequence[Table] = (),
    charts: Sequence[Chart] = (),
    groups: Sequence[QueryGroup] = (),
    answers: Sequence[ReportAnswer] = (),
    images: Mapping[str, Path] | None = None,
) -> None:
    """Write the page whole or not at all; it needs no other file and makes no request.

    Args:
        path: an existing report is replaced, a missing folder is made.
        images: image id -> path, for expected images that no query recalled. Without it they are shown by id.
    Raises:
        NotWritten: the page cannot be written. An image that cannot be read is no error: the page names it.
    """
    queries = [query for group in groups for query in group.queries]
    hits = [hit for query in queries for hit in query.hits] + [hit for answer in answers for hit in answer.sources]
    missed = {image_id for query in queries if query.outcome == "missed" for image_id in query.expected}
    known = {hit.image_id: hit.path for hit in hits} | dict(images or {})
    expected_paths = {image_id: known[image_id] for image_id in missed if image_id in known}
    urls = data_urls([*(hit.path for hit in hits), *(expected_paths[name] for name in sorted(expected_paths))])
    css_classes = {url: f"p{number}" for number, url in enumerate(dict.fromkeys(urls.values()))}
    page = _template().render(
        title=title,
        subtitle=subtitle,
        tables=tables,
        charts=charts,
        all_queries=QueryGroup("all", tuple(queries)),
        groups=[group for group in groups if group.queries],
        answers=answers,
        expected_paths=expected_paths,
        css_classes=css_classes,
        class_of_path={image: css_classes[url] for image, url in urls.items()},
    )
    with writing(path):
        make_folder(path.parent)
        # A caption read from JSON may hold half a surrogate pair, which UTF-8 cannot: it is shown as its escape.
        write_file(path, page.encode(errors="backslashreplace"))


def data_urls(paths: Iterable[Path]) -> dict[Path, str]:
    """A thumbnail of every picture that can be read; the others have no entry."""
    urls = {}
    for path in dict.fromkeys(paths):
        try:
            urls[path] = thumbnail_url(path)
        except UNREADABLE:
            continue
    return urls


def thumbnail_url(path: Path) -> str:
    """`thumbnail` as an address that holds the picture."""
    return f"data:image/webp;base64,{b64encode(thumbnail(path)).decode('ascii')}"


def thumbnail(path: Path, side_px: int = SIDE_PX) -> bytes:
    """The picture as a WebP of at most `side_px` a side, upright, transparency kept.

    Raises:
        one of UNREADABLE: the file is missing, or is no picture.
    """
    with Image.open(path) as image:
        image.draft("RGB", (2 * side_px, 2 * side_px))  # a JPEG is decoded at a fraction of its size
        small = ImageOps.exif_transpose(image).convert("RGBA")
    small.thumbnail((side_px, side_px))
    webp = BytesIO()
    small.save(webp, "WEBP", quality=80)
    return webp.getvalue()


def score_text(score: float) -> str:
    """Three decimals, or the magnitude where three decimals would read as zero."""
    return f"{score:.3f}" if score == 0 or abs(score) >= 0.001 else f"{score:.0e}"


def count_text(number: int, one: str, many: str) -> str:
    """A number with its noun: `1 image`, `2 images`."""
    return f"{number} {one if number == 1 else many}"


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("llama_index_genret.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": score_text, "count": count_text}
    return environment.get_template("page.html.jinja")
