"""Test the figures of an identifier tree against their definitions, and its plot."""

import json
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llama_index_genret.identifiers.diagnostics import diagnose, entropy_bits
from llama_index_genret.identifiers.tree_plot import (
    INNER,
    MOST_BANDS,
    MOST_BOXES,
    MOST_IN_BOX,
    PAGE,
    WIDTH,
    draw_tree,
    layout,
)

unique_identifiers = st.sets(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4).map(tuple), min_size=1)


@given(unique_identifiers.map(sorted))
def test_figures_of_a_level_equal_plain_loops(identifiers):
    diagnosis = diagnose(identifiers, (4, 4))
    assert len(diagnosis.levels) == max(map(len, identifiers))
    for level, found in enumerate(diagnosis.levels):
        reaching = [i for i in identifiers if len(i) > level]
        nodes = {i[: level + 1] for i in reaching}
        fan_outs = {above: sum(node[:level] == above for node in nodes) for above in {i[:level] for i in reaching}}
        assert found.images == len(reaching)
        assert found.nodes == len(nodes)
        assert found.max_fan_out == max(fan_outs.values())
        assert found.mean_fan_out == pytest.approx(sum(fan_outs.values()) / len(fan_outs))
        seen = sum(fan_outs[i[:level]] for i in reaching) / len(reaching)
        assert found.random_image_fan_out == pytest.approx(seen)
        shares = [n / len(reaching) for n in Counter(i[level] for i in reaching).values()]
        assert found.entropy_bits == pytest.approx(-sum(p * math.log2(p) for p in shares))
        assert found.codes_used == len(shares)
        assert found.codes_available == (4 if level < 2 else None)
        assert -1e-9 <= found.relative_entropy <= 1 + 1e-9


def test_entropy_is_full_for_even_use_and_0_for_one_code():
    assert entropy_bits([5, 5, 5, 5]) == 2.0
    assert entropy_bits([7]) == 0.0
    even, one = diagnose([("a", "x"), ("b", "x"), ("c", "x"), ("d", "x")], (4, 4)).levels
    assert (even.entropy_bits, even.relative_entropy) == (2.0, 1.0)
    assert (one.entropy_bits, one.relative_entropy) == (0.0, 0.0)


def test_codes_are_not_counted_without_fixed_levels():
    diagnosis = diagnose([("1",), ("1", "2")])
    assert json.loads(json.dumps(diagnosis.to_json()))["levels"][0]["codes_available"] is None


def test_layout_covers_every_image_in_symbol_order():
    identifiers = [(f"<g0_{i % 12}>", f"<g1_{i % 37}>", f"<s_{i}>") for i in range(900)]
    bands = layout(identifiers)
    assert [band.label for band in bands] == [f"<g0_{i}>" for i in range(12)]
    for band in bands:
        assert len(band.boxes) == min(band.n_boxes, MOST_BOXES)
        assert sum(len(box.rows) for box in band.boxes) + band.hidden_images == band.n_images == 75
        assert all(box.hidden == max(0, len(box.rows) - MOST_IN_BOX) for box in band.boxes)
    assert not any(box.x + box.width > INNER for band in bands for box in band.boxes)


def test_boxes_of_a_band_do_not_overlap():
    for band in layout([("a", str(i % 9), str(i)) for i in range(90)] + [("b",)]):
        places = [(box.x, box.y, box.x + box.width) for box in band.boxes]
        for at, (left, top, right) in enumerate(places):
            assert not any(t == top and left < r and le < right for le, t, r in places[at + 1 :])


def test_plot_shows_the_images_and_is_deterministic(pictures, tmp_path):
    files = sorted(pictures.glob("*.png"))
    identifiers = [(f"<g0_{i // 5}>", f"<g1_{i % 5}>") for i in range(len(files))]
    for name in ("one.png", "two.png"):
        draw_tree(identifiers, files, tmp_path / "new" / name, title="t" * 500)
    assert (tmp_path / "new/one.png").read_bytes() == (tmp_path / "new/two.png").read_bytes()
    drawn = Image.open(tmp_path / "new/one.png").convert("RGB")
    assert drawn.width == WIDTH
    colours = {colour for _, colour in drawn.getcolors(1 << 24)}
    assert {(220, 30, 30), (20, 160, 60), (30, 60, 220)} <= colours


def test_plot_accepts_missing_images_and_many_bands(tmp_path):
    identifiers = [(f"<i_{i}>",) for i in range(MOST_BANDS + 5)]
    draw_tree(identifiers, [tmp_path / "missing.png"] * len(identifiers), tmp_path / "tree.png")
    assert Image.open(tmp_path / "tree.png").getpixel((2, 2)) == tuple(bytes.fromhex(PAGE[1:]))
