"""The charts of a report, drawn by matplotlib as SVG that is part of the page.

Knows numbers, names and matplotlib. Texts stay texts, and every color is one of the page's own CSS variables, so that
a chart is read in light and dark. Needs the extra `eval`; whoever imports this module is told so.
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
        "the charts of a report need matplotlib: pip install 'llama-index-genret[eval]'. "
        "Without --report, the figures are printed without it."
    ) from error

WIDTH_IN, HEIGHT_IN = 5.0, 3.3
FONT_PT = 11

# Stand-ins that matplotlib accepts as colors, each replaced by a variable of the page.
INK, QUIET, LINE, CARD = "#010101", "#020202", "#030303", "#040404"
SYSTEMS = ("#050505", "#060606", "#070707")
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
    """A mean over queries, and its interval."""

    value: float
    interval: Interval


def comparison_chart(systems: Mapping[str, Mapping[str, Estimate]]) -> Chart:
    """Every measure of every system as a point with its interval: {system: {measure: ...}}, at most three systems."""
    measures = list(dict.fromkeys(name for of_system in systems.values() for name in of_system))
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        for number, (system, values) in enumerate(systems.items()):
            place = np.arange(len(measures)) + (number - (len(systems) - 1) / 2) * 0.24
            mean = np.array([values[name].value for name in measures])
            error = np.abs(np.array([values[name].interval for name in measures]).T - mean)
            color = SYSTEMS[number % len(SYSTEMS)]
            marker = "osD"[number % 3]
            axes.errorbar(
                mean, place, xerr=error, fmt=marker, color=color, label=system, markersize=6, linewidth=2, capsize=0
            )
        axes.set(
            xlim=(-0.02, 1.02), ylim=(len(measures) - 0.5, -0.5), yticks=range(len(measures)), yticklabels=measures
        )
        axes.grid(axis="y", visible=False)
        if len(systems) > 1:
            figure.legend(loc="outside upper center", ncols=len(systems), handletextpad=0.3)
        svg = _svg(figure, "comparison")
    return Chart("Recall and ranking", svg, "Points are means over the queries, lines their 95 % bootstrap intervals.")


def survival_chart(levels: Sequence[Estimate]) -> Chart:
    """Share of the queries that still have a right image after 1, 2, ... symbols of its identifier."""
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
    note = "Queries of which the search kept a right image's beginning. Where the share falls, the right image is lost."
    return Chart("Where the right image is lost", svg, note)


def calibration_chart(bins: Sequence[Bin], error: float, *, scored: int) -> Chart:
    """The reliability diagram of the first hits' scores: share right over score, and how many lie in each bin."""
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
        "On the dashed line a score of 0.8 is right 8 times in 10; below it the model is too sure."
    )
    return Chart("Can the scores be believed?", svg, note)


def latency_chart(latency_ms: Sequence[float]) -> Chart:
    """How long the queries took, one at a time."""
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
    late = f" The last bar holds {beyond} that took longer." if beyond else ""
    return Chart("How long a query takes", svg, f"{len(latency_ms)} queries, one at a time, on this machine.{late}")


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained", facecolor="none")
    return figure, figure.subplots()


def _percent(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{value:.0%}" if value < 1.001 else "")


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element of a page: no size, no address, no font, ids of its own, the page's colors."""
    out = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    head, _, body = out.getvalue().partition("<svg ")[2].partition(">")
    view = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r' id="(?!m[0-9a-f]{10}"|p[0-9a-f]{10}")[^"]*"', "", body)  # only markers and clips are referred to
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var({variable})")
    return f"<svg {view.group() if view else ''}>{body.strip()}"
