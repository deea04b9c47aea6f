"""Tests of a report in headless Chromium, as a phone and as a desktop, light and dark.

GENRET_SCREENSHOTS=FOLDER keeps screenshots.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page

from llama_index_genret.evaluation.charts import (
    Estimate,
    calibration_chart,
    comparison_chart,
    latency_chart,
    survival_chart,
)
from llama_index_genret.evaluation.html_page import (
    Cell,
    Chart,
    QueryGroup,
    ReportAnswer,
    ReportHit,
    ReportQuery,
    Table,
    write_report,
)
from llama_index_genret.evaluation.metrics import Interval, expected_calibration_error, reliability

DEMO_IMAGES = Path(__file__).resolve().parents[1] / "llama_index_genret" / "cli" / "demo" / "data" / "images"
LONG_WORD = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"
HITS = 10

BACKGROUND_SIZES = """async () => Promise.all(
  [...document.querySelectorAll(".picture:not(.absent)")].map(async (element) => {
    const image = new Image();
    image.src = getComputedStyle(element).backgroundImage.slice(5, -2);
    await image.decode();
    const box = element.getBoundingClientRect();
    return Math.min(image.naturalWidth, image.naturalHeight, box.width, box.height);
  }))"""
FILLS = """card => [...card.querySelectorAll("svg [style*='--chart']")].map((drawn) => {
  const style = getComputedStyle(drawn);
  return style.stroke === "none" ? style.fill : style.stroke;
})"""
TOO_WIDE = """() => [...document.body.querySelectorAll("*")]
  .filter((element) => element.getBoundingClientRect().right > innerWidth + 0.5 || element.scrollWidth > innerWidth)
  .map((element) => element.outerHTML.slice(0, 120))"""


@dataclass
class Visit:
    """A loaded page, and the browser's errors and requests."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def demo_pictures() -> list[tuple[Path, str]]:
    lines = (DEMO_IMAGES / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [(DEMO_IMAGES / row["file_name"], row["text"][-1]) for row in map(json.loads, lines)]


def example_queries(pictures: list[tuple[Path, str]]) -> list[ReportQuery]:
    """Make queries: of each five, three are right first, one is right at rank 3, and one is missed."""
    queries = []
    for place, (path, caption) in enumerate(pictures):
        right_rank = (0, 0, 0, 2, None)[place % 5]
        nearby = [pictures[(place + 7 * step) % len(pictures)] for step in range(1, HITS + 1)]
        if right_rank is not None:
            nearby[right_rank] = (path, caption)
        hits = tuple(
            ReportHit(shown.stem, shown, text, 0.93 / (4**rank), shown == path)
            for rank, (shown, text) in enumerate(nearby)
        )
        kind = "captions" if place % 2 else "phrasing"
        queries.append(ReportQuery(f"could you find {caption.split(',')[0]}, please?", kind, (path.stem,), hits))
    return queries


def example_tables() -> list[Table]:
    """Make a report of three systems with intervals, as wide as `genret eval` makes it, and one with notes."""
    cells = [Cell(f"0.{n}71", f"0.{n}21–0.{n}99") for n in (8, 6, 5)]
    rows = tuple((Cell(name), *cells) for name in ("recall@1", "recall@10", "nDCG@10", "calibration error"))
    noted = ((Cell("recall@10 on held-out tags"), Cell("0.71"), Cell("goal 0.60; BM25 0.00, dense peer 0.66")),)
    return [
        Table("Figures", ("", "generative", "tfidf", "bm25"), rows, "Below each figure its interval."),
        Table("Goals", ("figure", "value", "note"), noted, words=frozenset({"note"})),
    ]


def example_charts() -> list[Chart]:
    """Draw all charts of `genret eval`."""
    measured = {n: Estimate(n / 10, Interval(n / 10 - 0.08, n / 10 + 0.05)) for n in range(3, 10)}
    names = ("recall@1", "recall@5", "recall@10", "MRR", "nDCG@10")
    systems = {
        system: {name: measured[low + place] for place, name in enumerate(names)}
        for low, system in ((5, "generative"), (4, "tfidf"), (3, "bm25"))
    }
    scores = [n / 100 for n in range(100)]
    right = [n % 3 > 0 for n in range(100)]
    return [
        comparison_chart(systems),
        survival_chart([measured[9], measured[8], measured[6]]),
        calibration_chart(reliability(scores, right), expected_calibration_error(scores, right), scored=100),
        latency_chart([20 + n % 37 for n in range(300)] + [900.0]),
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    pictures = demo_pictures()
    queries = example_queries(pictures)
    gone = ReportHit("gone", folder / "a-file-that-is-gone.png", LONG_WORD, 0.000031, False)
    awkward = ReportQuery(f"{LONG_WORD}?", "awkward", ("gone", "never-heard-of"), (gone, *queries[0].hits[1:3]))
    answers = [
        ReportAnswer("What is in the picture?", caption.split(",")[0], queries[3 * place].hits[: 1 + place % 3])
        for place, (_, caption) in enumerate(pictures[::3][:9])
    ]
    path = folder / "report.html"
    write_report(
        path,
        title="What the model recalls",
        subtitle=f"{len(pictures)} pictures, structured identifiers; a test of the page, not a measurement.",
        tables=example_tables(),
        charts=example_charts(),
        groups=[
            QueryGroup("The worst", tuple(queries), "Misses first."),
            QueryGroup("Awkward", (awkward, ReportQuery("nothing at all", LONG_WORD, (), ())), f"{LONG_WORD}!"),
        ],
        answers=[*answers, ReportAnswer(f"What is a {LONG_WORD}?", f"Nobody knows.\nNot even {LONG_WORD}.", ())],
        images={path.stem: path for path, _ in pictures},
    )
    return path


@pytest.fixture(
    scope="module",
    params=[(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")],
    ids=lambda param: f"{param[0]}px-{param[1]}",
)
def visit(request, browser, report) -> Iterator[Visit]:
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    visit = Visit(context.new_page())
    visit.page.on("console", lambda message: visit.complaints.append(f"{message.type}: {message.text}"))
    visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    visit.page.on("request", lambda request: visit.requests.append(request.url))
    visit.page.goto(report.as_uri())
    if folder := os.environ.get("GENRET_SCREENSHOTS"):
        visit.page.screenshot(path=Path(folder) / f"report-{width}-{scheme}.png", full_page=True)
    yield visit
    context.close()


def test_report_loads_without_errors_or_other_files(visit, report):
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith("data:")] == [report.as_uri()]


def test_every_thumbnail_is_decoded_and_has_a_position(visit):
    sizes = visit.page.evaluate(BACKGROUND_SIZES)
    assert len(sizes) > 100
    assert min(sizes) >= 40


def test_a_thumbnail_is_painted(visit):
    painted = Image.open(BytesIO(visit.page.locator(".hit .picture:not(.absent)").first.screenshot()))
    assert len(painted.convert("RGB").getcolors(1 << 24) or ()) > 20


def test_chart_texts_and_marks_contrast_with_their_card(visit):
    """Texts, and marks in the colors of the systems, contrast in both schemes: dark on light and light on dark."""
    charts = visit.page.locator("figure.card")
    assert charts.count() == len(example_charts())
    for chart in charts.all():
        box = chart.locator("svg").bounding_box()
        assert min(box["width"], box["height"]) > 150
        card = brightness(chart.evaluate("card => getComputedStyle(card).backgroundColor"))
        texts = chart.locator("svg text")
        assert texts.count() > 5
        for text in texts.all():
            assert abs(brightness(text.evaluate("text => getComputedStyle(text).fill")) - card) > 90
        drawn = chart.evaluate(f"({FILLS})")
        assert len(drawn) > 1
        assert min(abs(brightness(fill) - card) for fill in drawn) > 60


def brightness(color: str) -> float:
    """Parse a color of getComputedStyle into 0 to 255."""
    return sum(int(part) for part in color[4:-1].split(",")) / 3


def test_nothing_is_wider_than_the_screen(visit):
    assert visit.page.evaluate(TOO_WIDE) == []


def test_the_color_scheme_is_followed(visit):
    wanted = "dark" if visit.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") else "light"
    background = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ("dark" if brightness(background) < 80 else "light") == wanted


def test_filter_shows_only_misses_and_then_all(visit):
    rows, misses = visit.page.locator(".row"), visit.page.locator(".row.missed")
    everything, missed = rows.count(), misses.count()

    visit.page.get_by_role("radio", name="Only misses").check()
    shown = visit.page.locator(".row:visible")
    assert shown.count() == missed < everything
    assert misses.first.is_visible()
    assert visit.page.evaluate(TOO_WIDE) == []

    visit.page.get_by_label("Not first").check()
    assert shown.count() == visit.page.locator(".row:not(.first)").count()
    visit.page.get_by_role("radio", name="All").check()
    assert shown.count() == everything
