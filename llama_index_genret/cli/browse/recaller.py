"""What a person tries by hand: recall for a text or a picture, told symbol by symbol, and answers with their images.

Knows the index, a scorer and LlamaIndex's query engine; nothing of HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llama_index.core.llms import LLM
from llama_index.core.vector_stores.types import MetadataFilters

from llama_index_genret.cli.browse.trace import Level, identifier_levels, probabilities
from llama_index_genret.llamaindex.query_engine import image_query_engine
from llama_index_genret.llamaindex.retriever import GenerativeImageRetriever
from llama_index_genret.scorers.base import Scorer, recall
from llama_index_genret.scorers.recording import RecordingScorer
from llama_index_genret.scorers.rerank import reranking, with_scoring
from llama_index_genret.search import Hit, SearchOptions
from llama_index_genret.serving.endpoint.client import RecallClient, RecallQuery
from llama_index_genret.store import Index, RecordFilters, Scoring
from llama_index_genret.store.filters import Value

Chosen = Mapping[str, list[Value]]
"""Metadata keys, and the values of which an image must have one."""


@dataclass(frozen=True)
class BrowseHit:
    """One image. levels: how its identifier was spelled; none where a server recalled it in one request."""

    image_id: str
    file_name: str
    caption: str
    score: float
    log_prob: float
    identifier: str
    levels: tuple[Level, ...] = ()


@dataclass(frozen=True)
class BrowseRanking:
    """Images, best first, and how they were found; see `search.Ranking`."""

    hits: tuple[BrowseHit, ...]
    exact: bool
    nodes_expanded: int
    seconds: float
    scoring: Scoring


@dataclass(frozen=True)
class BrowseAnswer:
    """An answer, and the images that the model looked at for it, best first."""

    answer: str
    sources: tuple[BrowseHit, ...]
    seconds: float


class Recaller:
    """Recalls and answers with one model, one request at a time.

    Args:
        endpoint: of a server, for pictures, which it recalls in one request only.
    """

    def __init__(self, index: Index, scorer: Scorer, llm: LLM, *, endpoint: RecallClient | None = None) -> None:
        self.index = index
        self._scorer, self._llm, self._endpoint = scorer, llm, endpoint
        self._lock = threading.Lock()

    def recall(self, text: str, image: bytes | None, *, k: int, filters: Chosen) -> BrowseRanking:
        """The best `k` for a text, for a picture, or for both, by a beam.

        Raises:
            QueryError, FilterError, ImageError, ServerError: as their names say.
        """
        index, began = self.index, time.monotonic()
        prompts, tokenizer = index.prompts, index.tokenizer
        prompt = prompts.for_query(tokenizer, text) if image is None else prompts.for_image(tokenizer, image, text)
        scoring = index.scoring(pictured=image is not None)
        conditions = RecordFilters.equal(filters) if filters else None
        leaf_filter = index.leaf_filter(conditions) if conditions else None
        options = with_scoring(SearchOptions(k=k, leaf_filter=leaf_filter), index, scoring)
        with self._lock:
            query = RecallQuery(text, prompt, options, conditions, scoring)
            ranking = self._endpoint.recall(query) if self._endpoint and image is not None else None
            watching = RecordingScorer(self._scorer)
            if ranking is None:
                rerank = reranking(index, scoring)
                (ranking,) = recall(watching, index.trie, [prompt], options, rerank=rerank)
        expanded = probabilities(watching.steps)
        hits = tuple(
            self._found(hit, identifier_levels(index, hit, expanded, leaf_filter) if expanded else ())
            for hit in ranking.hits
        )
        return BrowseRanking(hits, ranking.exact, ranking.nodes_expanded, time.monotonic() - began, scoring)

    def answer(self, question: str, *, k: int, filters: Chosen) -> BrowseAnswer:
        """Recall images for the question, look at them, answer. Errors as of `recall`."""
        began = time.monotonic()
        wanted = MetadataFilters.model_validate(RecordFilters.equal(filters).model_dump()) if filters else None
        retriever = GenerativeImageRetriever(
            self.index, self._scorer, similarity_top_k=k, filters=wanted, endpoint=self._endpoint
        )
        with self._lock:
            response = image_query_engine(retriever, self._llm).query(question)
        sources = []
        for node in response.source_nodes:
            record = self.index.records[self.index.rows_by_id[node.node.metadata["image_id"]]]
            caption = record.captions[0] if record.captions else ""
            scores = node.score or 0.0, node.node.metadata["genret_log_prob"]
            name = node.node.metadata["genret_identifier"]
            sources.append(BrowseHit(record.image_id, record.file_name, caption, *scores, name))
        return BrowseAnswer(str(response), tuple(sources), time.monotonic() - began)

    def filters(self) -> dict[str, Sequence[Value]]:
        """The values of every metadata key, in the order of the images."""
        return {key: self.index.columns.distinct(key) for key in self.index.columns.keys}

    def _found(self, hit: Hit, levels: tuple[Level, ...]) -> BrowseHit:
        record = self.index.record_of(hit)
        caption = record.captions[0] if record.captions else ""
        names = record.image_id, record.file_name, caption
        return BrowseHit(*names, hit.score, hit.log_prob, self.index.identifier_of(hit), levels)
