"""The effect of verification on recall, and its detection of queries about no image of the index.

    python -m integration.recall.verify INDEX [--queries FILE] [--foreign FILE ...] [--by image] [--json FILE]

Known queries are about images of the index. For abstention half of the images are left out: a filter hides them. The
queries about them are then about nothing ("removed"). The model was trained on those images, and prefers them.
"foreign" are queries about another corpus. Either kind has queries that fit an image that is there.

The weight of the evidence, the weights of the signals and the threshold are chosen on one half of the queries for the
other half. Below the threshold are at most 5 % of the known queries. The images of the queries decide the halves. Every
figure is of all queries. Without --queries the index is of a corpus of `integration.recall.corpora`. Its validation
queries are used then, with those of another corpus as foreign ones.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from integration.bench.timing import Report
from integration.recall.corpora import default_folder, make_corpora
from integration.recall.query_sets import QUERY_SETS, bare_records, corpus_of
from llama_index_genret.evaluation.evaluate import evaluation_of
from llama_index_genret.evaluation.metrics import auroc, bootstrap_interval
from llama_index_genret.scorers.abstention import Abstention, Signals, fit_abstention, log_odds
from llama_index_genret.scorers.base import Scorer, recall
from llama_index_genret.scorers.evidence import Evidence, Inquiry, gather_evidence
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import Hit, SearchOptions
from llama_index_genret.store import Index, load_index
from llama_index_genret.store.model_loading import load_trained
from llama_index_genret.store.queries import EvaluationQuery, read_queries
from llama_index_genret.store.scoring import RerankBy
from llama_index_genret.trie import LeafFilter

DEPTH, BATCH = 10, 16
WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
LOST = 0.05
COLUMNS = ("recall@1", "recall@5", "mrr")
CHOICES: dict[str, tuple[str, ...]] = {
    "odds": ("odds",),
    "lead": ("lead",),
    "information": ("information",),
    "named": ("named",),
    "odds + named": ("odds", "named"),
    "all four": Signals._fields,
}


@dataclass(frozen=True)
class Verified:
    """A query, its hits, and the evidence for each hit."""

    query: EvaluationQuery
    hits: tuple[Hit, ...]
    first_is_right: bool
    evidence: Evidence

    @property
    def signals(self) -> Signals:
        return self.evidence.signals([hit.score for hit in self.hits])

    @property
    def half(self) -> int:
        """Return the half of a query, the same for all queries about the same images."""
        return _bit("half", *sorted(self.query.image_ids)) if self.query.image_ids else _bit("half", self.query.text)

    def ranked(self, weight: float) -> tuple[Hit, ...]:
        """Return the hits as a verifier of that weight ranks them."""
        scores = np.array([log_odds(hit.score) for hit in self.hits]) + weight * self.evidence.information
        return tuple(self.hits[place] for place in np.argsort(-scores, kind="stable"))


def _bit(*parts: str) -> int:
    return hashlib.sha256(":".join(parts).encode()).digest()[0] & 1


def verified(
    index: Index,
    scorer: Scorer,
    queries: Sequence[EvaluationQuery],
    *,
    by: RerankBy,
    references: int,
    kept: NDArray[np.bool_],
) -> list[Verified]:
    """Recall the queries among the records that are kept, and compute the evidence.

    Args:
        kept: (records,)
    """
    row_of_leaf = index.trie.key(np.arange(index.trie.n_leaves))
    allowed = LeafFilter.from_mask(kept[row_of_leaf] & (row_of_leaf >= 0))
    drawn = np.random.default_rng(0).choice(np.flatnonzero(kept), references, replace=False)
    found: list[Verified] = []
    for start in tqdm(range(0, len(queries), BATCH), file=sys.stderr, desc="Verifying"):
        part = queries[start : start + BATCH]
        prompts = [query.prompt(index) for query in part]
        rankings = recall(scorer, index.trie, prompts, SearchOptions(k=DEPTH, leaf_filter=allowed))
        inquiries = [
            Inquiry(index, prompt, tuple(hit.key for hit in ranking.hits), by, tuple(drawn.tolist()))
            for prompt, ranking in zip(prompts, rankings, strict=True)
        ]
        evidence = gather_evidence(scorer, inquiries)
        for query, ranking, one in zip(part, rankings, evidence, strict=True):
            first = index.record_of(ranking.hits[0]).image_id
            found.append(Verified(query, ranking.hits, first in query.image_ids, one))
    return found


def ranking_figures(report: Report, index: Index, found: Sequence[Verified]) -> None:
    """Print recall@1/5 and MRR with and without verification, the weight chosen on the other half."""
    weights = [_best_weight(index, [one for one in found if one.half != half]) for half in (0, 1)]
    report.section(f"Verification, {len(found)} queries; weights of the two halves {weights}")
    queries = [one.query for one in found]
    rows = {
        "as recalled": evaluation_of(index, queries, [one.ranked(0.0) for one in found]),
        "verified": evaluation_of(index, queries, [one.ranked(weights[one.half]) for one in found]),
    }
    values = {name: row.of_each_query() for name, row in rows.items()}
    groups = [query.image_ids for query in queries]
    for name, row in rows.items():
        for column in COLUMNS:
            _show(report, f"{name}: {column}", row.of_each_query()[column], groups)
    for column in COLUMNS:
        gained = [b - a for a, b in zip(values["as recalled"][column], values["verified"][column], strict=True)]
        _show(report, f"difference: {column}", gained, groups)
    report.results["weights"] = weights


def _best_weight(index: Index, found: Sequence[Verified]) -> float:
    """Return the weight with the highest MRR, the least of equal ones."""

    def quality(weight: float) -> float:
        ranked = [one.ranked(weight) for one in found]
        return float(evaluation_of(index, [one.query for one in found], ranked).figures()["mrr"])

    return max(WEIGHTS, key=lambda weight: (quality(weight), -weight))


def abstention_figures(report: Report, known: Sequence[Verified], unknown: Mapping[str, Sequence[Verified]]) -> None:
    """Print AUROC of each signal and of fitted ones, and wrong abstentions and answers at their thresholds."""
    kinds = {"known": known, **unknown}
    report.section("Abstention: " + ", ".join(f"{len(found)} {kind}" for kind, found in kinds.items()))
    for name, signals in CHOICES.items():
        fitted = [_fitted(known, unknown, half, signals) for half in (0, 1)]
        for kind, found in unknown.items():
            area = np.mean(
                [auroc(_confidences(known, half, fitted), _confidences(found, half, fitted)) for half in (0, 1)]
            )
            report.value(f"{name}: AUROC, known and {kind}", float(area))
        for kind, found in kinds.items():
            given = [float(not fitted[one.half].abstains(one.signals)) for one in found]
            wrong = [1 - value for value in given] if kind == "known" else given
            label = "wrongly given no image" if kind == "known" else "wrongly given an image"
            _show(report, f"{name}: {kind}, {label}", wrong, [one.query.text for one in found])
    evaluated = [*known, *unknown["removed"]]
    answered = [one for one in evaluated if not fitted[one.half].abstains(one.signals)]
    for title, found in ((f"all {len(evaluated)} are answered", evaluated), (f"{len(answered)} are", answered)):
        right = [float(one.first_is_right) for one in found]
        _show(report, f"known and removed, {title}: right first image", right, [one.query.image_ids for one in found])


def _fitted(
    known: Sequence[Verified], unknown: Mapping[str, Sequence[Verified]], half: int, signals: Sequence[str]
) -> Abstention:
    """Fit on the queries of the other half."""
    others = [one.signals for found in unknown.values() for one in found if one.half != half]
    return fit_abstention([one.signals for one in known if one.half != half], others, lost=LOST, signals=signals)


def _confidences(found: Sequence[Verified], half: int, fitted: Sequence[Abstention]) -> list[float]:
    return [fitted[half].confidence(one.signals) for one in found if one.half == half]


def _show(report: Report, key: str, values: Sequence[float], groups: Sequence[Hashable]) -> None:
    """Return the mean and its 95 % bootstrap interval."""
    low, high = bootstrap_interval(values, groups)
    mean = float(np.mean(values)) if len(values) else float("nan")
    print(f"  {key:69} {mean:.3f} [{low:.3f}, {high:.3f}]", flush=True)
    report.results[key] = {"mean": mean, "interval": [low, high], "n": len(values)}


def _foreign(corpora: Path, corpus: str) -> list[EvaluationQuery]:
    """Return validation queries of the other corpora, emoji and clip art."""
    family = corpus.partition("-")[0]
    found = []
    for query_set in QUERY_SETS:
        if query_set.corpus.partition("-")[0] != family and not query_set.shows_images:
            records = bare_records(corpora, query_set.corpus)
            found += read_queries(corpora / "queries" / f"{query_set.name}-validation.jsonl", records)
    return [EvaluationQuery(query.text, frozenset(), "foreign") for query in found]


def _query_files(index: Index, options: argparse.Namespace) -> tuple[list[EvaluationQuery], list[EvaluationQuery]]:
    """Return known and foreign queries."""
    if options.queries:
        known = [query for path in options.queries for query in read_queries(path, index.records)]
        lines = [line for path in options.foreign or () for line in path.read_text(encoding="utf-8").splitlines()]
        return known, [
            EvaluationQuery(json.loads(line)["query"], frozenset(), "foreign") for line in lines if line.strip()
        ]
    corpora = make_corpora(default_folder())
    corpus = corpus_of(index, corpora)
    names = [a.name for a in QUERY_SETS if a.corpus == corpus and not a.shows_images]
    known = [q for n in names for q in read_queries(corpora / "queries" / f"{n}-validation.jsonl", index.records)]
    return known, _foreign(corpora, corpus)


def _some(queries: list[EvaluationQuery], limit: int | None) -> list[EvaluationQuery]:
    """Sample queries, the same in every run."""
    order = np.random.default_rng(0).permutation(len(queries))[:limit]
    return [queries[row] for row in sorted(order.tolist())]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("--queries", type=Path, nargs="+", help="held-out queries of this index")
    parser.add_argument("--foreign", type=Path, nargs="+", help="queries about no image of this index")
    parser.add_argument("--kind", help="only the known queries of this kind")
    parser.add_argument("--limit", type=int, help="number of known queries, and of foreign ones (default: all)")
    parser.add_argument("--by", choices=get_args(RerankBy), default="identifier")
    parser.add_argument("--references", type=int, default=8)
    parser.add_argument("--model", help="the base model, if it has moved")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file to add the results to")
    options = parser.parse_args(argv)
    index = load_index(options.index)
    known, foreign = _query_files(index, options)
    known = _some([query for query in known if options.kind in (None, query.kind)], options.limit)
    foreign = _some(foreign, options.limit)
    scorer = TransformersScorer(load_trained(index, device=options.device, base=options.model))
    verify = partial(verified, index, scorer, by=options.by, references=options.references)
    report = Report("verify", seed=0)
    ranking_figures(report, index, verify(known, kept=np.ones(len(index.records), np.bool_)))
    kept = np.array([_bit("left out", record.image_id) for record in index.records], np.bool_)
    there = {record.image_id for record, stays in zip(index.records, kept, strict=True) if stays}
    found = verify([*known, *foreign], kept=kept)
    about = {"known": [], "removed": [], "foreign": []}
    for one in found:
        images = one.query.image_ids
        about["foreign" if not images else "known" if images & there else "removed"].append(one)
    abstention_figures(report, about.pop("known"), about)
    report.write(options.json)


if __name__ == "__main__":
    main()
