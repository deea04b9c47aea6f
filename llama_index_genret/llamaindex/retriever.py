"""`GenerativeImageRetriever`: a LlamaIndex retriever whose index is a model that has memorised the images.

Depends on LlamaIndex's retriever interface and one `Scorer`; independent of the kind of scorer.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import threading
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.constants import DEFAULT_SIMILARITY_TOP_K
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle
from llama_index.core.storage.docstore import BaseDocumentStore, SimpleDocumentStore
from llama_index.core.vector_stores.types import MetadataFilters
from llama_index.llms.openai_like import OpenAILike
from pydantic import ValidationError

from llama_index_genret.corpus import Record
from llama_index_genret.errors import FilterError, NotTrained, QueryError, UnknownImage
from llama_index_genret.llamaindex.model_images import MAX_IMAGE_PIXELS
from llama_index_genret.llamaindex.nodes import hit_node, node_of, still_passes
from llama_index_genret.llamaindex.search_scope import SearchScope
from llama_index_genret.models.encoder import Encoder
from llama_index_genret.scorers.base import Scorer, arecall, recall
from llama_index_genret.scorers.blend import Blender, BlendScorer
from llama_index_genret.scorers.encoder import EncoderScorer
from llama_index_genret.scorers.rerank import reranking, with_scoring
from llama_index_genret.scorers.vllm_http import SERVED_NAME, VllmScorer
from llama_index_genret.search import Hit, Mode, Normalise, Ranking, SearchOptions
from llama_index_genret.serving.endpoint.client import RecallClient, RecallQuery
from llama_index_genret.store import Index, RecordFilters, ScoringChoice, load_index
from llama_index_genret.store.vectors import resolve_encoder

log = logging.getLogger(__name__)

RETRIEVAL_PROMPT, QUERY_TEMPLATE = "retrieval_prompt", "query_template"


class GenerativeImageRetriever(BaseRetriever):
    """A retriever that recalls images by generating their identifiers.

    Every result is a new `GenretImageNode` of a real image of the index. Its id is the image id, `text` is the first
    caption, and the mime type is read from the file. Its flat metadata are those of the record, `image_id`,
    `file_path`, `content_sha256`, `genret_identifier`, `genret_log_prob`, `genret_rank` and `genret_exact`.

    The model of an engine with `multimodal=True` reads the caption, the image, and the metadata of `llm_metadata_keys`.
    The model of `image_query_engine` reads only the image, as in its training.

    Scores lie in (0, 1]. They are probabilities, unless a prior or a re-ranking changes the ranking: then
    `search.Hit.score` defines them, and the metadata have `genret_ranked_by`.

    `get_prompts` returns the `retrieval_prompt` and the `query_template`. The `retrieval_prompt` is fixed, because the
    model was trained with it. `update_prompts` may replace the `query_template`, which fills its blank for text
    queries.

    Args:
        index: index from `load_index`.
        scorer: a `TransformersScorer`, a `VllmScorer`, or another scorer; None for an index without trained weights.
        encoder: the loaded encoder of the index, which the search blends with the scorer, see `store.Scoring`. Default
            None: the scorer recalls alone. If the index has an encoder, the first such query logs a warning.
        similarity_top_k: number of results. Fewer are returned only if fewer images pass the filters.
        filters: metadata filters, also nested ones, applied inside the search. The retriever keeps a copy. Assign
            `filters` to change them. Default none.
        beam_width: beams kept after each step, default 10.
        normalise: which of the two scores to use, see `search.Normalise`.
        mode, max_expansions: "beam" (the default), or "exact" with an optional limit, see `search.SearchOptions`.
            `genret_exact` in the metadata is true if the result is exact.
        scoring: how hits are ranked, see `store.Scoring`. None, or a field that is None: the value chosen by
            `genret tune`, for text queries only. `eta` needs `genret tune`. Image queries are never re-ranked.
        endpoint: recall endpoint, which answers a query in one request. The scorer handles the queries that the
            endpoint cannot answer. `from_server` sets it. Default none.
        docstore: docstore whose nodes are returned in place of those made from the records, by image id. For an image
            that it lacks, the node of the record is returned and a warning is logged. A node is left out with a
            warning if its metadata do not pass the filters although those of the record do. Default none.
        image_ids: the images to search, default None for all.
        llm_metadata_keys: metadata keys that the answering model reads, default none.
        max_image_pixels: limit of pixels of an image for a model, see `GenretImageNode`.

    Source: GRACE (arXiv:2402.10805).
    """

    def __init__(
        self,
        index: Index,
        scorer: Scorer | None,
        *,
        encoder: Encoder | None = None,
        similarity_top_k: int = DEFAULT_SIMILARITY_TOP_K,
        filters: MetadataFilters | None = None,
        beam_width: int | None = None,
        normalise: Normalise = Normalise.CHILDREN,
        mode: Mode = "beam",
        max_expansions: int | None = None,
        scoring: ScoringChoice | None = None,
        endpoint: RecallClient | None = None,
        docstore: BaseDocumentStore | None = None,
        image_ids: Collection[str] | None = None,
        llm_metadata_keys: Collection[str] = (),
        max_image_pixels: int | None = MAX_IMAGE_PIXELS,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.similarity_top_k = similarity_top_k
        self.llm_metadata_keys = llm_metadata_keys
        chosen = None if image_ids is None else frozenset(image_ids)
        self._docstore, self._max_image_pixels = docstore, max_image_pixels
        self._search = SearchOptions(
            k=similarity_top_k, width=beam_width, mode=mode, max_expansions=max_expansions, normalise=normalise
        )
        self._choice = scoring or ScoringChoice()
        self._template: BasePromptTemplate = PromptTemplate("{query_str}")
        self._filters, self._replacing = copy.deepcopy(filters), threading.Lock()
        record_filters = None if filters is None else _record_filters(filters)
        self._source = SearchScope(
            index, scorer, Blender(index, encoder), self._usable_endpoint(endpoint, chosen), record_filters, chosen
        )
        self._has_warned = False
        self._check(index)

    def use(
        self,
        index: Index,
        scorer: Scorer | None,
        *,
        encoder: Encoder | None = None,
        endpoint: RecallClient | None = None,
    ) -> None:
        """Search another version of the index from the next query on. A running query keeps its version."""
        blender = Blender(index, encoder)
        with self._replacing:
            served = self._usable_endpoint(endpoint, self._source.image_ids)
            self._source = replace(self._source, index=index, scorer=scorer, blender=blender, endpoint=served)

    def _usable_endpoint(self, endpoint: RecallClient | None, image_ids: frozenset[str] | None) -> RecallClient | None:
        return endpoint if self._search.normalise is Normalise.CHILDREN and image_ids is None else None

    @property
    def filters(self) -> MetadataFilters | None:
        """A copy of the filters that every result passes. Assigned filters hold from the next query on.

        Raises:
            FilterError: the assigned filters do not apply to the index. The old ones stay.
        """
        return copy.deepcopy(self._filters)

    @filters.setter
    def filters(self, filters: MetadataFilters | None) -> None:
        with self._replacing:
            source = replace(self._source, filters=None if filters is None else _record_filters(filters))
            _ = source.leaf_filter
            self._source, self._filters = source, copy.deepcopy(filters)

    def _check(self, index: Index) -> None:
        """Raise an error for invalid options before the first query."""
        index.scoring(self._choice)
        _ = self._source.leaf_filter
        image_ids = self._source.image_ids or ()
        unknown = [image_id for image_id in image_ids if image_id not in index.rows_by_id]
        if unknown:
            raise UnknownImage(
                f"{index.folder} has no image {unknown[0]!r} ({len(unknown)} of {len(image_ids)} are "
                "unknown). The ids of nodes are image ids. Add the images to the index, or leave their nodes out."
            )

    @property
    def index(self) -> Index:
        """The version of the index that the next query searches."""
        return self._source.index

    @property
    def _scorer(self) -> Scorer:
        """The model alone, or the encoder alone of an index that is not trained."""
        return self._source.scorer or self._source.scorer_of(self.index.scoring(self._choice))

    @classmethod
    def from_index_dir(
        cls,
        index_dir: str | Path,
        *,
        model: str | None = None,
        encoder: Encoder | str | None = None,
        device: str = "auto",
        scoring: ScoringChoice | None = None,
        **kwargs: Any,
    ) -> GenerativeImageRetriever:
        """Return a retriever with the model and the encoder of the index in this process.

        An index without trained weights is recalled by its encoder alone.

        Args:
            index_dir: index folder.
            model: new place of the base model, if it has moved. Default: the place in the index.
            encoder: the loaded encoder of the index, or its new place. Default: the place in the index.
            device: torch device, default "auto".
            scoring: see the class. `model_weight=1` recalls by the generative model alone, and loads no encoder.
            kwargs: options of the retriever.

        Raises:
            NotTrained: the index has neither trained weights nor an encoder.
            EncoderError: the encoder does not load, or is not the one of the index.
        """
        index = load_index(Path(index_dir))
        chosen = index.scoring(scoring).model_weight
        trained = None
        if index.is_trained and (chosen > 0.0 or scoring is None or scoring.model_weight is None):
            from llama_index_genret.scorers.transformers import TransformersScorer
            from llama_index_genret.store.model_loading import load_trained

            trained = TransformersScorer(load_trained(index, device=device, base=model))
        elif index.manifest.encoder is None:  # before a missing encoder is loaded
            raise NotTrained(
                f"{index.folder} has no trained weights yet, and no encoder: run `genret train {index.folder}`."
            )
        reader = None if trained and chosen == 1.0 else resolve_encoder(index.manifest.encoder, encoder)
        return cls(index, trained, encoder=reader, scoring=scoring, **kwargs)

    @classmethod
    def from_server(
        cls,
        index_dir: str | Path,
        api_base: str,
        *,
        model: str | None = None,
        api_key: str = "EMPTY",
        timeout_s: float = 60.0,
        encoder: Encoder | str | None = None,
        **kwargs: Any,
    ) -> GenerativeImageRetriever:
        """Return a retriever with a vLLM server that serves the model of the index (`genret serve`). Needs no torch.

        A query is one request if the server has the recall endpoint and this version of the index, else one per step.
        The endpoint blends with the encoder in the server. Without it the retriever blends with its own `encoder`, or
        logs once that it recalls by the model alone.

        Args:
            index_dir: index folder.
            api_base: URL of the server, http://HOST:PORT/v1.
            model: served model name. Default: the model with the weights of the index. A name disables the endpoint.
            api_key: key of the server.
            timeout_s: seconds per request, default 60.
            encoder: the encoder of the index in this process, or its place (a folder, hub id or address). Default none.
            kwargs: options of the retriever.

        Raises:
            EncoderError: the encoder does not load, or is not the one of the index.
        """
        index = load_index(Path(index_dir))
        scorer = VllmScorer(api_base, model=model, weights_id=index.weights_id, api_key=api_key, timeout_s=timeout_s)
        endpoint = RecallClient(index, scorer.server) if model is None else None  # the endpoint has its own model
        return cls(
            index, trained_model(index, scorer), encoder=_client_encoder(index, encoder), endpoint=endpoint, **kwargs
        )

    @classmethod
    def from_llm(
        cls, llm: OpenAILike, index_dir: str | Path, *, encoder: Encoder | str | None = None, **kwargs: Any
    ) -> GenerativeImageRetriever:
        """Return a retriever with the server of an `OpenAILike`, with its URL, key, timeout and headers.

        A query is one request if the server has the recall endpoint and this version of the index. Else it is one per
        step, to the model of `genret serve` with the weights of the index, or to `llm.model`.

        Args:
            llm: LLM of the server.
            index_dir: index folder.
            encoder: see `from_server`.
            kwargs: options of the retriever.
        """
        index = load_index(Path(index_dir))
        scorer = scorer_of_llm(llm, index)
        reader, endpoint = _client_encoder(index, encoder), RecallClient(index, scorer.server)
        return cls(index, trained_model(index, scorer), encoder=reader, endpoint=endpoint, **kwargs)

    @classmethod
    def from_nodes(
        cls, nodes: Sequence[ImageNode], index_dir: str | Path, *, api_base: str | None = None, **kwargs: Any
    ) -> GenerativeImageRetriever:
        """Return a retriever that recalls only these nodes, with their texts, metadata and relationships.

        Args:
            nodes: nodes whose ids are image ids of the index.
            index_dir: index folder.
            api_base: URL for `from_server`. Default None: `from_index_dir`.
            kwargs: options of the retriever.

        Raises:
            UnknownImage: the index has no image with the id of a node.
        """
        docstore = SimpleDocumentStore()
        docstore.add_documents(nodes)
        options = {"docstore": docstore, "image_ids": frozenset(node.node_id for node in nodes), **kwargs}
        if api_base is not None:
            return cls.from_server(index_dir, api_base, **options)
        return cls.from_index_dir(index_dir, **options)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        source = self._source
        query = self._query(source, query_bundle)
        ranking = source.empty_ranking
        if ranking is None and source.endpoint:
            ranking = source.check_ranking(source.endpoint.recall(query))
        if ranking is None:
            options = with_scoring(query.options, source.index, query.scoring)
            rerank = reranking(source.index, query.scoring)
            scorer = self._scorer_of(source, query)
            (ranking,) = recall(scorer, source.index.trie, [query.prompt], options, rerank=rerank)
        return self._nodes(source, ranking)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        source = self._source
        query = self._query(source, query_bundle)
        ranking = source.empty_ranking
        if ranking is None and source.endpoint:
            ranking = source.check_ranking(await source.endpoint.arecall(query))
        if ranking is None:
            options = with_scoring(query.options, source.index, query.scoring)
            rerank = reranking(source.index, query.scoring)
            scorer = self._scorer_of(source, query)
            (ranking,) = await arecall(scorer, source.index.trie, [query.prompt], options, rerank=rerank)
        return await asyncio.to_thread(self._nodes, source, ranking)  # reads files and the docstore

    def _scorer_of(self, source: SearchScope, query: RecallQuery) -> Scorer:
        blends = isinstance(source.scorer, (BlendScorer, EncoderScorer))
        expected = query.prompt.image is None and query.scoring.model_weight < 1.0
        if source.scorer and source.blender.lacks_encoder and expected and not blends and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s is recalled by its trained model alone, without its encoder: pass `encoder` to the retriever, or "
                "ScoringChoice(model_weight=1).",
                source.index.folder,
            )
        return source.scorer_of(query.scoring, [query.prompt])

    def _query(self, source: SearchScope, bundle: QueryBundle) -> RecallQuery:
        index, text = source.index, bundle.query_str
        if bundle.image_path:
            prompt = index.prompts.for_image(index.tokenizer, Path(bundle.image_path), text)
        else:
            text = self._template.format(query_str=text) if text.strip() else text
            prompt = index.prompts.for_query(index.tokenizer, text)
        pictured = prompt.image is not None
        choice = replace(self._choice, rerank=None) if pictured else self._choice
        scoring = index.scoring(choice, image_query=pictured)
        options = replace(self._search, k=self.similarity_top_k, leaf_filter=source.leaf_filter)
        return RecallQuery(text, prompt, options, source.filters, scoring)

    def candidate_nodes(self) -> list[ImageNode]:
        """Return every node that a query may return. With filters, build the other retrievers of a fusion from them.

            BM25Retriever.from_defaults(nodes=retriever.candidate_nodes(), similarity_top_k=3)

        The `filters` of LlamaIndex's BM25 are no replacement: it pads its results with hidden nodes of score 0.
        """
        source = self._source
        mask = source.record_mask
        rows = range(len(source.index.records)) if mask is None else np.flatnonzero(mask).tolist()
        records = [source.index.records[row] for row in rows]
        stored = self._docstore_nodes([record.image_id for record in records])
        return [stored.get(r.image_id) or node_of(r) for r in records if self._passes_filters(source, r, stored)]

    def _docstore_nodes(self, ids: list[str]) -> dict[str, ImageNode]:
        found = self._docstore.get_nodes(ids, raise_error=False) if self._docstore and ids else []
        return {node.node_id: node for node in found if isinstance(node, ImageNode)}

    def _nodes(self, source: SearchScope, ranking: Ranking) -> list[NodeWithScore]:
        index = source.index
        ids = [index.record_of(hit).image_id for hit in ranking.hits]
        stored = self._docstore_nodes(ids)
        lost = [image_id for image_id in ids if self._docstore and image_id not in stored]
        if lost:
            log.warning("the docstore has no image nodes for %s. Using the records of %s.", lost, index.folder)
        hits = [hit for hit in ranking.hits if self._passes_filters(source, index.record_of(hit), stored)]
        return [
            NodeWithScore(node=self._node(index, hit, rank, ranking.exact, stored), score=hit.score)
            for rank, hit in enumerate(hits, start=1)
        ]

    @staticmethod
    def _passes_filters(source: SearchScope, record: Record, stored: dict[str, ImageNode]) -> bool:
        node = stored.get(record.image_id)
        if node is None or source.filters is None:
            return True
        shown = still_passes(node, record, source.filters, source.index.columns.keys)
        if not shown:
            log.warning("left out the docstore node of %s: its metadata do not pass the filters.", record.image_id)
        return shown

    def _node(self, index: Index, hit: Hit, rank: int, exact: bool, stored: dict[str, ImageNode]) -> ImageNode:
        record = index.record_of(hit)
        facts = {
            "image_id": record.image_id,
            "genret_identifier": index.identifier_of(hit),
            "genret_log_prob": hit.log_prob,
            "genret_rank": rank,
            "genret_exact": exact,
            **({} if hit.ranked_by is None else {"genret_ranked_by": hit.ranked_by}),
        }
        return hit_node(
            stored.get(record.image_id) or node_of(record),
            facts,
            llm_metadata_keys=self.llm_metadata_keys,
            max_image_pixels=self._max_image_pixels,
        )

    def _get_prompts(self) -> dict[str, BasePromptTemplate]:
        retrieve = self.index.prompts.retrieve
        whole = PromptTemplate(f"{retrieve.before}{{query_str}}{retrieve.after}")
        return {RETRIEVAL_PROMPT: whole, QUERY_TEMPLATE: self._template}

    def _update_prompts(self, prompts_dict: dict[str, BasePromptTemplate]) -> None:
        if RETRIEVAL_PROMPT in prompts_dict:
            raise QueryError(
                f"{RETRIEVAL_PROMPT!r} cannot be changed, because the model was trained with it. Update "
                f"{QUERY_TEMPLATE!r}, which fills its blank, for example to 'a photo of {{query_str}}'."
            )
        template = prompts_dict.get(QUERY_TEMPLATE)
        if template is None:
            return
        if template.template_vars != ["query_str"]:
            raise QueryError(
                f"expected one blank, {{query_str}}, in {QUERY_TEMPLATE!r}, got {template.template_vars} in "
                f"{template.get_template(llm=None)!r}."
            )
        self._template = template


def scorer_of_llm(llm: OpenAILike, index: Index) -> VllmScorer:
    """Return a scorer with the server of an LLM. See `GenerativeImageRetriever.from_llm`."""
    return VllmScorer(
        str(llm.api_base),
        model=None if llm.model.startswith(SERVED_NAME) else llm.model,
        weights_id=index.weights_id,
        api_key=llm.api_key or "EMPTY",
        timeout_s=llm.timeout,
        headers=llm.default_headers or {},
    )


def trained_model(index: Index, scorer: VllmScorer) -> VllmScorer | None:
    """Return the scorer of a server, or None if it serves an untrained base model to an index with an encoder."""
    return scorer if index.is_trained or index.manifest.encoder is None else None


def _client_encoder(index: Index, encoder: Encoder | str | None) -> Encoder | None:
    """Return the encoder that a client of a server was given, or None without one."""
    return None if encoder is None else resolve_encoder(index.manifest.encoder, encoder)


def _record_filters(filters: MetadataFilters) -> RecordFilters:
    """Convert LlamaIndex's filters to ours, which have the same JSON.

    Raises:
        FilterError: an operator or a value is not one of LlamaIndex's.
    """
    try:
        # pydantic's JSON turns NaN into null. json keeps NaN, so that validation refuses it.
        return RecordFilters.model_validate(json.loads(json.dumps(filters.model_dump())))
    except (ValidationError, ValueError, TypeError, AttributeError) as error:
        raise FilterError(f"the filters {filters!r} cannot be read: {error}") from error
