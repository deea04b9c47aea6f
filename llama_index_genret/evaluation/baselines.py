"""Text baselines over the captions: TF-IDF of character n-grams and BM25.

Depends on records and queries; independent of models and LlamaIndex.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.corpus import Record
from llama_index_genret.errors import MissingExtra, QueryError
from llama_index_genret.evaluation.evaluate import DEPTH, Evaluation
from llama_index_genret.store.queries import EvaluationQuery


def baseline(name: str, records: Sequence[Record], queries: Sequence[EvaluationQuery]) -> Evaluation:
    """Evaluate a text index over the captions with the same queries: `tfidf` (character 2- to 4-grams) or `bm25`.

    A tie counts against the baseline: the right image comes after all images of equal score.

    Raises:
        QueryError: the baseline is unknown. MissingExtra: the library of the baseline is not installed.
    """
    texts = [" ".join(record.captions) for record in records]
    scores = {"tfidf": _tfidf, "bm25": _bm25}.get(name)
    if scores is None:
        raise QueryError(f"unknown baseline {name!r}; choose from: bm25, tfidf.")
    return evaluation_by_score(scores(texts, [query.text for query in queries]), records, queries)


def evaluation_by_score(
    scores: NDArray[np.floating], records: Sequence[Record], queries: Sequence[EvaluationQuery], *, depth: int = DEPTH
) -> Evaluation:
    """Rank the images of each query by (queries, images) scores. Among equal scores, the right images come last."""
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
