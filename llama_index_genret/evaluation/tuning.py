"""Compute the prior of every image, and choose eta and the re-ranking weight on held-out queries (`genret tune`).

Depends on scorers and the index; independent of LlamaIndex.

Source: log p(id | query) - eta * log p(id) and log p(query | image) of TIGeR (arXiv:2406.05814), both with the prompts
of the trained model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import QueryError
from llama_index_genret.evaluation.evaluate import DEPTH, evaluation_of
from llama_index_genret.evaluation.queries import EvaluationQuery
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import Scorer, recall
from llama_index_genret.scorers.rerank import Continuation, describing_prompt, rescore, with_scoring
from llama_index_genret.search import Hit, Normalise, Row, Rows, SearchOptions, search
from llama_index_genret.store import Index, Scoring, TunedScoring, store_tuning
from llama_index_genret.store.scoring import RerankBy

MODEL_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TEMPERATURES = (0.02, 0.035, 0.05, 0.07, 0.1)
ETAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5)
RERANK_WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
BATCH = 32
PREFIX_BATCH = 256
"""Prefixes per batch for the prior. The attention mask has the square of this size."""

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Trial:
    """One scoring with its figures: n, recall@1/5/10, mrr, ndcg@10."""

    scoring: Scoring
    figures: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the scoring and the figures as one flat JSON object."""
        return {**asdict(self.scoring), **self.figures}


def image_prior(index: Index, scorer: Scorer, *, progress: Progress = iter) -> NDArray[np.float32]:
    """Return log p(image | no query) of every record, (records,): natural log, over the valid children at each step.

    The search is as wide as the corpus and uses the prompt without a query. An image to which the model gives
    probability 0 gets NaN, like an image without a prior.
    """
    log_prior = np.full(len(index.records), np.nan, np.float32)
    n, prompt = index.trie.n_live, index.prompts.for_no_query(index.tokenizer)
    if not n:
        return log_prior
    steps = search(index.trie, SearchOptions(k=n, width=n), n_queries=1)
    answer: Any = None
    while True:
        try:
            rows = steps.send(answer)
        except StopIteration as stop:
            hits = stop.value[0].hits
            break
        answer = np.concatenate([_score(scorer, prompt, part) for part in progress(_parts(rows))])
    values = np.array([hit.log_prob for hit in hits])
    log_prior[[hit.key for hit in hits]] = np.where(np.isfinite(values), values, np.nan)
    return log_prior


def _parts(rows: Rows) -> list[list[Row]]:
    return [rows[start : start + PREFIX_BATCH] for start in range(0, len(rows), PREFIX_BATCH)]


def _score(scorer: Scorer, prompt: Prompt, rows: Sequence[Row]) -> NDArray[np.floating]:
    """Return the scores of the rows, in a new session: a shared one would hold the prefixes of the whole trie."""
    with scorer.session([prompt], Normalise.CHILDREN) as session:
        return session.score(Rows.of(rows))


def tune(
    index: Index,
    scorer: Scorer,
    queries: Sequence[EvaluationQuery] = (),
    *,
    etas: Sequence[float] = ETAS,
    rerank: int = 0,
    rerank_by: RerankBy = "identifier",
    rerank_weights: Sequence[float] = RERANK_WEIGHTS,
    progress: Progress = iter,
) -> tuple[Index, list[Trial]]:
    """Compute the prior, evaluate every `eta` and every re-ranking weight on the queries, and store the best.

    The best scoring has the highest MRR. Ties go to the lowest `eta`, then to the lowest weight. Without queries, only
    the prior is stored again, for example after adding images. The tuned scoring then stays as it is.

    Args:
        queries: validation queries, neither trained on nor used for the test figures. Default none.
        etas: values of eta to evaluate, default `ETAS`.
        rerank: number of best hits per query to re-rank, default 0 for none.
        rerank_by: the text or image that the re-ranking reads, default "identifier".
        rerank_weights: weights of the re-ranking to evaluate, default `RERANK_WEIGHTS`.

    Returns:
        The index as stored, and all trials in the order of `etas`.

    Raises:
        StoreError: the index was changed during the tuning.
    """
    log_prior = image_prior(index, scorer, progress=progress)
    index = store_tuning(index, log_prior, index.manifest.tuned or TunedScoring(scoring=Scoring(), queries=0))
    if not queries:
        return index, []
    trials = trials_of(index, scorer, queries, etas, rerank, rerank_by, rerank_weights, progress)
    best = max(trials, key=lambda trial: (trial.figures["mrr"], -trial.scoring.eta, -trial.scoring.rerank_weight))
    scoring = best.scoring if best.scoring.rerank_weight else replace(best.scoring, rerank=0)
    return store_tuning(index, log_prior, TunedScoring(scoring=scoring, queries=len(queries))), trials


def trials_of(
    index: Index,
    scorer: Scorer,
    queries: Sequence[EvaluationQuery],
    etas: Sequence[float],
    rerank: int,
    rerank_by: RerankBy,
    rerank_weights: Sequence[float],
    progress: Progress,
) -> list[Trial]:
    """Evaluate every combination. log p(query | image) is computed once per pair and shared by all combinations."""
    prompts = [_prompt(index, query.text) for query in queries]
    likelihoods = _Likelihoods(index, scorer, prompts, rerank_by)
    usable = [0.0] if index.prior is None else etas
    found: dict[float, list[tuple[Hit, ...]]] = {}
    for eta, start in progress(list(product(usable, range(0, len(prompts), BATCH)))):
        part = prompts[start : start + BATCH]
        valid = [prompt for prompt in part if prompt is not None]
        options = with_scoring(SearchOptions(k=max(DEPTH, rerank)), index, Scoring(eta=eta))
        rankings = iter(recall(scorer, index.trie, valid, options) if valid else [])
        hits = [() if prompt is None else next(rankings).hits for prompt in part]
        found[eta] = found.get(eta, []) + hits
        if rerank:
            likelihoods.add(start, hits)
    trials = []
    for eta, weight in product(usable, rerank_weights if rerank else (0.0,)):
        scoring = Scoring(eta=eta, rerank=rerank, rerank_weight=weight, rerank_by=rerank_by)
        ranked = found[eta]
        if weight:
            ranked = [rescore(hits, likelihoods.values(row, hits), weight) for row, hits in enumerate(ranked)]
        figures = evaluation_of(index, queries, [hits[:DEPTH] for hits in ranked]).figures()
        trials.append(Trial(scoring, figures))
    return trials


def _prompt(index: Index, text: str) -> Prompt | None:
    """Return the prompt, or None if the query is refused. A refused query counts as a miss."""
    try:
        return index.prompts.for_query(index.tokenizer, text)
    except QueryError:
        return None


class _Likelihoods:
    """A cache of log p(query | image), natural log, keyed by query and image."""

    def __init__(self, index: Index, scorer: Scorer, prompts: Sequence[Prompt | None], by: RerankBy) -> None:
        self._index, self._scorer, self._prompts, self._by = index, scorer, prompts, by
        self._known: dict[tuple[int, int], float] = {}

    def add(self, start: int, found: Sequence[Sequence[Hit]]) -> None:
        """Score the pairs that are not cached yet. `found` holds the hits of queries `start`, `start` + 1, ..."""
        pairs, continuations = [], []
        for row, hits in enumerate(found, start):
            for hit in hits:
                prompt = self._prompts[row]
                if prompt is not None and (row, hit.key) not in self._known:
                    pairs.append((row, hit.key))
                    continuations.append(Continuation(describing_prompt(self._index, hit.key, self._by), prompt.words))
        if continuations:
            with self._scorer.session([], Normalise.CHILDREN) as session:
                self._known.update(zip(pairs, session.log_likelihoods(continuations).tolist(), strict=True))

    def values(self, row: int, hits: Sequence[Hit]) -> NDArray[np.float64]:
        """Return the cached values of the hits of query `row`, (n,)."""
        return np.array([self._known[row, hit.key] for hit in hits])
