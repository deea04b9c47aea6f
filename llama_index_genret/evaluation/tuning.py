"""`genret tune`: the prior of every image, and how much of it, and of a re-ranking, serves queries that were held out.

Knows scorers and the index; nothing of LlamaIndex.

Source: log p(id | query) - eta * log p(id) and log p(query | image) of TIGeR (arXiv:2406.05814), both with the trained
model's own prompts.
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

ETAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5)
RERANK_WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
BATCH = 32
PREFIX_BATCH = 256
"""Prefixes that are scored together for the prior: their number squared is the size of an attention mask."""

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Trial:
    """The figures of one way to rank: n, recall@1/5/10, mrr, ndcg@10."""

    scoring: Scoring
    figures: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The figures and the numbers that gave them."""
        return {**asdict(self.scoring), **self.figures}


def image_prior(index: Index, scorer: Scorer, *, progress: Progress = iter) -> NDArray[np.float32]:
    """(records,) log p(image | no query) of every record: natural log, over the valid children at each step.

    A search as wide as the corpus, for the prompt without a query. NaN, as if it was not known, where the model gives
    an image no chance at all.
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
    """Scores in a session of their own: one for all would hold the prefixes of the whole trie."""
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
    """Compute the prior, try every `eta` (and every weight of a re-ranking) on the queries, and store the best.

    The best has the highest MRR; of equal ones, that with the least `eta`, then the least weight. Without queries the
    prior alone is stored anew, for images that were added, say: what was tuned before stays.

    Args:
        queries: held out: none of those that the model was trained on, nor those that it is judged by.
        rerank: how many of the best of each query are ranked anew; 0 for none.
    Returns:
        The index as stored, and all trials in the order of `etas`.
    Raises:
        StoreError: the index was changed meanwhile.
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
    """The figures of every combination. How probable an image makes a query is asked once for all of them."""
    prompts = [_prompt(index, query.text) for query in queries]
    likelihoods = _Likelihoods(index, scorer, prompts, rerank_by)
    usable = [0.0] if index.prior is None else etas
    found: dict[float, list[tuple[Hit, ...]]] = {}
    for eta, start in progress(list(product(usable, range(0, len(prompts), BATCH)))):
        part = prompts[start : start + BATCH]
        asked = [prompt for prompt in part if prompt is not None]
        options = with_scoring(SearchOptions(k=max(DEPTH, rerank)), index, Scoring(eta=eta))
        rankings = iter(recall(scorer, index.trie, asked, options) if asked else [])
        hits = [() if prompt is None else next(rankings).hits for prompt in part]
        found[eta] = found.get(eta, []) + hits
        if rerank:
            likelihoods.ask(start, hits)
    trials = []
    for eta, weight in product(usable, rerank_weights if rerank else (0.0,)):
        scoring = Scoring(eta=eta, rerank=rerank, rerank_weight=weight, rerank_by=rerank_by)
        ranked = found[eta]
        if weight:
            ranked = [rescore(hits, likelihoods.of(row, hits), weight) for row, hits in enumerate(ranked)]
        figures = evaluation_of(index, queries, [hits[:DEPTH] for hits in ranked]).figures()
        trials.append(Trial(scoring, figures))
    return trials


def _prompt(index: Index, text: str) -> Prompt | None:
    """None of a query that is refused: a miss."""
    try:
        return index.prompts.for_query(index.tokenizer, text)
    except QueryError:
        return None


class _Likelihoods:
    """log p(query | image) of the pairs met so far."""

    def __init__(self, index: Index, scorer: Scorer, prompts: Sequence[Prompt | None], by: RerankBy) -> None:
        self._index, self._scorer, self._prompts, self._by = index, scorer, prompts, by
        self._known: dict[tuple[int, int], float] = {}

    def ask(self, start: int, found: Sequence[Sequence[Hit]]) -> None:
        """Score the pairs that are not known yet: the hits of queries `start`, `start` + 1, ..."""
        pairs, asked = [], []
        for row, hits in enumerate(found, start):
            for hit in hits:
                prompt = self._prompts[row]
                if prompt is not None and (row, hit.key) not in self._known:
                    pairs.append((row, hit.key))
                    asked.append(Continuation(describing_prompt(self._index, hit.key, self._by), prompt.words))
        if asked:
            with self._scorer.session([], Normalise.CHILDREN) as session:
                self._known.update(zip(pairs, session.log_likelihoods(asked).tolist(), strict=True))

    def of(self, row: int, hits: Sequence[Hit]) -> NDArray[np.float64]:
        """(n,) of one query's hits."""
        return np.array([self._known[row, hit.key] for hit in hits])
