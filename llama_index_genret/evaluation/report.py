"""Write the HTML report of an evaluation: tables, charts, and a selection of queries.

Depends on evaluations and the index; independent of HTML and models. Charts need the extra `eval`.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_genret.corpus import Record
from llama_index_genret.evaluation.evaluate import Evaluation
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
from llama_index_genret.evaluation.metrics import bootstrap_interval, expected_calibration_error, reliability
from llama_index_genret.evaluation.parts import BLEND, ENCODER, MODEL
from llama_index_genret.store import Index

if TYPE_CHECKING:
    from llama_index_genret.evaluation.charts import Estimate

STRIPS = 30
"""Number of queries in the group of the worst, and in the random group."""

ERROR = "calibration_error"
NOTES = {
    BLEND: "blend: the model and the encoder together, which is what a query gets.",
    MODEL: "model: the generative model alone.",
    ENCODER: "encoder: the embedding model of the index alone.",
}
MEASURES = {
    "recall@1": "recall@1",
    "recall@5": "recall@5",
    "recall@10": "recall@10",
    "mrr": "MRR",
    "ndcg@10": "nDCG@10",
}


def write_evaluation_report(
    path: Path,
    index: Index,
    evaluation: Evaluation,
    *,
    name: str = MODEL,
    baselines: Mapping[str, Evaluation] | None = None,
    tables: Sequence[Table] = (),
    answers: Sequence[ReportAnswer] = (),
    charts: bool = True,
    seed: int = 0,
) -> None:
    """Write one self-contained HTML page: figures, charts, the `STRIPS` worst queries and as many random ones.

    Args:
        name: the part of the index that recalled, the first column. Default "model".
        baselines: evaluations of the same queries by other parts of the index and other systems, keyed by name.
            Default none.
        tables: further tables, placed before those of the evaluation. Default none.
        answers: questions with answers and sources. Default none.
        charts: whether to draw charts. False needs no matplotlib. Default True.
        seed: seed of the random selection, default 0.

    Raises:
        MissingExtra: matplotlib is not installed. NotWritten: the page cannot be written.
    """
    systems = {name: evaluation, **(baselines or {})}
    kinds = dict.fromkeys(query.kind for query in evaluation.queries)
    write_report(
        path,
        title="How well the index recalls its images",
        subtitle=f"{len(evaluation.queries)} queries, {len(index.records)} images, "
        f"{index.manifest.scheme} identifiers of {index.trie.depth} symbols.",
        tables=[*tables, _comparison(systems), *([_kinds(evaluation, kinds)] if len(kinds) > 1 else [])],
        charts=_charts(systems) if charts else (),
        groups=_groups(index, evaluation, random.Random(seed)),
        answers=answers,
        images={record.image_id: record.path for record in index.records},
    )


def report_hit(record: Record, score: float, right: Collection[str]) -> ReportHit:
    """Return the entry of a recalled image for the report."""
    caption = record.captions[0] if record.captions else record.file_name
    return ReportHit(record.image_id, record.path, caption, score, record.image_id in right)


def worst_first(evaluation: Evaluation) -> list[int]:
    """Return the positions of the queries, worst first.

    Misses come first, then the queries by the rank of the right image, lowest rank first. Among equal ones, the query
    with the highest score of its first hit comes first. A refused query has no hits and counts as a miss of score 0.
    """
    reciprocal = evaluation.of_each_query()["mrr"]

    def badness(row: int) -> tuple[float, float]:
        hits = evaluation.hits[row]
        return reciprocal[row], -hits[0].score if hits else 0.0

    return sorted(range(len(evaluation.queries)), key=badness)


def _groups(index: Index, evaluation: Evaluation, lot: random.Random) -> list[QueryGroup]:
    n = len(evaluation.queries)
    if n <= STRIPS:
        return [_group(index, evaluation, f"All {n} queries", worst_first(evaluation), "The worst come first.")]
    worst, drawn = worst_first(evaluation)[:STRIPS], sorted(lot.sample(range(n), STRIPS))
    by_lot = f"A random sample of all {n} queries."
    surest = f"From {n} queries: misses first, by the score of the first hit, then by the rank of the right image."
    return [
        _group(index, evaluation, f"The {STRIPS} worst", worst, surest),
        _group(index, evaluation, f"{STRIPS} at random", drawn, by_lot),
    ]


def _group(index: Index, evaluation: Evaluation, title: str, rows: Iterable[int], note: str) -> QueryGroup:
    queries = []
    for row in rows:
        query = evaluation.queries[row]
        shown = tuple(report_hit(index.record_of(hit), hit.score, query.image_ids) for hit in evaluation.hits[row])
        text = query.text if query.image is None else f"{query.image.name} {query.text}".strip()
        queries.append(ReportQuery(text, query.kind, tuple(sorted(query.image_ids)), shown))
    return QueryGroup(title, tuple(queries), note)


def _comparison(systems: Mapping[str, Evaluation]) -> Table:
    """Return a table of measures (rows) and systems (columns), with intervals. What was not measured stays empty."""
    figures = {name: evaluation.figures() for name, evaluation in systems.items()}
    rows = [(Cell(shown), *(_with_interval(one, key) for one in figures.values())) for key, shown in MEASURES.items()]
    for shown, key, cell_of in (("latency, ms", "latency_ms", _latency), ("calibration error", ERROR, _calibration)):
        if any(key in one for one in figures.values()):
            rows.append((Cell(shown), *(cell_of(one[key]) if key in one else Cell("") for one in figures.values())))
    note = "Below each figure is its 95 % bootstrap interval. Queries with the same right images are drawn together."
    named = " ".join(NOTES[name] for name in systems if name in NOTES)
    return Table("Figures", ("", *systems), tuple(rows), f"{named} {note}".strip())


def _latency(percentiles: Mapping[str, float]) -> Cell:
    return Cell(f"{percentiles['p50']:,.0f}", f"95 %: {percentiles['p95']:,.0f}")


def _calibration(error: float) -> Cell:
    return Cell(f"{error:.3f}")


def _with_interval(figures: Mapping[str, Any], key: str) -> Cell:
    low, high = figures["interval"][key]
    return Cell(f"{figures[key]:.3f}", f"{low:.3f}–{high:.3f}")


def _kinds(evaluation: Evaluation, kinds: Iterable[str]) -> Table:
    rows = []
    for kind in kinds:
        figures = evaluation.of_kind(kind).figures()
        shares = (Cell(f"{figures[key]:.3f}") for key in ("recall@1", "recall@10", "mrr"))
        rows.append((Cell(kind), Cell(str(figures["n"])), *shares))
    return Table("Figures per kind of query", ("kind", "queries", "recall@1", "@10", "MRR"), tuple(rows))


def _charts(systems: Mapping[str, Evaluation]) -> list[Chart]:
    from llama_index_genret.evaluation import charts

    ours = next(iter(systems.values()))
    drawn = [charts.comparison_chart({name: _estimates(evaluation) for name, evaluation in systems.items()})]
    if ours.kept:
        groups = [query.image_ids for query in ours.queries]
        levels = ours.levels().T.tolist()
        means = zip(ours.prefix_survival(), levels, strict=True)
        drawn.append(
            charts.survival_chart([charts.Estimate(mean, bootstrap_interval(values, groups)) for mean, values in means])
        )
    scores, right = ours.first_hits()
    if scores:
        error = expected_calibration_error(scores, right)
        drawn.append(charts.calibration_chart(reliability(scores, right), error, scored=len(scores)))
    return [*drawn, charts.latency_chart(ours.latency_ms)] if ours.latency_ms else drawn


def _estimates(evaluation: Evaluation) -> dict[str, Estimate]:
    from llama_index_genret.evaluation.charts import Estimate

    figures, intervals = evaluation.figures(), evaluation.intervals()
    return {shown: Estimate(figures[key], intervals[key]) for key, shown in MEASURES.items()}
