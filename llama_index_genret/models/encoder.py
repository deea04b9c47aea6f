"""The embedding model of an index: texts and, where it can, images as unit vectors of one space.

Depends on numbers, HTTP and, for local models, sentence-transformers; independent of indexes, identifiers and MLLMs.
A query and a caption may need different prefixes: `embed_queries` and `embed_captions` are two methods for that reason.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from llama_index_genret.errors import EncoderError, EncoderUnavailable, MissingExtra

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

TEXT_BATCH = 256
"""Texts of one forward pass, or of one request."""

HUB_TIMEOUT_S = 5.0
"""Seconds that the hub has to respond before a cached copy of an encoder is used."""

_ATTEMPTS = 3

_OTHER_ENCODERS = (
    "Give a folder or hub id of sentence-transformers, the address of a server (http://HOST/v1), or `none`."
)

Float32 = NDArray[np.float32]
Progress = Callable[[Iterable[Any]], Iterable[Any]]


@runtime_checkable
class Encoder(Protocol):
    """Embeds texts and, where `embeds_images`, images: float32 unit vectors of shape (n, dimension).

    name: a folder, a hub id or an address, stored in an index so that the same encoder can be loaded again.
    """

    name: str
    dimension: int
    embeds_images: bool

    def embed_queries(self, texts: Sequence[str], progress: Progress = iter) -> Float32:
        """Return (n, d) unit vectors of n queries."""

    def embed_captions(self, texts: Sequence[str], progress: Progress = iter) -> Float32:
        """Return (n, d) unit vectors of n captions."""

    def embed_images(self, images: Sequence[Image.Image], progress: Progress = iter) -> Float32:
        """Return (n, d) unit vectors of n RGB images.

        Raises:
            EncoderError: the encoder embeds no images.
        """


class SentenceTransformerEncoder:
    """An encoder that `sentence-transformers` loads; CLIP-like ones embed images, too.

    Prompts that the model defines for queries and documents are used. No code of a checkpoint is run. Several threads
    may share it: they take turns, because a tokenizer that pads serves one thread at a time.

    Args:
        name: a local folder or a hub id. Without the hub, its cache is used.
        device: "cpu", "cuda", ...
    Raises:
        EncoderUnavailable: the name does not load, or there is no hub. MissingExtra: sentence-transformers is missing.
    """

    def __init__(self, name: str, *, device: str = "cpu") -> None:
        without_hub = _loads_without_hub(name)
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtra(
                "an encoder in this process needs sentence-transformers: pip install 'llama-index-genret[train]'. "
                "To use a running server instead, give its address as the encoder (http://HOST/v1)."
            ) from error
        try:
            options = {"device": device, "trust_remote_code": False, "local_files_only": without_hub}
            self._model = SentenceTransformer(name, **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise EncoderUnavailable(
                f"{name!r} does not load as an encoder: {str(error).partition(chr(10))[0]} {_OTHER_ENCODERS}"
            ) from error
        self.name = name
        self._lock = threading.Lock()
        self.embeds_images = _reads_images(self._model)
        self.dimension = int(self._model.encode(["?"], show_progress_bar=False).shape[1])

    def embed_queries(self, texts: Sequence[str], progress: Progress = iter) -> Float32:
        """Return (n, d) unit vectors of n queries."""
        return self._embed(texts, self._model.encode_query, progress)

    def embed_captions(self, texts: Sequence[str], progress: Progress = iter) -> Float32:
        """Return (n, d) unit vectors of n captions."""
        return self._embed(texts, self._model.encode_document, progress)

    def embed_images(self, images: Sequence[Image.Image], progress: Progress = iter) -> Float32:
        """Return (n, d) unit vectors of n RGB images."""
        if not self.embeds_images:
            raise EncoderError(f"the encoder {self.name!r} embeds texts only. Choose a CLIP-like one for images.")
        parts = []
        for start in progress(range(0, len(images), TEXT_BATCH)):
            with self._lock:
                parts.append(self._model.encode(list(images[start : start + TEXT_BATCH]), show_progress_bar=False))
        if not parts:
            return np.zeros((0, self.dimension), np.float32)
        return checked_vectors(self.name, np.concatenate(parts), self.dimension)

    def _embed(self, texts: Sequence[str], encode: Callable[..., Any], progress: Progress) -> Float32:
        """Embed texts sorted by length, so that a batch needs little padding."""
        texts = [text.replace(", ", " ") for text in texts]  # encoders of sentences read lists better so
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        parts: list[Float32] = []
        for start in progress(range(0, len(texts), TEXT_BATCH)):
            chosen = [texts[place] for place in order[start : start + TEXT_BATCH]]
            with self._lock:
                parts.append(encode(chosen, show_progress_bar=False))
        if not parts:
            return np.zeros((0, self.dimension), np.float32)
        return checked_vectors(self.name, np.concatenate(parts)[np.argsort(order)], self.dimension)


def _loads_without_hub(name: str) -> bool:
    """Return whether an encoder loads from a folder or from the hub's cache, without requests to the hub.

    sentence-transformers takes ten seconds to import and retries requests for minutes, so this fails before that.

    Raises:
        EncoderUnavailable: the name is no folder, no hub responds, and its cache lacks the name.
    """
    if Path(name).is_dir():
        return True
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            httpx.head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
            return False
        except httpx.TransportError as error:
            reason = f"{constants.ENDPOINT} does not respond ({type(error).__name__})"
    hub_id = name if "/" in name else f"sentence-transformers/{name}"
    try:
        cached = any(isinstance(try_to_load_from_cache(hub_id, file), str) for file in ("modules.json", "config.json"))
    except HFValidationError:
        cached = False
    if not cached:
        raise EncoderUnavailable(
            f"the encoder {name!r} is no local folder, {reason}, and the cache of the hub ({constants.HF_HUB_CACHE}) "
            f"lacks it. {_OTHER_ENCODERS}"
        )
    return True


def _reads_images(model: Any) -> bool:
    """Return whether a SentenceTransformer embeds images into the space of its texts."""
    supports = getattr(model, "supports", None)
    if callable(supports):
        return bool(supports("image"))
    return type(model[0]).__name__ == "CLIPModel"


class EndpointEncoder:
    """An encoder behind an OpenAI-compatible `/v1/embeddings` address, such as a vLLM server of an embedding model.

    Args:
        api_base: the address, with or without `/embeddings`. `#model` at its end names the model, which the server's
            only one is otherwise.
        api_key: sent as a bearer token.
        timeout_s: seconds for one request.
    Raises:
        EncoderUnavailable: the server does not answer. EncoderError: it answers no vectors.
    """

    embeds_images = False

    def __init__(self, api_base: str, *, api_key: str = "EMPTY", timeout_s: float = 30.0) -> None:
        address, _, model = api_base.partition("#")
        self.name = api_base
        self._address = address.rstrip("/").removesuffix("/embeddings")
        headers = {"Authorization": f"Bearer {api_key}"}
        self._client = httpx.Client(headers=headers, timeout=timeout_s, follow_redirects=False)
        self._model = model or self._only_model()
        self.dimension = len(self._request(["?"])[0])

    def embed_queries(self, texts: Sequence[str], progress: Progress = iter) -> Float32:
        """Return (n, d) unit vectors of n queries."""
        return self.embed_captions(texts, progress)

    def embed_captions(self, texts: Sequence[str], progress: Progress = iter) -> Float32:
        """Return (n, d) unit vectors of n captions."""
        starts = progress(range(0, len(texts), TEXT_BATCH))
        parts = [vector for start in starts for vector in self._request(texts[start : start + TEXT_BATCH])]
        if not parts:
            return np.zeros((0, self.dimension), np.float32)
        return checked_vectors(self.name, np.array(parts, np.float32), self.dimension)

    def embed_images(self, images: Sequence[Image.Image], progress: Progress = iter) -> Float32:
        """Raise EncoderError: the protocol has no images."""
        raise EncoderError(f"the encoder {self.name!r} embeds texts only: /v1/embeddings takes no images.")

    def _only_model(self) -> str:
        listed = self._json("GET", "/models", None).get("data")
        names = [str(card.get("id")) for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
        if len(names) != 1:
            raise EncoderError(f"{self._address} serves the models {names}. Name one: {self._address}#MODEL")
        return names[0]

    def _request(self, texts: Sequence[str]) -> list[list[float]]:
        body = {"model": self._model, "input": list(texts), "encoding_format": "float"}
        rows = self._json("POST", "/embeddings", body).get("data")
        if not isinstance(rows, list) or len(rows) != len(texts):
            raise EncoderError(f"{self._address}/embeddings did not return a vector for each of {len(texts)} texts.")
        try:
            rows = sorted(rows, key=lambda row: int(row["index"]))
            return [[float(value) for value in row["embedding"]] for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise EncoderError(f"{self._address}/embeddings answered no vectors: {error!r}.") from error

    def _json(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        retrying = Retrying(
            retry=retry_if_exception_type(httpx.TransportError),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_exponential(0.1),
            reraise=True,
        )
        try:
            answer = retrying(self._client.request, method, self._address + path, json=body)
            answer.raise_for_status()
            found = answer.json()
        except httpx.HTTPError as error:
            raise EncoderUnavailable(
                f"the encoder at {self._address} does not answer: {type(error).__name__}: {error}. Start it, or name "
                "another encoder (--encoder)."
            ) from error
        except ValueError as error:
            raise EncoderError(f"{self._address}{path} did not answer JSON.") from error
        if not isinstance(found, dict):
            raise EncoderError(f"{self._address}{path} answered a {type(found).__name__}, expected a JSON object.")
        return found


class CallableEncoder:
    """An encoder that a Python function computes. Several threads may call the functions at once.

    Args:
        embed: texts -> (n, d) vectors of any length; they are scaled to unit length.
        name: stored in the index. An index made with it needs the same function to be given again.
        embed_queries: another function for queries, if they need another prefix.
        embed_images: the function for images, if there is one.
    """

    def __init__(
        self,
        embed: Callable[[Sequence[str]], Any],
        *,
        name: str = "callable",
        embed_queries: Callable[[Sequence[str]], Any] | None = None,
        embed_images: Callable[[Sequence[Image.Image]], Any] | None = None,
    ) -> None:
        self.name, self._captions, self._queries, self._images = name, embed, embed_queries or embed, embed_images
        self.embeds_images = embed_images is not None
        self.dimension = int(np.shape(embed(["?"]))[1])

    def embed_queries(self, texts: Sequence[str], progress: Progress = iter) -> Float32:
        """Return (n, d) unit vectors of n queries."""
        return checked_vectors(self.name, self._queries(list(texts)), self.dimension)

    def embed_captions(self, texts: Sequence[str], progress: Progress = iter) -> Float32:
        """Return (n, d) unit vectors of n captions."""
        return checked_vectors(self.name, self._captions(list(texts)), self.dimension)

    def embed_images(self, images: Sequence[Image.Image], progress: Progress = iter) -> Float32:
        """Return (n, d) unit vectors of n RGB images."""
        if self._images is None:
            raise EncoderError(f"the encoder {self.name!r} embeds texts only: give it embed_images=.")
        return checked_vectors(self.name, self._images(list(images)), self.dimension)


def load_encoder(name: str, *, device: str = "cpu", api_key: str = "EMPTY") -> Encoder:
    """Load the encoder of a name: an http(s) address, else a folder or hub id of sentence-transformers.

    Raises:
        EncoderUnavailable: it does not load or answer. MissingExtra: sentence-transformers is missing.
    """
    if name.startswith(("http://", "https://")):
        return EndpointEncoder(name, api_key=api_key)
    return SentenceTransformerEncoder(name, device=device)


def embed_by_captions(
    encoder: Encoder, captions: Sequence[Sequence[str]], progress: Progress = iter
) -> tuple[Float32, dict[str, Float32]]:
    """Return (n, d) unit vectors of images, and the (d,) vector of each distinct caption.

    The vector of an image is the sum of the mean of its captions' vectors and of the vector of all its captions as one
    text, scaled to unit length. An image without captions has the vector 0.

    Args:
        captions: those of every image.
    """
    flat = list(dict.fromkeys(caption for own in captions for caption in own))
    known = dict(zip(flat, encoder.embed_captions(flat, progress), strict=True))
    joined = iter(encoder.embed_captions([" ".join(own) for own in captions if own], progress))
    images = np.zeros((len(captions), encoder.dimension), np.float32)
    for row, own in enumerate(captions):
        if own:
            images[row] = unit(np.mean([known[caption] for caption in own], axis=0)) + next(joined)
    return unit(images), known


def unit(vectors: Any) -> Float32:
    """Return vectors (..., d) scaled to length 1; the zero vector stays 0."""
    vectors = np.asarray(vectors, np.float32)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12), np.float32)


def checked_vectors(name: str, vectors: Any, dimension: int) -> Float32:
    """Return vectors scaled to unit length.

    Raises:
        EncoderError: they have another dimension, or hold NaN or infinity.
    """
    found = np.asarray(vectors, np.float32)
    if found.ndim != 2 or found.shape[1] != dimension:
        raise EncoderError(f"the encoder {name!r} answered vectors of shape {found.shape}, expected (n, {dimension}).")
    if not np.isfinite(found).all():
        raise EncoderError(f"the encoder {name!r} answered NaN or infinity: its weights or its dtype are at fault.")
    return unit(found)
