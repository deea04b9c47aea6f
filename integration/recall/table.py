"""The recall table: trained indexes beside the peers, on queries that no choice was made on.

    python -m integration.recall.table --index NAME=FOLDER ... [--json FILE] [--picture FILE.png]

Every index was made of one whole corpus of `integration.recall.corpora` and trained. The table detects which, and uses
text or image queries as in its training. Each of its test queries counts, and a refused one is a miss. Ties count
against a peer. A row has recall@1/5/10 and MRR with 95 % bootstrap intervals over the images of the queries. It has
the lead of the index over each peer, query by query. The validation queries choose the mixture of the hybrid.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from integration.bench.timing import Report
from integration.recall.corpora import default_folder, make_corpora
from integration.recall.fusion import choose_fusion
from integration.recall.generative import prefix_survival, recall_queries
from integration.recall.peers import Peers
from integration.recall.query_sets import QUERY_SETS, RECALLS, QuerySet, corpus_of
from llama_index_genret.evaluation.baselines import evaluation_by_score
from llama_index_genret.evaluation.evaluate import Evaluation
from llama_index_genret.evaluation.metrics import Interval, bootstrap_interval
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.scorers.base import Scorer
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.store import Index, load_index
from llama_index_genret.store.model_loading import load_trained
from llama_index_genret.store.queries import read_queries

BEAM, EXACT, HYBRID = "beam 10", "exact", "hybrid"
COLUMNS = (*RECALLS, "mrr")
FUSED_HITS = 50
HYBRID_AHEAD = 1.1
"""Ratio of our figure to that of the better of the hybrid's two parts."""


@dataclass(frozen=True)
class Section:
    """All rows of one index on one query set: ours first, then the peers."""

    query_set: QuerySet
    index_name: str
    rows: dict[str, Evaluation]
    survival: tuple[float, ...] = ()
    note: str = ""

    @property
    def title(self) -> str:
        return f"{self.index_name}: {self.query_set.name}"

    @property
    def peers(self) -> dict[str, Evaluation]:
        return {name: row for name, row in self.rows.items() if name not in (BEAM, EXACT, HYBRID)}

    def goals(self) -> dict[str, tuple[float, float]]:
        """Return the value and the goal of each figure that has a goal."""
        figures = {name: row.figures() for name, row in self.rows.items()}
        best = {column: max(figures[name][column] for name in self.peers) for column in RECALLS}
        wanted = dict(zip(RECALLS, self.query_set.goal, strict=True)) if self.query_set.goal else best
        goals = {column: (figures[BEAM][column], wanted[column]) for column in RECALLS}
        if HYBRID in self.rows:
            for column in RECALLS:
                parts = max(figures[BEAM][column], figures["MiniLM"][column])
                goals[f"{HYBRID} {column}"] = (figures[HYBRID][column], HYBRID_AHEAD * parts)
        return goals

    def ahead(self, ours: str, peer: str) -> dict[str, Interval]:
        """Return 95 % intervals of our figures minus a peer's, by the paired bootstrap."""
        left, right = self.rows[ours].of_each_query(), self.rows[peer].of_each_query()
        image_ids = [query.image_ids for query in self.rows[ours].queries]
        return {
            column: bootstrap_interval([a - b for a, b in zip(left[column], right[column], strict=True)], image_ids)
            for column in COLUMNS
        }


def measure(
    name: str, index: Index, scorer: Scorer, peers: Peers, query_set: QuerySet, queries: Path, *, hybrid: bool = True
) -> Section:
    """Measure every row of one index on one query set, without the hybrid unless requested."""

    def bar(batches: Any) -> Any:
        return tqdm(batches, desc=f"{name}: {query_set.name}", file=sys.stderr)

    test = read_queries(queries / f"{query_set.name}-test.jsonl", index.records)
    beam = recall_queries(index, scorer, test, progress=bar)
    # Identifiers of one symbol are all scored in the only step.
    exact = recall_queries(index, scorer, test, mode="exact", progress=bar) if _is_tree(index) else beam
    rows = {BEAM: beam.evaluation(), EXACT: exact.evaluation()}
    note = ""
    if hybrid and not query_set.shows_images:
        validation = read_queries(queries / f"{query_set.name}-validation.jsonl", index.records)
        generative = [
            recall_queries(index, scorer, part, k=FUSED_HITS, progress=bar).log_probs() for part in (validation, test)
        ]
        dense = [peers.dense(index.records, part) for part in (validation, test)]
        fusion, reached = choose_fusion(generative[0], dense[0], index.records, validation)
        rows[HYBRID] = evaluation_by_score(fusion.scores(generative[1], dense[1]), index.records, test)
        note = f"hybrid: {fusion}; on the validation queries {_shown(reached)}"
    survival = prefix_survival(index, scorer, test, progress=bar) if _is_tree(index) else []
    rows |= peers.evaluate(query_set, index.records, test)
    return Section(query_set, name, rows, tuple(survival), note)


def _has_training_examples(index: Index, query_set: QuerySet) -> bool:
    """Return True if the training had examples of these queries: images, or text beyond the captions."""
    mix = (index.manifest.training or {}).get("mix", {})
    return bool(mix.get("memorise" if query_set.shows_images else "imitate"))


def _is_tree(index: Index) -> bool:
    return max(map(len, index.identifiers)) > 1


def _shown(evaluation: Evaluation) -> str:
    figures = evaluation.figures()
    return " / ".join(f"{figures[column]:.3f}" for column in RECALLS)


def record(report: Report, section: Section) -> None:
    """Print a section, and keep it for the JSON file."""
    queries = next(iter(section.rows.values())).queries
    report.section(f"{section.title}, {len(queries)} test queries")
    print(f"  {'':20}" + "".join(f"{column:^26}" for column in COLUMNS))
    for name, row in section.rows.items():
        figures, intervals = row.figures(), row.intervals()
        cells = (
            f"{figures[column]:.3f} [{intervals[column].low:.3f}, {intervals[column].high:.3f}]" for column in COLUMNS
        )
        print(f"  {name:20}" + "".join(f"{cell:^26}" for cell in cells), flush=True)
        report.results[f"{section.title}, {name}"] = figures
    for ours in (BEAM, HYBRID):
        for peer in section.peers if ours in section.rows else ():
            ahead = section.ahead(ours, peer)
            cells = (f"{interval.low:+.3f} .. {interval.high:+.3f}" for interval in ahead.values())
            print(f"  {f'{ours} - {peer}':20}" + "".join(f"{cell:^26}" for cell in cells), flush=True)
            report.results[f"{section.title}, {ours} - {peer}"] = {column: list(i) for column, i in ahead.items()}
    if section.survival:
        report.value(f"{section.title}, right prefix kept, by level", [round(share, 3) for share in section.survival])
    if section.note:
        print(f"  {section.note}", flush=True)
        report.results[f"{section.title}, note"] = section.note
    for column, (reached, wanted) in section.goals().items():
        report.goal(f"{section.title}, {column}", reached, at_least=round(wanted, 3))


def draw(sections: Sequence[Section], path: Path) -> None:
    """Draw horizontal bars of recall@1 and @10 with their intervals, one panel a section."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = sum(len(section.rows) + 1.5 for section in sections) * 0.3
    figure, panels = pyplot.subplots(
        len(sections), 1, figsize=(8, height), squeeze=False, height_ratios=[len(section.rows) for section in sections]
    )
    for section, axes in zip(sections, panels[:, 0], strict=True):
        for place, (name, row) in enumerate(section.rows.items()):
            figures, intervals = row.figures(), row.intervals()
            ours = name in (BEAM, EXACT, HYBRID)
            for column, shade in (("recall@10", 0.35), ("recall@1", 1.0)):
                value, interval = figures[column], intervals[column]
                axes.barh(place, value, color="tab:blue" if ours else "tab:gray", alpha=shade)
                error = [[max(value - interval.low, 0)], [max(interval.high - value, 0)]]
                axes.errorbar(value, place, xerr=error, color="black", capsize=2, linewidth=0.8)
        axes.set(xlim=(0, 1), yticks=range(len(section.rows)), yticklabels=list(section.rows))
        axes.set_title(f"{section.title}: recall@1 (dark), recall@10 (light)", fontsize=9, loc="left")
        axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def named_folder(text: str) -> tuple[str, Path]:
    """Parse `NAME=FOLDER`."""
    name, equals, folder = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must read NAME=FOLDER")
    return name, Path(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=named_folder, action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--corpora", type=Path, help="folder of integration.recall.corpora (default: made if needed)")
    parser.add_argument("--sets", help="comma-separated names of query sets (default: all)")
    parser.add_argument("--no-hybrid", dest="hybrid", action="store_false", help="leave out the row of the hybrid")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file to add the results to")
    parser.add_argument(
        "--title",
        default="recall",
        help="title of the results in that file, where it replaces results of the same title",
    )
    parser.add_argument("--picture", type=Path, help="a PNG of bars; needs matplotlib")
    options = parser.parse_args(argv)
    names = options.sets.split(",") if options.sets else [query_set.name for query_set in QUERY_SETS]
    corpora = options.corpora or make_corpora(default_folder())
    report = Report(options.title, seed=0)
    sections = []
    peers: dict[str, Peers] = {}
    for name, folder in options.index:
        index = load_index(folder)
        corpus = corpus_of(index, corpora)
        scorer = TransformersScorer(load_trained(index, device=options.device))
        base = index.manifest.model.name_or_path
        if base not in peers:
            peers[base] = Peers(load_mllm(base, device=options.device))
        for query_set in QUERY_SETS:
            if query_set.corpus == corpus and query_set.name in names and _has_training_examples(index, query_set):
                rows = measure(name, index, scorer, peers[base], query_set, corpora / "queries", hybrid=options.hybrid)
                sections.append(rows)
                record(report, sections[-1])
                report.write(options.json)
    if options.picture:
        draw(sections, options.picture)


if __name__ == "__main__":
    main()
