"""The models of a `GenerativeImageIndex`, on a server or in this process, loaded on first use.

Depends on scorers and LLMs; independent of documents and edits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from threading import RLock
from typing import Any

from llama_index.core.llms import LLM
from llama_index.llms.openai_like import OpenAILike

from llama_index_genret.errors import CorpusError, EncoderUnavailable, MissingExtra, NotTrained
from llama_index_genret.llamaindex.llms import InProcessLLM, genret_llm
from llama_index_genret.llamaindex.retriever import GenerativeImageRetriever, scorer_of_llm, trained_model
from llama_index_genret.models.encoder import DEFAULT_ENCODER, Encoder, load_encoder
from llama_index_genret.scorers.base import Scorer
from llama_index_genret.serving.endpoint.client import RecallClient
from llama_index_genret.store import Index
from llama_index_genret.store.vectors import EncoderEntry, resolve_encoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecallBackend:
    """The arguments of a retriever that recall: see `GenerativeImageRetriever`."""

    scorer: Scorer | None
    encoder: Encoder | None = None
    endpoint: RecallClient | None = None


class IndexModels:
    """The models of one index folder. The arguments are those of `GenerativeImageIndex`."""

    def __init__(
        self,
        *,
        model: Any,
        encoder: Encoder | str | None,
        api_base: str | None,
        api_key: str,
        llm: LLM | None,
        scorer: Scorer | None,
        device: str,
    ) -> None:
        if api_base is not None and llm is None:
            llm = genret_llm(api_base, api_key=api_key)
        self.device = device
        self._model, self._encoder_choice, self._llm, self._scorer = model, encoder, llm, scorer
        self._is_served = api_base is not None or isinstance(llm, OpenAILike)
        self._loading = RLock()
        self._base: tuple[str, Any] | None = None
        self._trained: tuple[str | None, Any] | None = None
        self._encoder: tuple[EncoderEntry, Encoder] | None = None

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

    def encoder_for_new_index(self) -> Encoder | None:
        """Return the encoder that was given, or the default one; None for "none", and for a default that is missing.

        Raises:
            EncoderError: the encoder that was named does not load.
        """
        chosen = self._encoder_choice
        if chosen == "none":
            return None
        if chosen is not None:
            return load_encoder(chosen) if isinstance(chosen, str) else chosen
        try:
            return load_encoder(DEFAULT_ENCODER)
        except (EncoderUnavailable, MissingExtra) as error:
            log.warning("the index is made without an encoder, and recalls after training only: %s", error)
            return None

    @property
    def encoder_choice(self) -> Encoder | str | None:
        """Return the encoder that was given, None to load that of the index by its name."""
        return None if self._encoder_choice == "none" else self._encoder_choice

    def encoder_of(self, index: Index) -> Encoder | None:
        """Return the encoder of an index, loaded once; None for an index without.

        Raises:
            EncoderError: it does not load, or the one that was given is another.
        """
        entry = index.manifest.encoder
        with self._loading:
            if entry is None:
                return None
            if self._encoder is None or self._encoder[0] != entry:
                found = resolve_encoder(entry, self.encoder_choice)
                assert found is not None
                self._encoder = entry, found
            return self._encoder[1]

    def recall_backend(self, index: Index) -> RecallBackend:
        """Return what recalls from the index: a server, or the models in this process.

        A server blends with the encoder in its own process. An encoder that was given serves the stock protocol, too.

        Raises:
            NotTrained: the index has neither trained weights nor an encoder.
            EncoderError: the encoder does not load, or is not the one of the index.
        """
        if self._scorer is not None:
            return RecallBackend(self._scorer)
        if not index.is_trained and index.manifest.encoder is None:
            raise NotTrained(
                f"{index.folder} has {len(index.records)} images that no model was trained on (untrained_ids), and no "
                f"encoder to recall them with: call train(), or run `genret train {index.folder}`."
            )
        if self._is_served and isinstance(self._llm, OpenAILike):
            served = scorer_of_llm(self._llm, index)
            return RecallBackend(
                trained_model(index, served), self._client_encoder(index), RecallClient(index, served.server)
            )
        encoder = None if self._encoder_choice == "none" and index.is_trained else self.encoder_of(index)
        return RecallBackend(self._trained_scorer(index) if index.is_trained else None, encoder)

    def _client_encoder(self, index: Index) -> Encoder | None:
        """Return the encoder that was given, or any that loads before the training: another server has no model."""
        if self.encoder_choice is not None:
            return self.encoder_of(index)
        try:
            return None if index.is_trained else self.encoder_of(index)
        except (EncoderUnavailable, MissingExtra):
            return None

    def answer_llm(self, index: Index) -> LLM:
        """Return the given LLM, else an LLM over the model that recalls.

        Raises:
            NotTrained: see `recall_backend`.
        """
        if self._llm is not None:
            return self._llm
        if not index.is_trained and index.manifest.encoder is not None and self._scorer is None:
            return InProcessLLM(self.base_of(index))
        scorer = self.recall_backend(index).scorer
        return InProcessLLM(getattr(scorer, "mllm", None) or self._trained_scorer(index).mllm)

    def refresh(self, retriever: GenerativeImageRetriever, index: Index) -> None:
        """Make a retriever search another version of the index."""
        backend = self.recall_backend(index)
        retriever.use(index, backend.scorer, encoder=backend.encoder, endpoint=backend.endpoint)

    @property
    def _where(self) -> str | None:
        return self._model if isinstance(self._model, str) else None

    def _trained_scorer(self, index: Index) -> Any:
        from llama_index_genret.scorers.transformers import TransformersScorer
        from llama_index_genret.store.model_loading import load_trained

        with self._loading:
            if self._trained is None or self._trained[0] != index.weights_id:
                mllm = load_trained(index, device=self.device, base=self._where)
                self._trained = index.weights_id, TransformersScorer(mllm)
            return self._trained[1]
