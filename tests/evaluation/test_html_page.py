"""The HTML report, checked by its text. `integration/` opens it in a browser."""

import os
import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from llama_index_genret.errors import NotWritten
from llama_index_genret.evaluation.html_page import (
    SIDE_PX,
    Cell,
    Chart,
    QueryGroup,
    ReportAnswer,
    ReportHit,
    ReportQuery,
    Table,
    write_report,
)

HOSTILE = """</style></title><script>alert("x")</script><img src=x onerror='alert(1)'> "onclick="alert(2) {{ 7 * 7 }}"""
DATA_URL = re.compile(r"url\(data:image/webp;base64,([A-Za-z0-9+/=]+)\)")


@pytest.fixture
def pictures(tmp_path):
    """Create three files of different colors, taller than wide."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (300, 600), name).save(folder / f"{name}.png")
    return folder


def hit(path: Path, caption: str = "a picture", score: float = 0.5, is_right: bool = False) -> ReportHit:
    return ReportHit(path.stem, path, caption, score, is_right)


def page_of(tmp_path: Path, *, title="t", subtitle="s", queries=(), **parts) -> str:
    path = tmp_path / "report.html"
    groups = parts.pop("groups", [QueryGroup("queries", tuple(queries))])
    write_report(path, title=title, subtitle=subtitle, groups=groups, **parts)
    return path.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text outside <style>."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.text += data

    def classes(self) -> list[str]:
        return [attributes["class"] or "" for _, attributes in self.tags if "class" in attributes]


def test_hostile_text_is_escaped_everywhere(tmp_path, pictures):
    hostile_hit = ReportHit(HOSTILE, pictures / "red.png", HOSTILE, 0.5, True)
    gone = ReportHit(HOSTILE, pictures / HOSTILE.replace("/", "_"), "", 0.5, False)
    queries = [
        ReportQuery(HOSTILE, HOSTILE, (HOSTILE,), (hostile_hit,)),
        ReportQuery(HOSTILE, "missed", (HOSTILE,), (gone,)),
    ]
    answers = [ReportAnswer(HOSTILE, HOSTILE, (hostile_hit,))]
    row = (Cell(HOSTILE), Cell(HOSTILE, HOSTILE))
    parts = {
        "tables": [Table(HOSTILE, (HOSTILE, HOSTILE), (row,), HOSTILE)],
        "charts": [Chart(HOSTILE, "<svg></svg>", HOSTILE)],
        "groups": [QueryGroup(HOSTILE, tuple(queries), HOSTILE)],
        "answers": answers,
    }
    page = Elements(page_of(tmp_path, title=HOSTILE, subtitle=HOSTILE, **parts))

    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "embed"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    # title twice (tab, heading), subtitle; table: title, 2 columns, 3 texts of a row, note; chart: title, note;
    # group: title, note; query x 2, kind once, caption x 2 (hit and source of the answer), id as the caption of the
    # missing image and as the expected id, question, answer
    assert page.text.count(HOSTILE) == 23


def test_page_has_no_external_url(tmp_path, pictures):
    queries = [ReportQuery("q", "kind", ("red",), (hit(pictures / "red.png", is_right=True),))]
    page = page_of(tmp_path, queries=queries, answers=[ReportAnswer("q", "a", queries[0].hits)])

    assert not re.search(r"(?i)https?:|//[a-z]|@import|url\(|<script", DATA_URL.sub("", page))
    links = [link for _, attributes in Elements(page).tags for link in (attributes.get("href"), attributes.get("src"))]
    assert {link for link in links if link} == {"data:,"}
    assert "default-src 'none'" in page


def test_each_distinct_image_is_embedded_once(tmp_path, pictures):
    copy = pictures / "copy-of-red.png"
    copy.write_bytes((pictures / "red.png").read_bytes())
    shown = tuple(hit(path) for path in sorted(pictures.iterdir()))
    queries = [ReportQuery(f"query {number}", "kind", ("red",), shown) for number in range(20)]
    page = page_of(tmp_path, queries=queries, answers=[ReportAnswer("q", "a", shown)])

    embedded = [Image.open(BytesIO(b64decode(data))) for data in DATA_URL.findall(page)]
    assert len(embedded) == 3
    assert {image.size for image in embedded} == {(SIDE_PX // 2, SIDE_PX)}
    assert page.count("base64,") == 3


def test_thumbnail_is_upright_and_keeps_colors(tmp_path, pictures):
    sideways = Image.new("RGB", (200, 100), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    sideways.save(pictures / "sideways.jpg", exif=exif)
    Image.new("LA", (50, 50), (0, 0)).save(pictures / "clear.png")
    Image.new("CMYK", (50, 50), (0, 255, 255, 0)).save(pictures / "print.jpg")
    shown = tuple(hit(pictures / name) for name in ("sideways.jpg", "clear.png", "print.jpg"))
    page = page_of(tmp_path, queries=[ReportQuery("q", "kind", (), shown)])

    upright, clear, printed = (Image.open(BytesIO(b64decode(data))) for data in DATA_URL.findall(page))
    assert upright.size == (SIDE_PX // 2, SIDE_PX)
    assert clear.convert("RGBA").getpixel((25, 25))[3] == 0
    red, green, blue = printed.convert("RGB").getpixel((25, 25))
    assert red > 200 > 60 > max(green, blue)


def test_misses_are_marked_and_show_the_expected_image(tmp_path, pictures):
    red, green, blue = (pictures / f"{name}.png" for name in ("red", "green", "blue"))
    queries = [
        ReportQuery("found first", "tag", ("red",), (hit(red, is_right=True), hit(green))),
        ReportQuery("found second", "tag", ("red",), (hit(green), hit(red, is_right=True))),
        ReportQuery("never found", "tag", ("blue",), (hit(green), hit(red))),
        ReportQuery("nothing came", "tag", ("unknown",), ()),
    ]
    text = page_of(tmp_path, queries=queries, images={"blue": blue})
    page = Elements(text)

    rows = [name for name in page.classes() if name.startswith("row ")]
    assert rows == ["row first", "row later", "row missed", "row missed"]
    assert page.classes().count("hit right") == text.count('aria-hidden="true">✓</span>') == 2
    assert page.text.count("✗ missed") == 2
    assert "✓ rank 2" in page.text
    assert "4 queries: 1 right first, 1 later, 2 missed" in page.text
    assert 'aria-label="expected: blue"' in text
    assert len(DATA_URL.findall(text)) == 3
    assert "unknown" in page.text


def test_groups_keep_their_order_and_empty_ones_are_hidden(tmp_path, pictures):
    queries = [ReportQuery(f"q{n}", f"kind{n}", (), (hit(pictures / "red.png"),)) for n in range(3)]
    groups = [QueryGroup("worst", (queries[2], queries[0])), QueryGroup("none", ()), QueryGroup("lot", (queries[1],))]
    tables = [Table(f"table{n}", ("", "MRR"), ((Cell("ours"), Cell("0.5", "0.4–0.6")),)) for n in range(2)]
    page = page_of(tmp_path, groups=groups, tables=tables)

    assert re.findall(r"<h3>(\w+)<small>(\d \w+)", page) == [("worst", "2 queries"), ("lot", "1 query")]
    assert re.findall(r'class="query" dir="auto">(\w+)', page) == ["q2", "q0", "q1"]
    assert re.findall(r'class="kind">(\w+)', page) == ["kind2", "kind0", "kind1"]
    assert re.findall(r"<h2>(table\d)", page) == ["table0", "table1"]
    assert page.count('<td class="number">0.5<small>0.4–0.6</small></td>') == 2


@pytest.mark.parametrize(
    ("score", "shown"), [(1, "1.000"), (0.9714, "0.971"), (0.00042, "4e-04"), (0, "0.000"), (-3.25, "-3.250")]
)
def test_only_a_score_of_zero_reads_as_zero(tmp_path, pictures, score, shown):
    page = page_of(tmp_path, queries=[ReportQuery("q", "kind", (), (hit(pictures / "red.png", score=score),))])
    assert f'<p class="score">{shown}</p>' in page


@pytest.mark.parametrize("content", [None, b"", b"no picture at all", b"\x89PNG\r\n\x1a\n broken"])
def test_unreadable_image_is_replaced_by_its_file_name(tmp_path, pictures, content):
    path = pictures / "lost & found.png"
    if content is not None:
        path.write_bytes(content)
    shown = (hit(path), hit(pictures / "red.png"))
    page = page_of(tmp_path, queries=[ReportQuery("q", "kind", (), shown)])

    assert 'aria-label="unreadable image: lost &amp; found.png">lost &amp; found.png</div>' in page
    assert len(DATA_URL.findall(page)) == 1


def test_report_of_100_images_is_below_2_mb(tmp_path):
    """Noise is the worst case for a codec. Photographs are far smaller."""
    paths = [tmp_path / f"{number}.png" for number in range(100)]
    for number, path in enumerate(paths):
        Image.effect_noise((160, 160), 40 + number / 2).save(path)
    hits = [hit(path, caption="a caption of usual length, with a tag") for path in paths]
    queries = [ReportQuery(f"query {n}", "kind", ("0",), tuple(hits[n % 90 : n % 90 + 10])) for n in range(250)]
    assert len(page_of(tmp_path, queries=queries).encode()) < 2_000_000


def test_empty_report_is_a_complete_page(tmp_path):
    page = page_of(tmp_path, title="Nothing yet", subtitle="")
    assert '<h1 dir="auto">Nothing yet</h1>' in page
    assert page.rstrip().endswith("</html>")


def test_half_a_surrogate_pair_is_shown_as_its_escape(tmp_path, pictures):
    page = page_of(tmp_path, queries=[ReportQuery("torn \ud83d", "kind", (), (hit(pictures / "red.png"),))])
    assert "torn \\ud83d" in page


def test_report_is_written_without_leftover_files(tmp_path):
    path = tmp_path / "new folder" / "report.html"
    for title in ("first", "second"):
        write_report(path, title=title, subtitle="")
    assert "second" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    page_of(tmp_path, title="old")

    def disk_full(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(NotWritten, match=r"report\.html could not be written: .*No space left"):
        page_of(tmp_path, title="new")
    assert "<title>old</title>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
