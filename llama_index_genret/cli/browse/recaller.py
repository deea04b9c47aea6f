"""Recall for a text or an image with its search symbol by symbol, and answers with their source images.

Depends on the index, a scorer and the query engine of LlamaIndex; independent of HTTP.
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

AcceptedValues = Mapping[str, list[Value]]
"""Metadata key -> accepted values. An image must have one of them for every key."""


@dataclass(frozen=True)
class BrowseHit:
    """One recalled image. levels: the search per symbol, empty if a server recalled the image in one request."""

    image_id: str
    file_name: str
    caption: str
    score: float
    log_prob: float
    identifier: str
    levels: tuple[Level, ...] = ()


@dataclass(frozen=True)
class BrowseRanking:
    """Images, best first, and facts about the search. See `search.Ranking`."""

    hits: tuple[BrowseHit, ...]
    exact: bool
    nodes_expanded: int
    seconds: float
    scoring: Scoring


@dataclass(frozen=True)
class BrowseAnswer:
    """An answer with the images that the model read for it, best first."""

    answer: str
    sources: tuple[BrowseHit, ...]
    seconds: float


class Recaller:
    """Recall and answer with one model, one request at a time.

    Args:
        endpoint: recall endpoint of a server, used for image queries: a server recalls them in one request only.
            Default none.
    """

    def __init__(self, index: Index, scorer: Scorer, llm: LLM, *, endpoint: RecallClient | None = None) -> None:
        self.index = index
        self._scorer, self._llm, self._endpoint = scorer, llm, endpoint
        self._lock = threading.Lock()

    def recall(self, text: str, image: bytes | None, *, k: int, filters: AcceptedValues) -> BrowseRanking:
        """Return the best `k` images for a text, for an image, or for both, by beam search.

        Raises:
            QueryError: the query is invalid. FilterError: the filters do not apply. ImageError: the image is invalid.
            ServerError: the server failed.
        """
        index, began = self.index, time.monotonic()
        prompts, tokenizer = index.prompts, index.tokenizer
        prompt = prompts.for_query(tokenizer, text) if image is None else prompts.for_image(tokenizer, image, text)
        scoring = index.scoring(image_query=image is not None)
        conditions = RecordFilters.equal(filters) if filters else None
        leaf_filter = index.leaf_filter(conditions) if conditions else None
        options = with_scoring(SearchOptions(k=k, leaf_filter=leaf_filter), index, scoring)
        with self._lock:
            query = RecallQuery(text, prompt, options, conditions, scoring)
            ranking = self._endpoint.recall(query) if self._endpoint and image is not None else None
            recorder = RecordingScorer(self._scorer)
            if ranking is None:
                rerank = reranking(index, scoring)
                (ranking,) = recall(recorder, index.trie, [prompt], options, rerank=rerank)
        expanded = probabilities(recorder.steps)
        hits = tuple(
            self._browse_hit(hit, identifier_levels(index, hit, expanded, leaf_filter) if expanded else ())
            for hit in ranking.hits
        )
        return BrowseRanking(hits, ranking.exact, ranking.nodes_expanded, time.monotonic() - began, scoring)

    def answer(self, question: str, *, k: int, filters: AcceptedValues) -> BrowseAnswer:
        """Recall images for the question and answer from them. Raises the errors of `recall`."""
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
            identifier = node.node.metadata["genret_identifier"]
            sources.append(BrowseHit(record.image_id, record.file_name, caption, *scores, identifier))
        return BrowseAnswer(str(response), tuple(sources), time.monotonic() - began)

    def filters(self) -> dict[str, Sequence[Value]]:
        """Return the values of every metadata key, in the order of the images."""
        return {key: self.index.columns.distinct(key) for key in self.index.columns.keys}

    def _browse_hit(self, hit: Hit, levels: tuple[Level, ...]) -> BrowseHit:
        record = self.index.record_of(hit)
        caption = record.captions[0] if record.captions else ""
        names = record.image_id, record.file_name, caption
        return BrowseHit(*names, hit.score, hit.log_prob, self.index.identifier_of(hit), levels)
