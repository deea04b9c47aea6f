"""The scorers that recall from an index: the blend of model and encoder, and each of the two alone.

A table that shows the blend shows both parts, so that no figure of the blend passes for one of the model.
Depends on scorers and the index; independent of queries and of how models are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llama_index_genret.errors import SearchError
from llama_index_genret.models.encoder import Encoder
from llama_index_genret.scorers.base import Scorer
from llama_index_genret.scorers.blend import Blender
from llama_index_genret.store import Index, Scoring, ScoringChoice

BLEND, MODEL, ENCODER = "blend", "model", "encoder"


@dataclass(frozen=True)
class Part:
    """A scorer of an index and the scoring of its hits.

    name: "blend" for model and encoder with the scoring of the index; "model" for the generative model alone, also for
        images that it was not trained on; "encoder" for the encoder alone.
    """

    name: str
    scorer: Scorer
    scoring: Scoring

    @property
    def choice(self) -> ScoringChoice:
        """Return the scoring as a choice of every field, for `evaluate`."""
        return ScoringChoice(**vars(self.scoring))


def parts_of(index: Index, model: Scorer | None, encoder: Encoder | None, choice: ScoringChoice) -> list[Part]:
    """Return what a query gets, and after it, if that is the blend, the model alone and the encoder alone.

    Args:
        model: scores with the trained weights; None for an index that was not trained.
        encoder: that of the index; None for an index without one.
        choice: the user's, over the scoring of the index.
    Raises:
        NotTrained: there is neither a model nor an encoder.
        SearchError: a re-ranking is chosen, and there is no model for it.
    """
    scoring = index.scoring(choice)
    if scoring.rerank and (model is None or (encoder is not None and scoring.model_weight == 0.0)):
        raise SearchError(
            f"re-ranking needs the trained model, and {index.folder} recalls by its encoder alone. Pass --rerank 0, or "
            "train the index: `genret train`."
        )
    blender = Blender(index, encoder)
    if encoder is None:
        return [Part(MODEL, blender.scorer(model, scoring), scoring)]
    by_encoder = encoder_alone(scoring)
    alone = Part(ENCODER, blender.scorer(None, by_encoder), by_encoder)
    if model is None:
        return [alone]
    return [Part(BLEND, blender.scorer(model, scoring), scoring), Part(MODEL, model, model_alone(scoring)), alone]


def model_alone(scoring: Scoring) -> Scoring:
    """Return a scoring with the weight of the model at 1."""
    return replace(scoring, model_weight=1.0)


def encoder_alone(scoring: Scoring) -> Scoring:
    """Return a scoring of the encoder alone. The prior and the re-ranking are the model's, so it has neither."""
    return replace(scoring, model_weight=0.0, eta=0.0, rerank=0)
