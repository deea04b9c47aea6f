"""Tests of the README's figure of the parts: it is up to date, and its text fits the boxes, in light and dark."""

from pathlib import Path

import pytest

from integration import architecture_picture

PICTURE = Path(__file__).with_name("architecture.svg")
OVERFLOW = """() => [...document.querySelectorAll('g')].flatMap(group => {
    const box = group.querySelector('rect').getBBox();
    return [...group.querySelectorAll('text, image')].filter(part => {
        const {x, y, width, height} = part.getBBox();
        return x < box.x || y < box.y || x + width > box.x + box.width || y + height > box.y + box.height;
    }).map(part => part.textContent || 'an image');
})"""


def test_figure_equals_the_output_of_its_command():
    assert PICTURE.read_text(encoding="utf-8") == architecture_picture.svg()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figure_text_fits_its_boxes_in_both_color_schemes(browser, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.goto(PICTURE.as_uri())
    assert page.locator("g").count() == len(architecture_picture.BOXES)
    assert page.evaluate(OVERFLOW) == []
    ground = page.evaluate("getComputedStyle(document.querySelector('.page')).fill")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 19, 24)"}[scheme]
    page.close()
