"""The vectors of an index's images in the space of its encoder: how they are made, stored and checked.

Depends on records, the encoder and, for images without captions, the base model's vision tower; independent of tries
and scorers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from llama_index_genret.corpus import Record
from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import EncoderError, IndexDamaged
from llama_index_genret.models.encoder import Encoder, Float32, Progress, embed_by_captions, load_encoder, unit
from llama_index_genret.models.ridge import RowRegression

VECTORS = "vectors.npy"
"""(records, d) float16 unit vectors in the order of the records; 0 for an image of which nothing is known."""

MIN_FITTED = 8
"""Images with captions that a projection of image features needs at least."""

MAX_FITTED = 2048
"""Images that it is fitted on at most."""

_PROBE = "a photo of a dog"
_PROBED = 8
_TOLERANCE = 0.02


class EncoderEntry(BaseModel):
    """The encoder of an index: what loads it, and how it is recognised.

    name: a folder, a hub id or an address. probe: the first components of the vector of a fixed text.
    embeds_images: whether images without captions got their vectors from the encoder, not from a projection.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    dimension: int = Field(ge=1)
    probe: tuple[float, ...]
    embeds_images: bool = False

    @classmethod
    def of(cls, encoder: Encoder) -> EncoderEntry:
        """Return the entry of a loaded encoder; a folder by its whole path, so that any other folder finds it."""
        name = str(Path(encoder.name).resolve()) if Path(encoder.name).is_dir() else encoder.name
        probe, reads = _probe(encoder), encoder.embeds_images
        return cls(name=name, dimension=encoder.dimension, probe=probe, embeds_images=reads)

    def check(self, encoder: Encoder) -> None:
        """Raise EncoderError unless `encoder` has the space of this entry; the message names both."""
        if encoder.dimension == self.dimension and np.allclose(_probe(encoder), self.probe, atol=_TOLERANCE):
            return
        raise EncoderError(
            f"the index was made with the encoder {self.name!r} ({self.dimension} dimensions), and {encoder.name!r} "
            f"({encoder.dimension} dimensions) is another. Give the same one, or make the index anew."
        )


@dataclass(frozen=True)
class VectorSources:
    """Numbers of images by the source of their vector.

    captions: the mean of the captions' vectors. images: the encoder itself, which embeds images. projected: a
    regression from features of the base model's vision tower. missing: none, so that no text query finds the image
    before `genret train`.
    """

    captions: int
    images: int
    projected: int
    missing: int

    @classmethod
    def of(cls, entry: EncoderEntry, records: Sequence[Record], vectors: NDArray[Any]) -> VectorSources:
        """Count the sources of the (records, d) vectors of an index."""
        bare = [row for row, record in enumerate(records) if not record.captions]
        known = int(vectors[bare].any(axis=1).sum()) if bare else 0
        images, projected = (known, 0) if entry.embeds_images else (0, known)
        return cls(len(records) - len(bare), images, projected, len(bare) - known)


def _probe(encoder: Encoder) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in encoder.embed_captions([_PROBE])[0, :_PROBED])


def open_encoder(
    entry: EncoderEntry, *, name: str | None = None, device: str = "cpu", api_key: str = "EMPTY"
) -> Encoder:
    """Load the encoder of an index.

    Args:
        name: another place of the same encoder, if it has moved.
    Raises:
        EncoderUnavailable: it does not load or answer. EncoderError: it is another one. MissingExtra:
            sentence-transformers is missing.
    """
    encoder = load_encoder(name or entry.name, device=device, api_key=api_key)
    entry.check(encoder)
    return encoder


def resolve_encoder(
    entry: EncoderEntry | None, chosen: Encoder | str | None = None, *, device: str = "cpu"
) -> Encoder | None:
    """Return the encoder of an index: the given one, checked, or loaded by its name. None for an index without.

    Args:
        chosen: a loaded encoder, or another place of the index's encoder.
    Raises:
        EncoderUnavailable, EncoderError, MissingExtra: see `open_encoder`.
    """
    if entry is None:
        return None
    if chosen is None or isinstance(chosen, str):
        return open_encoder(entry, name=chosen, device=device)
    entry.check(chosen)
    return chosen


def embed_records(encoder: Encoder, records: Sequence[Record], progress: Progress = iter) -> Float32:
    """Return (n, d) unit vectors of images: from their captions, else from the images if the encoder embeds them.

    An image without captions has the vector 0 if the encoder embeds texts only; see `project_features`.
    """
    vectors, _ = embed_by_captions(encoder, [record.captions for record in records], progress)
    bare = [row for row, record in enumerate(records) if not record.captions]
    if bare and encoder.embeds_images:
        vectors[bare] = encoder.embed_images([load_image(records[row].path) for row in bare], progress)
    return vectors


def project_features(vectors: Float32, features: Float32, known: Float32, known_features: Float32) -> Float32:
    """Return vectors whose rows of 0 are predicted from image features, by ridge regression on other images.

    Args:
        vectors: (n, d), features: (n, v) of the same images.
        known: (m, d) unit vectors, known_features: (m, v): the images that the regression is fitted on.
    """
    empty = ~vectors.any(axis=1)
    filled = vectors.copy()
    filled[empty] = unit(RowRegression.fit(known_features, known).predict(features[empty]))
    return filled


def write_vectors(into: Path, vectors: NDArray[Any]) -> None:
    """Write unit vectors as float16.

    Raises:
        EncoderError: one of them is not finite.
    """
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise EncoderError(f"the vector of image {row} is not finite: the encoder is at fault. Nothing was stored.")
    np.save(into / VECTORS, np.asarray(vectors, np.float16))


def read_vectors(path: Path, n_records: int, dimension: int) -> NDArray[np.float16]:
    """Return the stored vectors, memory-mapped.

    Raises:
        IndexDamaged: another shape or type than the index says, or a value that is not finite.
    """
    try:
        vectors: NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise IndexDamaged(f"{path} is damaged: {error}. Restore it, or make the index anew.") from error
    if vectors.shape != (n_records, dimension) or vectors.dtype != np.float16:
        raise IndexDamaged(
            f"{path} holds {vectors.dtype} {vectors.shape}, expected float16 ({n_records}, {dimension}). Restore it, "
            "or make the index anew."
        )
    if not all(np.isfinite(vectors[start : start + 65_536]).all() for start in range(0, n_records, 65_536)):
        raise IndexDamaged(f"{path} holds values that are not finite. Restore it, or make the index anew.")
    return vectors
