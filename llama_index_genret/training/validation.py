"""The validation of a run: captions that it holds out, and recall on them while it trains.

Depends on the index and scorers; independent of optimisers, losses and files.

Held-out captions are in no example of the run: neither as queries, nor as descriptions, nor among the texts on which
the encoder is imitated. The vectors of their images are computed again without them, for the imitation and for the
encoder's own recall. The index keeps its vectors of all captions. Identifiers may derive from those.
"""

from __future__ import annotations

from llama_index_genret.models.mllm import Mllm  # isort: skip  # first: it names the extra that brings torch

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from numpy.typing import NDArray

from llama_index_genret.errors import QueryError
from llama_index_genret.models.encoder import Encoder, Float32
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import Scorer, recall
from llama_index_genret.scorers.encoder import EncoderScorer
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.store import Index, text_key
from llama_index_genret.store.queries import EvaluationQuery
from llama_index_genret.store.scoring import DEFAULT_TEMPERATURE
from llama_index_genret.store.vectors import embed_records
from llama_index_genret.training.pace import EVALUATIONS, RECALL

MOST_QUERIES = 200
"""Maximum number of captions that are held out, and of given queries that are used."""
HELD_OUT_SHARE = 0.1
"""Maximum share of the captions that are held out."""
FEWEST_HELD_OUT = 20
"""Fewer captions are not held out: recall on them is too uncertain to choose a checkpoint by."""

COST_SHARE = 0.05
"""Maximum share of the time that the evaluations take, by an estimate."""
BACKWARD = 2
"""Cost of a backward pass, in forward passes."""

DEPTHS = (1, 5)
BATCH = 32
"""Queries in one search."""


def hold_out(index: Index, rows: Iterable[int], *, seed: int) -> list[EvaluationQuery]:
    """Choose captions to hold out, in random order. Equal seeds give equal captions.

    At most one caption of an image is chosen, and only if the image keeps another one and no other text of the index
    equals it but for case, spaces and punctuation.

    Args:
        rows: rows of the images whose captions may be chosen.
    Returns:
        At most MOST_QUERIES captions and HELD_OUT_SHARE of those of `rows`, none if that is below FEWEST_HELD_OUT.
    """
    rows, draw = list(rows), np.random.default_rng(seed)
    texts = Counter(text_key(text) for record in index.records for text in record.captions)
    texts.update(text_key(q.text) for record in index.records for q in index.pseudo_queries_of(record))
    texts.update(text_key(q.answer) for record in index.records for q in record.questions)
    chosen = []
    for row in draw.permutation(rows):
        record = index.records[row]
        own = [caption for caption in record.captions if texts[text_key(caption)] == 1]
        if own and len(record.captions) > 1:
            chosen.append(EvaluationQuery(own[draw.integers(len(own))], frozenset([record.image_id])))
    n_captions = sum(len(index.records[row].captions) for row in rows)
    most = min(MOST_QUERIES, int(HELD_OUT_SHARE * n_captions))
    return chosen[:most] if min(most, len(chosen)) >= FEWEST_HELD_OUT else []


@dataclass(frozen=True)
class Validation:
    """The queries of a run's validation, and what the run may learn beside them.

    index: the index as stored.
    learned: the same without the captions that are held out.
    queries: in random order, empty for no validation.
    """

    index: Index
    learned: Index
    queries: tuple[EvaluationQuery, ...]

    @classmethod
    def choose(
        cls, index: Index, given: Sequence[EvaluationQuery] | None, new: Sequence[int] | None, *, seed: int
    ) -> Validation:
        """Validate on the given queries, or hold captions out. A run with sharded weights (FSDP) is not validated.

        Args:
            given: None to hold captions out, empty for no validation.
            new: rows of the images that an update learns, None for a training.
        """
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            return cls(index, index, ())
        if given is None:
            held_out = hold_out(index, range(len(index.records)) if new is None else new, seed=seed)
            return cls(index, without_captions(index, held_out), tuple(held_out))
        order = np.random.default_rng(seed).permutation(len(given))
        return cls(index, index, tuple(given[place] for place in order))

    def __str__(self) -> str:
        if not self.queries:
            return (
                "not validated, and its last weights are stored: no queries are given, and too few images have another "
                "caption, or the weights are sharded (FSDP)"
            )
        kind = "given queries" if self.learned is self.index else "captions, which it does not learn"
        return f"validated on {len(self.queries)} {kind}"

    @property
    def keys(self) -> frozenset[str]:
        """Return the `text_key` of each query with a text."""
        return frozenset(text_key(query.text) for query in self.queries if query.text)

    def vectors(self, encoder: Encoder) -> Float32 | None:
        """Return (n, d) the index's vectors, those of images with a held-out caption computed from their others."""
        if self.index.vectors is None:
            return None
        vectors, learned = np.asarray(self.index.vectors, np.float32), self.learned.records
        rows = [row for row, record in enumerate(self.index.records) if record.captions != learned[row].captions]
        if rows:
            vectors[rows] = embed_records(encoder, [learned[row] for row in rows])
        return vectors

    def affordable(self, n_examples: int, n_layers: int, n_frozen: int) -> Validation:
        """Return a validation on as many queries as take about COST_SHARE of a run's time, and at least a few.

        A query passes through the trained layers alone if identifiers have one symbol, because the activations of the
        frozen layers are cached. Longer identifiers need all layers, and about as many tokens again.

        Args:
            n_examples: examples of the run.
            n_layers: layers of the language model, of which n_frozen are not trained.
        """
        trained = n_layers - n_frozen
        cost = trained if self.index.trie.depth == 1 else 2 * n_layers
        affordable = COST_SHARE * n_examples * (1 + BACKWARD) * trained / cost / EVALUATIONS
        most = max(FEWEST_HELD_OUT, min(MOST_QUERIES, int(affordable)))
        return replace(self, queries=self.queries[:most])

    def encoder_recall(self, encoder: Encoder | None, vectors: Float32 | None) -> dict[str, float]:
        """Return `encoder_recall@1` and `encoder_recall@5`, nothing without an encoder.

        Args:
            vectors: the result of `vectors`.
        """
        if encoder is None or vectors is None or not self.queries:
            return {}
        scorer = EncoderScorer(encoder, self.index.trie, vectors, temperature=DEFAULT_TEMPERATURE)
        found = recalled(self.index, scorer, self.queries).mean(0)
        return {f"encoder_recall@{k}": float(share) for k, share in zip(DEPTHS, found, strict=True)}

    def model_recall(self, mllm: Mllm, encoder_recall: dict[str, float], *, autocast: bool) -> dict[str, float]:
        """Return recall@1 and recall@5 of the model alone, their mean as RECALL, and the encoder's.

        Several processes share the queries, and return the same figures.
        """
        processes, model = PartialState(), mllm.model
        own = self.queries[processes.process_index :: processes.num_processes]
        was_training = model.training
        model.eval()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            found = recalled(self.index, TransformersScorer(mllm), own).sum(0)
        model.train(was_training)
        counts = torch.from_numpy(found).to(processes.device, torch.float32)
        shares = (reduce(counts, reduction="sum") / len(self.queries)).tolist()
        figures = {f"recall@{k}": share for k, share in zip(DEPTHS, shares, strict=True)}
        return {RECALL: sum(shares) / len(shares)} | figures | encoder_recall


def without_captions(index: Index, held_out: Sequence[EvaluationQuery]) -> Index:
    """Return the index with records that lack the held-out captions. Its `vectors` are the stored ones."""
    held = {(image_id, query.text) for query in held_out for image_id in query.image_ids}
    records = [
        replace(record, captions=tuple(c for c in record.captions if (record.image_id, c) not in held))
        for record in index.records
    ]
    return replace(index, records=tuple(records))


def recalled(index: Index, scorer: Scorer, queries: Sequence[EvaluationQuery]) -> NDArray[np.float64]:
    """Return (queries, len(DEPTHS)): 1 if a right image is among the first 1, 5. A refused query is a miss."""
    found = np.zeros((len(queries), len(DEPTHS)))
    for has_image in (False, True):  # they cannot share a batch
        rows = [row for row, query in enumerate(queries) if (query.image is not None) is has_image]
        for start in range(0, len(rows), BATCH):
            batch = [(row, prompt) for row in rows[start : start + BATCH] if (prompt := _prompt(index, queries[row]))]
            if not batch:
                continue
            try:
                rankings = recall(scorer, index.trie, [prompt for _, prompt in batch], SearchOptions(k=DEPTHS[-1]))
            except QueryError:  # an image query, and the encoder embeds texts only
                continue
            for (row, _), ranking in zip(batch, rankings, strict=True):
                ids = [index.record_of(hit).image_id for hit in ranking.hits]
                found[row] = [any(one in queries[row].image_ids for one in ids[:k]) for k in DEPTHS]
    return found


def _prompt(index: Index, query: EvaluationQuery) -> Prompt | None:
    try:
        return query.prompt(index)
    except QueryError:
        return None
