"""The models of a `GenerativeImageIndex`, on a server or in this process, loaded on first use.

Depends on scorers and LLMs; independent of documents and edits.
"""

from __future__ import annotations

from threading import RLock
from typing import Any

from llama_index.core.llms import LLM
from llama_index.llms.openai_like import OpenAILike

from llama_index_genret.errors import CorpusError, NotTrained
from llama_index_genret.llamaindex.llms import InProcessLLM, genret_llm
from llama_index_genret.llamaindex.retriever import GenerativeImageRetriever, scorer_of_llm
from llama_index_genret.scorers.base import Scorer
from llama_index_genret.serving.endpoint.client import RecallClient
from llama_index_genret.store import Index


class IndexModels:
    """The models of one index folder. The arguments are those of `GenerativeImageIndex`."""

    def __init__(
        self, *, model: Any, api_base: str | None, api_key: str, llm: LLM | None, scorer: Scorer | None, device: str
    ) -> None:
        if api_base is not None and llm is None:
            llm = genret_llm(api_base, api_key=api_key)
        self.device = device
        self._model, self._llm, self._scorer = model, llm, scorer
        self._is_served = api_base is not None or isinstance(llm, OpenAILike)
        self._loading = RLock()
        self._base: tuple[str, Any] | None = None
        self._trained: tuple[str | None, Any] | None = None

    def base_for_new_index(self) -> Any:
        """Return the base model, an `Mllm`, for the identifiers of a new index.

        Raises:
            CorpusError: no base model is given.
        """
        from llama_index_genret.models.mllm import load_mllm

        if self._model is None:
            raise CorpusError("a new index needs a base model. Pass its folder or hub id as model.")
        return load_mllm(self._model, device=self.device) if isinstance(self._model, str) else self._model

    def base_of(self, index: Index) -> Any:
        """Return the base model of an index, with rows for its symbols. It is cached until symbols are added."""
        from llama_index_genret.store.model_loading import load_base

        with self._loading:
            if self._base is None or self._base[0] != index.manifest.tokenizer:
                self._base = index.manifest.tokenizer, load_base(index, device=self.device, base=self._where)
            return self._base[1]

    def recall_backend(self, index: Index) -> tuple[Scorer, RecallClient | None]:
        """Return the scorer and the endpoint for a retriever of the index.

        Raises:
            NotTrained: the index has no trained weights yet.
        """
        if self._scorer is not None:
            return self._scorer, None
        if not index.is_trained:
            raise NotTrained(
                f"no model is trained on the {len(index.records)} images of {index.folder} yet. Call train(), or run "
                f"`genret train {index.folder}`, on a GPU if there are many images."
            )
        if self._is_served and isinstance(self._llm, OpenAILike):
            served = scorer_of_llm(self._llm, index)
            return served, RecallClient(index, served.server)
        return self._in_process(index), None

    def answer_llm(self, index: Index) -> LLM:
        """Return the given LLM, else an LLM over the model that recalls.

        Raises:
            NotTrained: see `recall_backend`.
        """
        if self._llm is not None:
            return self._llm
        scorer, _ = self.recall_backend(index)
        return InProcessLLM(getattr(scorer, "mllm", None) or self._in_process(index).mllm)

    def refresh(self, retriever: GenerativeImageRetriever, index: Index) -> None:
        """Make a retriever search another version of the index."""
        scorer, endpoint = self.recall_backend(index)
        retriever.use(index, scorer, endpoint=endpoint)

    @property
    def _where(self) -> str | None:
        return self._model if isinstance(self._model, str) else None

    def _in_process(self, index: Index) -> Any:
        from llama_index_genret.scorers.transformers import TransformersScorer
        from llama_index_genret.store.model_loading import load_trained

        with self._loading:
            if self._trained is None or self._trained[0] != index.weights_id:
                mllm = load_trained(index, device=self.device, base=self._where)
                self._trained = index.weights_id, TransformersScorer(mllm)
            return self._trained[1]
