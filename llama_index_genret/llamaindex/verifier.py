"""`RecallVerifier`: the model that recalled images verifies them, and abstains if none fits the query.

Depends on LlamaIndex's postprocessors and our retriever. `scorers.evidence` computes the evidence, and
`scorers.abstention` decides when to abstain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # it re-exports
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from llama_index_genret.errors import QueryError, UnknownImage
from llama_index_genret.llamaindex.retriever import GenerativeImageRetriever
from llama_index_genret.scorers.abstention import Abstention, Signals, fit_abstention, log_odds, logistic
from llama_index_genret.scorers.evidence import Evidence, Inquiry, agather_evidence, gather_evidence
from llama_index_genret.store.scoring import RerankBy

dispatcher = get_dispatcher(__name__)


class RecallVerifier(BaseNodePostprocessor):
    """A postprocessor that re-ranks recalled images by log p(query | image), and abstains without enough evidence.

        verifier = RecallVerifier(retriever).calibrated(known, unknown)
        engine = image_query_engine(retriever, llm, node_postprocessors=[verifier])

    One batch scores all images of a query: the log-probability of the query after each image and after some reference
    images, and the log-probability of each identifier over the whole vocabulary. Scores become logistic(log-odds of the
    score + weight * (log p(query | image) - log p(query))), in (0, 1), with natural logs. The returned nodes are
    copies. Their metadata get `genret_information` (that difference) and, with `abstention`, `genret_confidence`.

    Nodes of other retrievers are verified too, if their images are in the index. The image id is `image_id` in the
    metadata, or the id of the node.

    Args:
        retriever: retriever whose index and model verify.
        weight: weight of the evidence, default 0.1. 0 keeps the order. 1 trusts the likelihoods of the model fully,
            which are overconfident.
        by: input of the model. "identifier" (the default) is cheap and works with any server. "image" needs a model in
            this process.
        references: number of random images of the index that estimate log p(query), default 8.
        top_n: number of results to keep, default None for all.
        abstention: rule for when to return no image, default None for never. `calibrated` chooses it.

    Raises:
        QueryError: the query is missing or is an image query.
        UnknownImage: the image of a node is not in the index.
    """

    weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    by: RerankBy = "identifier"
    references: int = Field(default=8, ge=0)
    top_n: int | None = Field(default=None, ge=1)
    abstention: Abstention | None = None
    _retriever: GenerativeImageRetriever = PrivateAttr()

    def __init__(self, retriever: GenerativeImageRetriever, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._retriever = retriever

    @classmethod
    def class_name(cls) -> str:
        """Return the name for LlamaIndex's events."""
        return "genret_recall_verifier"

    def calibrated(
        self,
        known: Iterable[str],
        unknown: Iterable[str] = (),
        *,
        lost: float = 0.05,
        retriever: BaseRetriever | None = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> RecallVerifier:
        """Return a copy with a calibrated `abstention`.

        Args:
            known: queries about images of the index. The model was not trained on them.
            unknown: queries about images that the index lacks. With them, the weights of the signals are fitted too.
                Default none.
            lost: share of the known queries that may get no image, in [0, 1), default 0.05.
            retriever: retriever that recalls, for example a fusion. Default: the one whose model verifies.
            progress: wrapper of iterables that draws a progress bar, default none.

        Raises:
            QueryError: there are no known queries, or `lost` is not in [0, 1).
        """
        source = retriever or self._retriever
        found = [[self._signals(source, query) for query in progress(list(kind))] for kind in (known, unknown)]
        of_known, of_unknown = ([one for one in signals if one is not None] for signals in found)
        return self.model_copy(update={"abstention": fit_abstention(of_known, of_unknown, lost=lost)})

    def _signals(self, retriever: BaseRetriever, query: str) -> Signals | None:
        nodes = retriever.retrieve(query)
        if not nodes:
            return None
        inquiry = self._inquiry(nodes, QueryBundle(query))
        (evidence,) = gather_evidence(self._retriever._scorer, [inquiry])
        return evidence.signals([node.score for node in nodes])

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        inquiry = self._start(nodes, query_bundle)
        (evidence,) = gather_evidence(self._retriever._scorer, [inquiry])
        return self._decide(nodes, evidence)

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        inquiry = self._start(nodes, query_bundle)
        (evidence,) = await agather_evidence(self._retriever._scorer, [inquiry])
        return self._decide(nodes, evidence)

    def _start(self, nodes: list[NodeWithScore], query: QueryBundle | None) -> Inquiry:
        inquiry = self._inquiry(nodes, query)
        name = self._retriever.index.manifest.model.name_or_path
        dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=self.top_n or len(nodes), model_name=name))
        return inquiry

    def _inquiry(self, nodes: Sequence[NodeWithScore], query: QueryBundle | None) -> Inquiry:
        index = self._retriever.index
        if query is None or query.image_path:
            raise QueryError("verification needs a text query. Pass query_str, and no image_path.")
        rows = tuple(_row_of(node, index.rows_by_id) for node in nodes)
        drawn = np.random.default_rng(0).integers(0, len(index.records), self.references)
        references = tuple(sorted(set(drawn.tolist())))
        return Inquiry(index, index.prompts.for_query(index.tokenizer, query.query_str), rows, self.by, references)

    def _decide(self, nodes: Sequence[NodeWithScore], evidence: Evidence) -> list[NodeWithScore]:
        signals = evidence.signals([node.score for node in nodes])
        kept: list[NodeWithScore] = []
        if self.abstention is None or not self.abstention.abstains(signals):
            confidence = None if self.abstention is None else self.abstention.confidence(signals)
            pairs = zip(nodes, evidence.information.tolist(), strict=True)
            kept = [self._add_evidence(node, information, confidence) for node, information in pairs]
            kept = sorted(kept, key=lambda node: -(node.score or 0.0))[: self.top_n]
        dispatcher.event(ReRankEndEvent(nodes=kept))
        return kept

    def _add_evidence(self, found: NodeWithScore, information: float, confidence: float | None) -> NodeWithScore:
        facts = {"genret_information": information, **({} if confidence is None else {"genret_confidence": confidence})}
        node = found.node
        changed = {
            "metadata": {**node.metadata, **facts},
            "excluded_llm_metadata_keys": [*node.excluded_llm_metadata_keys, *facts],
            "excluded_embed_metadata_keys": [*node.excluded_embed_metadata_keys, *facts],
        }
        score = logistic(log_odds(found.score) + (self.weight * information if self.weight else 0.0))
        return NodeWithScore(node=node.model_copy(update=changed), score=score)


def _row_of(found: NodeWithScore, rows_by_id: dict[str, int]) -> int:
    image_id = found.node.metadata.get("image_id", found.node.node_id)
    if image_id not in rows_by_id:
        raise UnknownImage(
            f"the index has no image {image_id!r} of a node to verify: it was removed, or the node comes from another "
            "corpus. Verify before mixing in nodes of other corpora."
        )
    return rows_by_id[image_id]
