"""Draw the charts of a report with matplotlib, as inline SVG.

Depends on numbers and matplotlib; independent of indexes and models. Text stays text. Every color is a CSS variable of
the page, so that a chart is readable in light and dark mode. Importing this module without the extra `eval` raises
MissingExtra.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np

from llama_index_genret.errors import MissingExtra
from llama_index_genret.evaluation.html_page import Chart
from llama_index_genret.evaluation.metrics import Bin, Interval

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtra(
        "the charts of a report need matplotlib, which is not installed: pip install 'llama-index-genret[eval]'. "
        "Without --report, `genret eval` prints the figures and does not need it."
    ) from error

WIDTH_IN, HEIGHT_IN = 5.0, 3.3
FONT_PT = 11

# Placeholder colors: matplotlib accepts no CSS variables, so `_svg` replaces each by a variable of the page.
INK, QUIET, LINE, CARD = "#010101", "#020202", "#030303", "#040404"
SYSTEMS = ("#050505", "#060606", "#070707", "#080808", "#090909")
VARIABLES = {INK: "--ink", QUIET: "--quiet", LINE: "--line", CARD: "--card"}
VARIABLES |= {color: f"--chart-{number}" for number, color in enumerate(SYSTEMS, start=1)}

STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": FONT_PT,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": QUIET,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "legend.frameon": False,
    "legend.fontsize": FONT_PT,
}


@dataclass(frozen=True)
class Estimate:
    """A mean over queries with its interval."""

    value: float
    interval: Interval


def comparison_chart(systems: Mapping[str, Mapping[str, Estimate]]) -> Chart:
    """Draw each measure of each system as a point with its interval.

    Args:
        systems: {system: {measure: estimate}}, at most five systems.
    """
    measures = list(dict.fromkeys(name for estimates in systems.values() for name in estimates))
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        for number, (system, values) in enumerate(systems.items()):
            place = np.arange(len(measures)) + (number - (len(systems) - 1) / 2) * min(0.24, 0.8 / len(systems))
            mean = np.array([values[name].value for name in measures])
            error = np.abs(np.array([values[name].interval for name in measures]).T - mean)
            color = SYSTEMS[number % len(SYSTEMS)]
            marker = "osD^v"[number % len(SYSTEMS)]
            axes.errorbar(
                mean, place, xerr=error, fmt=marker, color=color, label=system, markersize=6, linewidth=2, capsize=0
            )
        axes.set(
            xlim=(-0.02, 1.02), ylim=(len(measures) - 0.5, -0.5), yticks=range(len(measures)), yticklabels=measures
        )
        axes.grid(axis="y", visible=False)
        if len(systems) > 1:
            figure.legend(loc="outside upper center", ncols=min(len(systems), 3), handletextpad=0.3)
        svg = _svg(figure, "comparison")
    return Chart("Recall and ranking", svg, "Points are means over the queries. Lines are 95 % bootstrap intervals.")


def survival_chart(levels: Sequence[Estimate]) -> Chart:
    """Draw the share of the queries whose search keeps a right image after 1, 2, ... symbols of its identifier."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        places = np.arange(1, len(levels) + 1)
        mean = np.array([level.value for level in levels])
        error = np.abs(np.array([level.interval for level in levels]).T - mean)
        axes.bar(places, mean, width=0.56, color=SYSTEMS[0], alpha=0.35)
        axes.errorbar(places, mean, yerr=error, fmt="o", color=SYSTEMS[0], markersize=5, linewidth=2)
        for place, value, high in zip(places, mean, mean + error[1], strict=True):
            axes.annotate(f"{value:.0%}", (place, high), (0, 4), textcoords="offset points", ha="center")
        axes.set(ylim=(0, 1.14), xlim=(0.4, len(levels) + 0.6), xticks=places, xlabel="symbols of the identifier")
        _percent(axes.yaxis)
        axes.grid(axis="x", visible=False)
        svg = _svg(figure, "survival")
    note = (
        "Share of the queries whose search keeps a prefix of a right image's identifier. "
        "A drop marks the symbol at which the search loses the right image."
    )
    return Chart("Where the right image is lost", svg, note)


def calibration_chart(bins: Sequence[Bin], error: float, *, scored: int) -> Chart:
    """Draw the reliability diagram of the first hits: share of right hits over score, and the hits per bin."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained", facecolor="none")
        axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        axes.plot([0, 1], [0, 1], color=QUIET, linestyle=(0, (4, 3)), linewidth=1.2)
        scores, shares = [bin.mean_score for bin in bins], [bin.share_right for bin in bins]
        axes.vlines(scores, scores, shares, color=SYSTEMS[1], linewidth=3, alpha=0.6)
        axes.plot(scores, shares, "o", color=SYSTEMS[0], markersize=7)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.04, 1.08), ylabel="share right")
        counts.bar([bin.low for bin in bins], [bin.n for bin in bins], [bin.high - bin.low for bin in bins],
                   align="edge", color=SYSTEMS[0], alpha=0.35)  # fmt: skip
        counts.set(xlabel="score of the first hit", ylabel="queries")
        counts.locator_params(axis="y", nbins=2, integer=True)
        _percent(axes.yaxis)
        svg = _svg(figure, "calibration")
    note = (
        f"Expected calibration error {error:.3f} over {scored} first hits in ten bins. "
        "On the dashed line, a score of 0.8 is right 8 times in 10. Below the line, the model is overconfident."
    )
    return Chart("Calibration of the scores", svg, note)


def latency_chart(latency_ms: Sequence[float]) -> Chart:
    """Draw a histogram of the latency of each query, in milliseconds, one query at a time."""
    p50, p95 = (float(value) for value in np.percentile(latency_ms, [50, 95]))
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        shown = np.clip(latency_ms, None, max(2 * p95, 1e-3))
        axes.hist(shown, bins=min(30, max(5, round(len(latency_ms) ** 0.5))), color=SYSTEMS[0], alpha=0.45)
        top = axes.get_ylim()[1]
        for value, name, line, side in ((p50, "median", "-", "right"), (p95, "95 %", (0, (4, 3)), "left")):
            axes.axvline(value, color=INK, linestyle=line, linewidth=1.4)
            text = f"{name} {value:,.0f}" if value >= 100 else f"{name} {value:.3g}"
            offset = (-4 if side == "right" else 4, 2)
            axes.annotate(text, (value, top), offset, textcoords="offset points", ha=side)
        axes.set(xlabel="milliseconds", ylabel="queries", ylim=(0, top * 1.12))
        axes.margins(x=0.12)
        axes.grid(axis="x", visible=False)
        axes.locator_params(axis="y", integer=True)
        svg = _svg(figure, "latency")
    beyond = sum(value > 2 * p95 for value in latency_ms)
    late = f" The last bar includes {beyond} slower ones." if beyond else ""
    return Chart("Latency of a query", svg, f"{len(latency_ms)} queries, one at a time, on this machine.{late}")


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained", facecolor="none")
    return figure, figure.subplots()


def _percent(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{value:.0%}" if value < 1.001 else "")


def _svg(figure: Figure, name: str) -> str:
    """Return the figure as an SVG element for the page.

    It has no size, URL or font. Its ids are unique on the page, and its colors are CSS variables of the page.
    """
    out = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    head, _, body = out.getvalue().partition("<svg ")[2].partition(">")
    view = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(
        r' id="(?!m[0-9a-f]{10}"|p[0-9a-f]{10}")[^"]*"', "", body
    )  # only markers and clip paths are referenced
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var({variable})")
    return f"<svg {view.group() if view else ''}>{body.strip()}"
