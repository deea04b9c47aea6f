"""Make the README's figure: every eighth of the 30 queries that the demo's report samples, with five hits each.

make demo && .venv/bin/python -m integration.report_picture demo-out/report.html integration/report.png
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def main(report: Path, picture: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 880, "height": 740})
        page.goto(report.resolve().as_uri())
        page.add_style_tag(content=".filter, .hit:nth-child(n+6), .row:not(:nth-child(8n+1 of .row)) { display: none }")
        page.add_style_tag(content=".group { padding: 0 16px 16px }")
        page.locator("section.group", has_text="at random").screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
