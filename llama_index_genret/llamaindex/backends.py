"""What recalls, answers and names images for a `GenerativeImageIndex`: a server, or models loaded when first needed.

Knows scorers and LLMs; nothing of documents or edits.
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
    """Models of one index folder. Arguments as of `GenerativeImageIndex`."""

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
        """The base model that names the images of a new index: an `Mllm`.

        Raises:
            CorpusError: none was named.
        """
        from llama_index_genret.models.mllm import load_mllm

        if self._model is None:
            raise CorpusError("images are named by a base model: name its folder or hub id as model.")
        return load_mllm(self._model, device=self.device) if isinstance(self._model, str) else self._model

    def base_of(self, index: Index) -> Any:
        """The base model of an index, with room for its symbols; kept until it gets more of them."""
        from llama_index_genret.store.model_loading import load_base

        with self._loading:
            if self._base is None or self._base[0] != index.manifest.tokenizer:
                self._base = index.manifest.tokenizer, load_base(index, device=self.device, base=self._where)
            return self._base[1]

    def recall_backend(self, index: Index) -> tuple[Scorer, RecallClient | None]:
        """What a retriever of the index recalls with.

        Raises:
            NotTrained: the index has no trained weights yet.
        """
        if self._scorer is not None:
            return self._scorer, None
        if not index.is_trained:
            raise NotTrained(
                f"{index.folder} names {len(index.records)} images that no model has learnt yet (untrained_ids): call "
                f"train(), or run `genret train {index.folder}`, on a GPU where there are many."
            )
        if self._is_served and isinstance(self._llm, OpenAILike):
            served = scorer_of_llm(self._llm, index)
            return served, RecallClient(index, served.server)
        return self._in_process(index), None

    def answer_llm(self, index: Index) -> LLM:
        """The LLM that answers: the one that was given, else the model that recalls.

        Raises:
            NotTrained: as of `recall_backend`.
        """
        if self._llm is not None:
            return self._llm
        scorer, _ = self.recall_backend(index)
        return InProcessLLM(getattr(scorer, "mllm", None) or self._in_process(index).mllm)

    def refresh(self, retriever: GenerativeImageRetriever, index: Index) -> None:
        """Let a retriever search another version of the index."""
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
