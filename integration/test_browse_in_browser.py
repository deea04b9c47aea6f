"""Tests of `genret browse` in headless Chromium, as a phone and as a desktop.

GENRET_SCREENSHOTS=FOLDER keeps screenshots.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from integration.conftest import GENRET
from integration.test_report_in_browser import TOO_WIDE, brightness

LOADED = "() => [...document.images].every((image) => image.complete)"
BROKEN = """() => [...document.images]
  .filter((image) => !image.hidden && image.naturalWidth === 0).map((image) => image.outerHTML)"""
SHOWN = "document.querySelector('.hit img').getAttribute('src')"
DROP = """async (url) => {
  const content = await (await fetch(url)).blob();
  const carried = new DataTransfer();
  carried.items.add(new File([content], "dropped.webp", { type: "image/webp" }));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true }));
}"""
LIMIT_MS = 60_000


@dataclass
class Visit:
    """A loaded page, and the browser's errors and requests."""

    page: Page
    name: str
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def check_page(self, what: str) -> None:
        """Check that nothing is broken or too wide, and take a screenshot if wanted."""
        self.page.wait_for_function(LOADED)
        assert self.page.evaluate(BROKEN) == []
        assert self.page.locator(".absent").count() == 0  # the page's replacement for a broken image
        assert self.page.evaluate(TOO_WIDE) == []
        if folder := os.environ.get("GENRET_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"browse-{what}-{self.name}.png", full_page=True)


@pytest.fixture(scope="module")
def address(trained_index) -> Iterator[str]:
    """Return the address of the page, from the command's output."""
    command = [*GENRET, "browse", str(trained_index.folder), "--port", "0", "--device", "cpu", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            yield json.loads(running.stdout.readline())["url"]
            assert running.poll() is None
        finally:
            running.terminate()


@pytest.fixture(
    params=[(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")],
    ids=lambda param: f"{param[0]}px-{param[1]}",
)
def visit(request, browser, address) -> Iterator[Visit]:
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(LIMIT_MS)
    visit = Visit(context.new_page(), f"{width}-{scheme}")
    visit.page.on("console", lambda message: visit.complaints.append(f"{message.type}: {message.text}"))
    visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    visit.page.on("request", lambda request: visit.requests.append(request.url))
    visit.page.goto(address)
    expect(visit.page.get_by_label("color", exact=True)).to_be_visible(timeout=LIMIT_MS)
    yield visit
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith((address, "data:"))] == []
    context.close()


def recall(page: Page, text: str) -> None:
    page.get_by_label("Query or question").fill(text)
    with page.expect_response("**/api/recall"):
        page.get_by_role("button", name="Recall", exact=True).click()


def test_page_recalls_filters_and_answers(visit):
    """Run the steps of one user. The colors of the page follow the system's."""
    page, hits = visit.page, visit.page.locator("#hits .hit")
    background = brightness(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (background < 80) == visit.name.endswith("dark")

    recall(page, "a red circle")
    expect(hits).to_have_count(8)
    expect(hits.first).to_have_attribute("aria-pressed", "true")
    symbols = page.locator(".level .chosen .symbol").all_text_contents()
    assert "".join(symbols).replace("(end)", "") == page.locator("#identifier").text_content()
    visit.check_page("query")

    hits.nth(3).click()
    expect(hits.nth(3)).to_have_attribute("aria-pressed", "true")
    other = page.locator(".level .chosen .symbol").all_text_contents()
    assert other != symbols

    page.get_by_label("color", exact=True).select_option("green")
    recall(page, "a red circle")
    expect(hits).to_have_count(4)
    assert all(text.startswith("green") for text in page.locator(".hit .caption").all_text_contents())
    expect(page.locator(".level li.out").first).to_be_visible()
    visit.check_page("filter")

    page.get_by_label("color", exact=True).select_option("any")
    page.get_by_label("Query or question").fill("")
    with page.expect_response("**/api/recall") as answered:
        page.evaluate(DROP, page.evaluate(SHOWN))
    assert answered.value.ok
    expect(page.locator("#picture")).to_be_visible()
    expect(hits).to_have_count(8)
    assert page.locator(".level").count() > 0
    visit.check_page("picture")

    page.get_by_role("button", name="Remove the image").click()
    page.get_by_label("answer from").fill("2")
    page.get_by_label("Query or question").fill("What is it?")
    page.get_by_role("button", name="Answer", exact=True).click()
    expect(page.locator("#answer")).to_be_visible()
    expect(hits).to_have_count(2)
    expect(page.locator("#question")).to_have_text("What is it?")
    visit.check_page("question")


def test_invalid_query_is_shown_as_an_error_on_the_page(visit):
    """The browser logs the refusal in its console, and nothing else."""
    recall(visit.page, "   ")
    expect(visit.page.get_by_role("alert")).to_contain_text("the query is empty")
    assert len(visit.complaints) == 1
    assert "400" in visit.complaints.pop()


def test_hostile_text_stays_text(visit):
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    visit.page.get_by_label("Query or question").fill(hostile)
    visit.page.get_by_role("button", name="Answer", exact=True).click()
    expect(visit.page.locator("#question")).to_have_text(hostile, timeout=LIMIT_MS)
    assert visit.page.locator("#answer img, #answer script").count() == 0
