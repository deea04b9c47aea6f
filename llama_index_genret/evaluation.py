"""Measuring recall on held-out queries, beside text baselines over the same captions.

Every query of the file counts, an unanswerable one as a miss. Knows scorers; nothing of LlamaIndex.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.calibration import expected_calibration_error
from llama_index_genret.corpus import Record
from llama_index_genret.errors import CorpusError, MissingExtra, QueryError
from llama_index_genret.json_lines import objects
from llama_index_genret.metrics import (
    Interval,
    bootstrap_interval,
    found_at,
    mean_reciprocal_rank,
    ndcg_at,
    ndcgs_at,
    recall_at,
    reciprocal_ranks,
)
from llama_index_genret.prompts import Prompt
from llama_index_genret.scorers.base import Scorer, recall
from llama_index_genret.scorers.ranked import ranking_options
from llama_index_genret.scorers.watching import Prefix, WatchingScorer
from llama_index_genret.search import Hit, Normalise
from llama_index_genret.store import Index, Scoring, text_key

DEPTH = 10
"""Results looked at for each query."""

NAMING_KEYS = ("image_id", "file_name")
_QUERY_LINE = '{"query": "...", "file_name": "..."}'


@dataclass(frozen=True)
class Query:
    """A query and the images that are right for it.

    kind: free text by which figures are parted. image: the file of a query that is a picture, alone or with a text.
    """

    text: str
    image_ids: frozenset[str]
    kind: str = "query"
    image: Path | None = None

    def prompt(self, index: Index) -> Prompt:
        """What the index's model is asked. Raises QueryError: see `PromptSet.for_query`."""
        if self.image is None:
            return index.prompts.for_query(index.tokenizer, self.text)
        return index.prompts.for_image(index.tokenizer, self.image, self.text)


@dataclass(frozen=True)
class Evaluation:
    """Ranked image ids of every query, and what follows from them.

    hits: of a generative recall, as many as `ranked`. latency_ms: of each query alone, where it was measured.
    kept: of each query, where it was watched: whether the search kept the first 1, 2, ... symbols of a right image.
    """

    queries: tuple[Query, ...]
    ranked: tuple[tuple[str, ...], ...]
    hits: tuple[tuple[Hit, ...], ...] = ()
    latency_ms: tuple[float, ...] = ()
    kept: tuple[tuple[bool, ...], ...] = ()

    def figures(self) -> dict[str, Any]:
        """n, recall@1/5/10, mrr, ndcg@10 and the `interval` of each.

        Where they were measured: `latency_ms` percentiles, `prefix_survival`, and of hits `calibration_error`.
        """
        expected = [query.image_ids for query in self.queries]
        figures: dict[str, Any] = {"n": len(self.queries)}
        figures |= {f"recall@{k}": recall_at(self.ranked, expected, k) for k in (1, 5, 10)}
        figures |= {"mrr": mean_reciprocal_rank(self.ranked, expected), "ndcg@10": ndcg_at(self.ranked, expected, 10)}
        figures["interval"] = {name: list(interval) for name, interval in self.intervals().items()}
        if self.latency_ms:
            p50, p95 = np.percentile(self.latency_ms, [50, 95])
            figures["latency_ms"] = {"p50": round(float(p50), 1), "p95": round(float(p95), 1)}
        if self.kept:
            figures["prefix_survival"] = self.prefix_survival()
        if self.hits:
            figures["calibration_error"] = expected_calibration_error(*self.first_hits())
        return figures

    def prefix_survival(self) -> list[float]:
        """Share of the queries whose search kept the first 1, 2, ... symbols of a right image; see `levels_kept`.

        The last figure is recall@10.
        """
        return np.mean(self.levels(), axis=0).tolist() if self.kept else []

    def levels(self) -> NDArray[np.bool_]:
        """(queries, levels) `kept`, a shorter identifier being kept at the levels below its end if it is as a whole."""
        depth = max(map(len, self.kept), default=0)
        return np.array([[*kept, *[kept[-1]] * (depth - len(kept))] for kept in self.kept], np.bool_)

    def first_hits(self) -> tuple[list[float], list[bool]]:
        """The score of every first hit, and whether it is right; without the queries that were refused."""
        found = [(hits[0].score, ids[0] in query.image_ids) for query, ids, hits in self._rows() if hits]
        return [score for score, _ in found], [right for _, right in found]

    def _rows(self) -> Iterable[tuple[Query, tuple[str, ...], tuple[Hit, ...]]]:
        return zip(self.queries, self.ranked, self.hits, strict=True)

    def of_each_query(self) -> dict[str, list[float]]:
        """recall@1/5/10, mrr and ndcg@10 of every query alone, in the order of `queries`."""
        expected = [query.image_ids for query in self.queries]
        values = {f"recall@{k}": found_at(self.ranked, expected, k) for k in (1, 5, 10)}
        values["mrr"] = reciprocal_ranks(self.ranked, expected)
        return values | {"ndcg@10": ndcgs_at(self.ranked, expected, 10)}

    def intervals(self) -> dict[str, Interval]:
        """95 % intervals of all of them; queries that ask for the same images are drawn together."""
        asked = [query.image_ids for query in self.queries]
        return {name: bootstrap_interval(values, asked) for name, values in self.of_each_query().items()}

    def of_kind(self, kind: str) -> Evaluation:
        """The part with queries of one kind."""
        rows = [row for row, query in enumerate(self.queries) if query.kind == kind]
        return Evaluation(
            tuple(self.queries[row] for row in rows),
            tuple(self.ranked[row] for row in rows),
            tuple(self.hits[row] for row in rows) if self.hits else (),
            tuple(self.latency_ms[row] for row in rows) if self.latency_ms else (),
            tuple(self.kept[row] for row in rows) if self.kept else (),
        )


def read_queries(path: Path, records: Sequence[Record]) -> list[Query]:
    """Read QUERIES.jsonl: `{"query": ..., "file_name" | "image_id": one or a list, "kind": optional}` a line.

    A query that is a picture names its file in `image`, relative to the folder of `path`; `query` may then be left out.

    Raises:
        CorpusError: a line is broken or names an image that the index lacks; names file and line.
    """
    ids = {
        "file_name": {record.file_name: record.image_id for record in records},
        "image_id": {record.image_id: record.image_id for record in records},
    }
    queries = [_query(row, where, ids, path.parent) for where, row in objects(path, example=_QUERY_LINE)]
    if not queries:
        raise CorpusError(f"{path} has no queries.")
    return queries


def _query(row: Mapping[str, Any], where: str, ids: Mapping[str, Mapping[str, str]], folder: Path) -> Query:
    text, image = row.get("query", "" if "image" in row else None), row.get("image", "")
    key = next((key for key in NAMING_KEYS if key in row), None)
    if not isinstance(text, str) or not isinstance(image, str) or key is None:
        raise CorpusError(f'{where}want {_QUERY_LINE} (or "image_id"), found {str(dict(row))[:80]}.')
    wanted = row[key] if isinstance(row[key], list) else [row[key]]
    missing = [name for name in wanted if not isinstance(name, str) or name not in ids[key]]
    if missing or not wanted:
        raise CorpusError(f"{where}the index has no image {missing or wanted!r:.200}. Correct {key}, or index it.")
    if image and not _is_file(folder / image):
        raise CorpusError(f"{where}the query's picture {folder / image} does not exist. Correct image.")
    image_ids = frozenset(ids[key][name] for name in wanted)
    return Query(text, image_ids, str(row.get("kind", "query")), folder / image if image else None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def evaluate(
    index: Index,
    scorer: Scorer,
    queries: Sequence[Query],
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    width: int | None = None,
    normalise: Normalise = Normalise.CHILDREN,
    scoring: Scoring | None = None,
) -> Evaluation:
    """Recall every query, one at a time, time each, and watch which prefixes are kept.

    A query that is refused has no results: a miss.

    Args:
        scoring: how hits are ranked, as the index was tuned if not given.
    """
    options = ranking_options(index, index.scoring() if scoring is None else scoring)
    watching = WatchingScorer(scorer)
    found, latency_ms, kept = [], [], []
    for query in progress(queries):
        start = time.perf_counter()
        try:
            prompt = query.prompt(index)
            (ranking,) = recall(watching, index.trie, [prompt], k=DEPTH, width=width, normalise=normalise, **options)
            hits = ranking.hits
        except QueryError:
            hits = ()
        latency_ms.append((time.perf_counter() - start) * 1e3)
        found.append(hits)
        kept.append(levels_kept(index, query, watching.kept(1)[0] if hits else (), hits))
    return replace(evaluation_of(index, queries, found, latency_ms), kept=tuple(kept))


def levels_kept(index: Index, query: Query, kept: Sequence[Prefix], hits: Sequence[Hit]) -> tuple[bool, ...]:
    """Whether a search kept the first 1, 2, ... symbols of a right image's identifier.

    A beginning that only one image has is that image: it is kept where the image is recalled. An identifier that is
    shorter than others must have been kept as a whole.

    Args:
        kept: prefixes whose children were scored, as of `WatchingScorer.kept`. hits: what was found in the end.
    """
    right = [index.token_ids(index.rows_by_id[image_id]) for image_id in query.image_ids]
    beams = [*kept, *(hit.token_ids for hit in hits)]

    def survives(level: int) -> bool:
        return any(beam[: len(name[:level])] == name[:level] for beam in beams for name in right)

    return tuple(survives(level) for level in range(1, max(map(len, right)) + 1))


def n_written_by_a_model(index: Index, queries: Sequence[Query]) -> int:
    """How many of the queries a model has written of a right image: after training, they are not held out."""
    return sum(
        any(
            text_key(written.text) == text_key(query.text)
            for image_id in query.image_ids
            for written in index.pseudo_queries_of(index.records[index.rows_by_id[image_id]])
        )
        for query in queries
    )


def evaluation_of(
    index: Index, queries: Sequence[Query], hits: Sequence[Sequence[Hit]], latency_ms: Sequence[float] = ()
) -> Evaluation:
    """What the hits of the queries amount to."""
    ranked = tuple(tuple(index.record_of(hit).image_id for hit in found) for found in hits)
    return Evaluation(tuple(queries), ranked, tuple(map(tuple, hits)), tuple(latency_ms))


def recall_in_batches(
    index: Index,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    *,
    k: int = DEPTH,
    batch: int = 32,
    normalise: Normalise = Normalise.CHILDREN,
    budget: int | None = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[tuple[Hit, ...]]:
    """Hits of many prompts, `batch` at a time in one search; `budget` as of `search.search`."""
    hits: list[tuple[Hit, ...]] = []
    for start in progress(range(0, len(prompts), batch)):
        asked = prompts[start : start + batch]
        rankings = recall(scorer, index.trie, asked, k=k, normalise=normalise, budget=budget)
        hits += [ranking.hits for ranking in rankings]
    return hits


def baseline(name: str, records: Sequence[Record], queries: Sequence[Query]) -> Evaluation:
    """The same queries by a text index over the captions: `tfidf` (character 2- to 4-grams) or `bm25`.

    Ties are counted against: the right image comes after all images of equal score.
    Raises:
        QueryError: no such baseline. MissingExtra: its library is not installed.
    """
    texts = [" ".join(record.captions) for record in records]
    scores = {"tfidf": _tfidf, "bm25": _bm25}.get(name)
    if scores is None:
        raise QueryError(f"there is no baseline {name!r}: choose of bm25, tfidf.")
    return evaluation_by_score(scores(texts, [query.text for query in queries]), records, queries)


def evaluation_by_score(
    scores: NDArray[np.floating], records: Sequence[Record], queries: Sequence[Query], *, depth: int = DEPTH
) -> Evaluation:
    """Every query's images ranked by (queries, images) scores; of images of equal score, the right ones come last."""
    ids = [record.image_id for record in records]
    ranked = []
    for row, query in zip(scores, queries, strict=True):
        right = np.array([image_id in query.image_ids for image_id in ids])
        ranked.append(tuple(ids[i] for i in np.lexsort((right, -row))[:depth]))
    return Evaluation(tuple(queries), tuple(ranked))


def _tfidf(texts: Sequence[str], queries: Sequence[str]) -> NDArray[np.float64]:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise MissingExtra("the tfidf baseline needs scikit-learn: pip install 'llama-index-genret[train]'.") from error
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    return np.asarray((vectorizer.fit_transform(texts) @ vectorizer.transform(queries).T).T.toarray(), np.float64)


def _bm25(texts: Sequence[str], queries: Sequence[str]) -> NDArray[np.float64]:
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtra("the bm25 baseline needs bm25s: pip install 'llama-index-genret[eval]'.") from error
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize(list(texts), show_progress=False), show_progress=False)
    words = bm25s.tokenize(list(queries), return_ids=False, show_progress=False)
    return np.stack([retriever.get_scores(query) if query else np.zeros(len(texts)) for query in words])
