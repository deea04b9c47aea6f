"""The models of a `GenerativeImageIndex`, on a server or in this process, loaded on first use.

Depends on scorers and LLMs; independent of documents and edits.
"""

from __future__ import annotations

import logging
from threading import RLock
from typing import Any

from llama_index.core.llms import LLM
from llama_index.llms.openai_like import OpenAILike

from llama_index_genret.errors import CorpusError, EncoderUnavailable, MissingExtra, NotTrained
from llama_index_genret.llamaindex.llms import InProcessLLM, genret_llm
from llama_index_genret.llamaindex.retriever import GenerativeImageRetriever, scorer_of_llm
from llama_index_genret.models.encoder import DEFAULT_ENCODER, Encoder, load_encoder
from llama_index_genret.scorers.base import Scorer
from llama_index_genret.scorers.blend import Blender
from llama_index_genret.serving.endpoint.client import RecallClient
from llama_index_genret.store import Index
from llama_index_genret.store.vectors import EncoderEntry, resolve_encoder

log = logging.getLogger(__name__)


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

    def recall_backend(self, index: Index) -> tuple[Scorer, RecallClient | None]:
        """Return the scorer and the endpoint for a retriever of the index.

        Raises:
            NotTrained: the index has no trained weights yet.
        """
        if self._scorer is not None:
            return self._scorer, None
        if not index.is_trained:
            if index.manifest.encoder is not None:
                return self._in_process(index), None
            raise NotTrained(
                f"{index.folder} has {len(index.records)} images that no model was trained on (untrained_ids), and no "
                f"encoder to recall them with: call train(), or run `genret train {index.folder}`."
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
        if not index.is_trained and index.manifest.encoder is not None and self._scorer is None:
            return InProcessLLM(self.base_of(index))
        scorer, _ = self.recall_backend(index)
        return InProcessLLM(getattr(scorer, "mllm", None) or self._trained_scorer(index).mllm)

    def refresh(self, retriever: GenerativeImageRetriever, index: Index) -> None:
        """Make a retriever search another version of the index."""
        scorer, endpoint = self.recall_backend(index)
        retriever.use(index, scorer, endpoint=endpoint)

    @property
    def _where(self) -> str | None:
        return self._model if isinstance(self._model, str) else None

    def _in_process(self, index: Index) -> Scorer:
        """Blend the trained model with the encoder, by the scoring of the index."""
        model = self._trained_scorer(index) if index.is_trained else None
        return Blender(index, self.encoder_of(index)).scorer(model, index.scoring())

    def _trained_scorer(self, index: Index) -> Any:
        from llama_index_genret.scorers.transformers import TransformersScorer
        from llama_index_genret.store.model_loading import load_trained

        with self._loading:
            if self._trained is None or self._trained[0] != index.weights_id:
                mllm = load_trained(index, device=self.device, base=self._where)
                self._trained = index.weights_id, TransformersScorer(mllm)
            return self._trained[1]
