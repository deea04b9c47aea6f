"""`GenerativeImageRetriever`: a LlamaIndex retriever whose index is a model that has memorised the images.

Knows LlamaIndex's contract and one `Scorer`; nothing of how it scores.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.constants import DEFAULT_SIMILARITY_TOP_K
from llama_index.core.schema import ImageNode, NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo
from llama_index.core.vector_stores.types import MetadataFilters
from pydantic import ValidationError

from llama_index_genret import store
from llama_index_genret.endpoint.client import Query, RecallClient
from llama_index_genret.errors import FilterError
from llama_index_genret.images import sniff_mime
from llama_index_genret.scorers.base import Scorer, arecall, recall
from llama_index_genret.scorers.ranked import ranking_options
from llama_index_genret.search import Hit, Normalise
from llama_index_genret.store import Index, ScoringChoice, load_index
from llama_index_genret.store.scoring import RerankBy


class GenerativeImageRetriever(BaseRetriever):
    """Recalls images by generating their identifiers.

    Every result is an `ImageNode` of a real image of the index: its `image_path` exists and its mime type is read
    from the file, `text` is its first caption, and the metadata are the record's own, flat, with `image_id`,
    `file_path`, `content_sha256`, `genret_identifier`, `genret_log_prob`, `genret_rank` and `genret_exact`. None of
    the metadata is shown to the answering model unless `llm_metadata_keys` names it: it looks at the picture.
    Scores lie in (0, 1]: probabilities, or where a prior or a re-ranking ranks them too what `search.Hit.score` says,
    and `genret_ranked_by` then stands in the metadata. Nodes are made fresh for each call; their ids are the image ids.

    Args:
        index: from `load_index`.
        scorer: a `TransformersScorer`, a `VllmScorer`, or your own.
        similarity_top_k: results of a query; fewer come back only where fewer images pass the filters.
        filters: metadata filters, nested ones included, applied inside the search.
        beam_width: beams kept after each step, 10 if not given.
        normalise: which of the two scores; see `search.Normalise`.
        search_budget: 0 for a beam search; None until the best are certain; a number for at most about so many
            expanded prefixes before it goes on as a beam. `genret_exact` in the metadata says which came out.
        eta: how much of the prior of the images is taken off their score; needs `genret tune`. 0 for nothing.
        rerank: how many of the best are ranked anew by log p(query | image), of text queries only. 0 for none.
        rerank_weight, rerank_by: see `store.Scoring`. What is None of these four is as `genret tune` chose it for text
            queries; where it did not run, and for pictures, eta and rerank are 0.
        endpoint: recalls in one request what it can; the scorer does the rest. `from_server` sets it.
    Source: GRACE (arXiv:2402.10805).
    """

    def __init__(
        self,
        index: Index,
        scorer: Scorer,
        *,
        similarity_top_k: int = DEFAULT_SIMILARITY_TOP_K,
        filters: MetadataFilters | None = None,
        beam_width: int | None = None,
        normalise: Normalise = Normalise.CHILDREN,
        search_budget: int | None = 0,
        eta: float | None = None,
        rerank: int | None = None,
        rerank_weight: float | None = None,
        rerank_by: RerankBy | None = None,
        endpoint: RecallClient | None = None,
        llm_metadata_keys: tuple[str, ...] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.index = index
        self.similarity_top_k = similarity_top_k
        self.filters = filters
        self._scorer = scorer
        self._conditions = None if filters is None else _conditions(filters)
        allowed = None if self._conditions is None else index.leaf_filter(self._conditions)
        self._width, self._budget = beam_width, search_budget
        self._search: dict[str, Any] = {"width": beam_width, "budget": search_budget, "normalise": normalise}
        self._search["allowed"] = allowed
        self._choice = ScoringChoice(eta, rerank, rerank_weight, rerank_by)
        index.scoring(self._choice)  # refuses nonsense now
        self._endpoint = endpoint if normalise is Normalise.CHILDREN else None  # whose scores are those
        self._llm_metadata_keys = llm_metadata_keys

    @classmethod
    def from_index_dir(
        cls, index_dir: str | Path, *, model: str | None = None, device: str = "auto", **kwargs: Any
    ) -> GenerativeImageRetriever:
        """With the index's own model, loaded into this process.

        Args:
            model: another place of the same base model, if it has moved.
        """
        from llama_index_genret.modeling import load_trained
        from llama_index_genret.scorers.transformers import TransformersScorer

        index = load_index(Path(index_dir))
        return cls(index, TransformersScorer(load_trained(index, device=device, base=model)), **kwargs)

    @classmethod
    def from_server(
        cls,
        index_dir: str | Path,
        api_base: str,
        *,
        model: str | None = None,
        api_key: str = "EMPTY",
        timeout_s: float = 60.0,
        **kwargs: Any,
    ) -> GenerativeImageRetriever:
        """With a vLLM server that serves the index's exported model (`genret serve`). Needs no torch here.

        A query is one request where the server has the recall endpoint and this version of the index, else one a step.
        """
        from llama_index_genret.scorers.vllm import VllmScorer

        index = load_index(Path(index_dir))
        scorer = VllmScorer(api_base, model=model, weights_id=index.weights_id, api_key=api_key, timeout_s=timeout_s)
        endpoint = RecallClient(index, scorer.server) if model is None else None  # it recalls with its own model
        return cls(index, scorer, endpoint=endpoint, **kwargs)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        query = self._query(query_bundle)
        ranking = self._endpoint.recall(query) if self._endpoint else None
        if ranking is None:
            options = {**self._search, **ranking_options(self.index, query.scoring)}
            (ranking,) = recall(self._scorer, self.index.trie, [query.prompt], k=query.k, **options)
        return [self._node(hit, rank, ranking.exact) for rank, hit in enumerate(ranking.hits, start=1)]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        query = self._query(query_bundle)
        ranking = await self._endpoint.arecall(query) if self._endpoint else None
        if ranking is None:
            options = {**self._search, **ranking_options(self.index, query.scoring)}
            (ranking,) = await arecall(self._scorer, self.index.trie, [query.prompt], k=query.k, **options)
        return [self._node(hit, rank, ranking.exact) for rank, hit in enumerate(ranking.hits, start=1)]

    def _query(self, bundle: QueryBundle) -> Query:
        prompts, tokenizer, text = self.index.prompts, self.index.tokenizer, bundle.query_str
        if bundle.image_path:
            prompt = prompts.for_image(tokenizer, Path(bundle.image_path), text)
        else:
            prompt = prompts.for_query(tokenizer, text)
        pictured = prompt.image is not None
        choice = replace(self._choice, rerank=None) if pictured else self._choice
        scoring = self.index.scoring(choice, pictured=pictured)
        return Query(text, prompt, self.similarity_top_k, self._width, self._budget, self._conditions, scoring)

    def _node(self, hit: Hit, rank: int, exact: bool) -> NodeWithScore:
        record = self.index.record_of(hit)
        metadata = {
            **record.metadata,
            "image_id": record.image_id,
            "file_path": str(record.path),
            "content_sha256": record.sha256,
            "genret_identifier": self.index.identifier_of(hit),
            "genret_log_prob": hit.log_prob,
            "genret_rank": rank,
            "genret_exact": exact,
            **({} if hit.ranked_by is None else {"genret_ranked_by": hit.ranked_by}),
        }
        node = ImageNode(
            id_=record.image_id,
            text=record.captions[0] if record.captions else "",
            image_path=str(record.path),
            image_mimetype=sniff_mime(record.path),
            metadata=metadata,
            excluded_llm_metadata_keys=[key for key in metadata if key not in self._llm_metadata_keys],
            excluded_embed_metadata_keys=[key for key in metadata if key not in record.metadata],
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=record.image_id)},
        )
        return NodeWithScore(node=node, score=hit.score)


def _conditions(filters: MetadataFilters) -> store.MetadataFilters:
    """LlamaIndex's filters as this package's, which read the same JSON.

    Raises:
        FilterError: they hold something that is none of LlamaIndex's operators or values.
    """
    try:
        return store.MetadataFilters.model_validate(filters.model_dump(mode="json"))
    except ValidationError as error:
        raise FilterError(f"the filters {filters!r} cannot be read: {error}") from error
