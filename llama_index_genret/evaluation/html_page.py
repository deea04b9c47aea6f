"""Write one self-contained HTML page: figures, charts, and queries with the images that they recalled.

Depends on image files, text and HTML; independent of indexes, models and metrics. Figures arrive as text, charts as
SVG.
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
    """One entry of a table. small: text below the entry, such as an interval."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Table:
    """A table of formatted figures. Each row begins with its name. `words` are the columns without numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    words: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Chart:
    """A chart with its caption.

    svg: an element without size, inserted without escaping. note: explanation below the chart.
    """

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class ReportHit:
    """One recalled image. `write_report` reads `path`. A missing file becomes a placeholder."""

    image_id: str
    path: Path
    caption: str
    score: float
    is_right: bool


@dataclass(frozen=True)
class ReportQuery:
    """One query with its hits, best first. `expected` are image ids. The page shows `kind` beside the query."""

    query: str
    kind: str
    expected: tuple[str, ...]
    hits: tuple[ReportHit, ...]

    @property
    def right_rank(self) -> int | None:
        """The rank of the best right hit, counted from 1, or None for a miss."""
        return next((rank for rank, hit in enumerate(self.hits, start=1) if hit.is_right), None)

    @property
    def outcome(self) -> Literal["first", "later", "missed"]:
        """The class of the best right hit: `first`, `later` or `missed`."""
        if self.right_rank is None:
            return "missed"
        return "first" if self.right_rank == 1 else "later"


@dataclass(frozen=True)
class ReportAnswer:
    """One question with the answer from recalled images."""

    question: str
    answer: str
    sources: tuple[ReportHit, ...]


@dataclass(frozen=True)
class QueryGroup:
    """Queries of one section of the page, in the order given."""

    title: str
    queries: tuple[ReportQuery, ...]
    note: str = ""

    def count(self, outcome: str) -> int:
        """Count the queries with this outcome."""
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
    """Write the page atomically. The page needs no other file and makes no request.

    Args:
        path: target file. An existing report is replaced, a missing folder is created.
        images: image id -> path, for expected images that no query recalled. Default: the page shows their ids.

    Raises:
        NotWritten: the page cannot be written. An unreadable image is no error: the page shows its file name.
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
        # A caption from JSON may hold half a surrogate pair, which UTF-8 cannot encode: the page shows its escape.
        write_file(path, page.encode(errors="backslashreplace"))


def data_urls(paths: Iterable[Path]) -> dict[Path, str]:
    """Return path -> data URL of a thumbnail. Unreadable images have no entry."""
    urls = {}
    for path in dict.fromkeys(paths):
        try:
            urls[path] = thumbnail_url(path)
        except UNREADABLE:
            continue
    return urls


def thumbnail_url(path: Path) -> str:
    """Return `thumbnail` as a data URL."""
    return f"data:image/webp;base64,{b64encode(thumbnail(path)).decode('ascii')}"


def thumbnail(path: Path, side_px: int = SIDE_PX) -> bytes:
    """Return the image as WebP of at most `side_px` pixels a side, upright, with its transparency.

    Raises:
        one of UNREADABLE: the file is missing or is not an image.
    """
    with Image.open(path) as image:
        image.draft("RGB", (2 * side_px, 2 * side_px))  # a JPEG is decoded at a fraction of its size
        small = ImageOps.exif_transpose(image).convert("RGBA")
    small.thumbnail((side_px, side_px))
    webp = BytesIO()
    small.save(webp, "WEBP", quality=80)
    return webp.getvalue()


def score_text(score: float) -> str:
    """Return the score with three decimals, or in scientific notation if three decimals would read as zero."""
    return f"{score:.3f}" if score == 0 or abs(score) >= 0.001 else f"{score:.0e}"


def count_text(number: int, one: str, many: str) -> str:
    """Return a number with its noun: `1 image`, `2 images`."""
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
