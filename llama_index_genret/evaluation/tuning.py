"""Compute the prior of every image, and choose how hits are scored on held-out queries (`genret tune`).

Two choices, one after the other: the share of the model in the blend with the encoder's temperature, then eta with
the weight of a re-ranking. Both take the best MRR. Depends on scorers and the index; independent of LlamaIndex.

Source: log p(id | query) - eta * log p(id) and log p(query | image) of TIGeR (arXiv:2406.05814), both with the prompts
of the trained model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import NotTrained
from llama_index_genret.evaluation.evaluate import DEPTH
from llama_index_genret.evaluation.parts import ENCODER, MODEL, encoder_alone, model_alone
from llama_index_genret.evaluation.trials import Progress, Trial, Trials
from llama_index_genret.models.encoder import Encoder
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import Scorer
from llama_index_genret.scorers.rerank import rescore
from llama_index_genret.search import Normalise, Row, Rows, SearchOptions, search
from llama_index_genret.store import Index, Scoring, TunedScoring, store_tuning
from llama_index_genret.store.model_state import unseen_rows
from llama_index_genret.store.queries import EvaluationQuery
from llama_index_genret.store.scoring import DEFAULT_MODEL_WEIGHT, DEFAULT_TEMPERATURE, RerankBy

MODEL_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TEMPERATURES = (0.02, 0.035, 0.05, 0.07, 0.1)
ETAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5)
RERANK_WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
PREFIX_BATCH = 256
"""Prefixes per batch for the prior. The attention mask has the square of this size."""


@dataclass(frozen=True)
class Tuning:
    """The result of `tune`.

    index: the index as stored.
    trials: every scoring that was evaluated, those of the blend first. Empty without queries.
    compared: figures of the same queries under "before", the scoring of the index until now; "after", the chosen one;
        "model", the generative model alone; "encoder", the encoder alone. A part that the index lacks is left out.
    """

    index: Index
    trials: list[Trial]
    compared: dict[str, Trial]


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
    model: Scorer | None,
    queries: Sequence[EvaluationQuery] = (),
    *,
    encoder: Encoder | None = None,
    model_weights: Sequence[float] = MODEL_WEIGHTS,
    temperatures: Sequence[float] = TEMPERATURES,
    etas: Sequence[float] = ETAS,
    rerank: int = 0,
    rerank_by: RerankBy = "identifier",
    rerank_weights: Sequence[float] = RERANK_WEIGHTS,
    progress: Progress = iter,
) -> Tuning:
    """Compute the prior, evaluate scorings on the queries, and store the best.

    First, every model weight is tried with every temperature. Then every eta and every re-ranking weight is tried with
    the best of them. The best has the highest MRR. Ties go to the weight and temperature nearest to the defaults, and
    to the lowest eta and re-ranking weight.

    Without queries, only the prior is stored again, for example after adding images, and the scoring stays as it is.
    An index that was not trained has nothing to choose: one temperature ranks images like another. Nothing is stored.

    Args:
        model: scores with the trained weights of the index, None for an index that was not trained.
        queries: validation queries, neither trained on nor used for the test figures. Default none.
        encoder: that of the index, None to tune the model alone. The weight and temperature then stay as they are.
        model_weights: shares of the model to evaluate, default `MODEL_WEIGHTS`.
        temperatures: temperatures of the encoder to evaluate, default `TEMPERATURES`.
        etas: values of eta to evaluate, default `ETAS`.
        rerank: number of best hits per query to re-rank, default 0 for none.
        rerank_by: the text or image that the re-ranking reads, default "identifier".
        rerank_weights: weights of the re-ranking to evaluate, default `RERANK_WEIGHTS`.

    Raises:
        StoreError: the index was changed during the tuning.
        NotTrained: there is neither a model nor an encoder.
    """
    before, trials = index.scoring(), Trials(index, model, encoder, queries)
    if model is None:
        if encoder is None:
            raise NotTrained(f"{index.folder} has neither trained weights nor an encoder: run `genret train` first.")
        return Tuning(index, [], _alone(trials, before, progress) if queries else {})
    compared = {"before": _trial(trials, before, progress)} if queries else {}
    log_prior = image_prior(index, model, progress=progress)
    if encoder is not None:
        log_prior[unseen_rows(index) or []] = np.nan  # the encoder ranks them, so the prior of the model is not theirs
    index = store_tuning(index, log_prior, index.manifest.tuned or TunedScoring(scoring=Scoring(), queries=0))
    if not queries:
        return Tuning(index, [], {})
    trials = Trials(index, model, encoder, queries)
    blends = _blends(trials, model_weights, temperatures, progress) if encoder else []
    best = max(blends, key=lambda trial: (trial.figures["mrr"], -_distance(trial.scoring)), default=None)
    base = best.scoring if best else replace(before, eta=0.0)
    ranked = []
    if base.model_weight > 0.0 or encoder is None:
        wanted = replace(base, rerank=rerank, rerank_by=rerank_by)
        ranked = _ranked(trials, wanted, etas if index.prior else [0.0], rerank_weights if rerank else [0.0], progress)
        best = max(ranked, key=lambda one: (one.figures["mrr"], -one.scoring.eta, -one.scoring.rerank_weight))
    assert best is not None
    scoring = best.scoring if best.scoring.rerank_weight else replace(best.scoring, rerank=0)
    index = store_tuning(index, log_prior, TunedScoring(scoring=scoring, queries=len(queries)))
    compared |= {"after": Trial(scoring, best.figures), **_alone(trials, scoring, progress)}
    return Tuning(index, [*blends, *ranked], compared)


def _blends(
    trials: Trials, model_weights: Sequence[float], temperatures: Sequence[float], progress: Progress
) -> list[Trial]:
    """Evaluate every model weight with every temperature, without a prior."""
    pairs = product(model_weights, temperatures)
    scorings = [Scoring(model_weight=weight, temperature=temperature) for weight, temperature in pairs]
    return [trials.trial(scoring, hits) for scoring, hits in trials.hits(scorings, progress=progress).items()]


def _ranked(
    trials: Trials, base: Scoring, etas: Sequence[float], rerank_weights: Sequence[float], progress: Progress
) -> list[Trial]:
    """Evaluate every eta with every re-ranking weight."""
    first = {eta: replace(base, eta=eta, rerank=0) for eta in etas}
    found = trials.hits(list(first.values()), k=max(DEPTH, base.rerank), progress=progress)
    values = trials.likelihoods(found.values(), base.rerank_by) if base.rerank else None
    evaluated = []
    for eta, weight in product(etas, rerank_weights):
        hits = found[first[eta]]
        if values and weight:
            hits = [rescore(own, values(row, own), weight) for row, own in enumerate(hits)]
        evaluated.append(trials.trial(replace(base, eta=eta, rerank_weight=weight), hits))
    return evaluated


def _alone(trials: Trials, scoring: Scoring, progress: Progress) -> dict[str, Trial]:
    """Evaluate each part of the index alone."""
    found = {}
    if trials.model is not None:
        found[MODEL] = _trial(trials, model_alone(scoring), progress)
    if trials.has_encoder:
        found[ENCODER] = _trial(trials, encoder_alone(scoring), progress)
    return found


def _trial(trials: Trials, scoring: Scoring, progress: Progress) -> Trial:
    return trials.trial(scoring, trials.hits([scoring], progress=progress)[scoring])


def _distance(scoring: Scoring) -> float:
    """Return how far a weight and a temperature are from the defaults, 0 for these."""
    apart = abs(scoring.model_weight - DEFAULT_MODEL_WEIGHT)
    return apart + abs(math.log(scoring.temperature / DEFAULT_TEMPERATURE))
