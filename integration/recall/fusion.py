"""The hybrid: one ranking from generative recall and a dense index over the captions.

Depends on ranked ids and scores; independent of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.corpus import Record
from llama_index_genret.evaluation.baselines import evaluation_by_score
from llama_index_genret.evaluation.evaluate import Evaluation
from llama_index_genret.store.queries import EvaluationQuery

Scores = NDArray[np.floating]
RRF_CONSTANT = 60
WEIGHTS = tuple(round(0.1 * step, 1) for step in range(11))
TEMPERATURES = (0.02, 0.05, 0.1)


@dataclass(frozen=True)
class Fusion:
    """A way to combine two rankings.

    weight: of the generative ranking, or None to combine ranks only. temperature: of the dense ranking's softmax.
    """

    weight: float | None = None
    temperature: float = 0.05

    def __str__(self) -> str:
        return "RRF" if self.weight is None else f"{self.weight:g} generative, T={self.temperature:g}"

    def scores(self, generative: Scores, dense: Scores) -> Scores:
        """Combine two (queries, images) arrays into one.

        By ranks: reciprocal rank fusion (Cormack, Clarke and Büttcher 2009). By scores: the weighted sum of two
        log-probabilities, where the dense one is a softmax over all images of the cosine / temperature.

        Args:
            generative: log-probabilities, -inf where an image was not recalled.
            dense: cosines.
        """
        if self.weight is None:
            return _reciprocal(generative) + _reciprocal(dense)
        if self.weight == 0:
            return dense
        # An image that was not recalled is less probable than every recalled one.
        recalled = np.isfinite(generative)
        least = np.where(recalled, generative, np.inf).min(axis=1, keepdims=True, initial=0.0)
        logits = dense / self.temperature
        top = logits.max(axis=1, keepdims=True)
        log_prob = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        return self.weight * np.where(recalled, generative, least - 1.0) + (1 - self.weight) * log_prob


def _reciprocal(scores: Scores) -> Scores:
    """Return 1 / (60 + rank), with ranks from 1. Images of equal score share the last of their ranks. 0 where -inf."""
    ordered = np.sort(scores, axis=1)
    ranks = np.stack(
        [len(row) - np.searchsorted(line, row, side="left") for line, row in zip(ordered, scores, strict=True)]
    )
    return np.where(np.isfinite(scores), 1.0 / (RRF_CONSTANT + ranks), 0.0)


def choose_fusion(
    generative: Scores, dense: Scores, records: Sequence[Record], queries: Sequence[EvaluationQuery]
) -> tuple[Fusion, Evaluation]:
    """Return the fusion with the highest mean of recall@1/5/10 on these queries, and that mean.

    Of equal fusions the first wins: by ranks, then small weights. Give validation queries, never those of the table.
    """
    candidates = [Fusion(), *(Fusion(weight, heat) for heat in TEMPERATURES for weight in WEIGHTS)]
    evaluated = [evaluation_by_score(fusion.scores(generative, dense), records, queries) for fusion in candidates]
    best = int(np.argmax([_quality(evaluation) for evaluation in evaluated]))
    return candidates[best], evaluated[best]


def _quality(evaluation: Evaluation) -> float:
    values = evaluation.of_each_query()
    return float(np.mean([values[f"recall@{k}"] for k in (1, 5, 10)]))
