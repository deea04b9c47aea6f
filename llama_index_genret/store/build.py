"""Build an index from a folder of images: read, encode, assign identifiers, store. Training is a separate step.

Depends on the corpus, the schemes and the base model; independent of training.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.corpus import Corpus, Record
from llama_index_genret.errors import IdentifierError
from llama_index_genret.identifiers import Alphabet, Identifier, ImageFacts, Scheme, Spelling, get_scheme, spelling_of
from llama_index_genret.models.encoder import Encoder
from llama_index_genret.models.features import vision_features
from llama_index_genret.models.mllm import Mllm, Progress, render_prompts
from llama_index_genret.models.prompts import PromptSet
from llama_index_genret.models.tokenizer import IndexTokenizer
from llama_index_genret.store import Index, NewRows, add_images, check_free, create_index
from llama_index_genret.store.model_state import new_token_ids
from llama_index_genret.store.new_symbol_rows import guess_rows
from llama_index_genret.store.vectors import (
    MAX_FITTED,
    MIN_FITTED,
    EncoderEntry,
    embed_records,
    open_encoder,
    project_features,
)

log = logging.getLogger(__name__)


def build_index(
    corpus: Corpus,
    out: Path,
    mllm: Mllm,
    *,
    encoder: Encoder | None = None,
    scheme: str = "structured",
    scheme_options: dict[str, Any] | None = None,
    alphabet: Alphabet = "new",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = iter,
) -> Index:
    """Assign identifiers to the images of `corpus` and write an index for `mllm`.

    Args:
        encoder: gives every image a vector, so that the index recalls before any training. None for an index that
            recalls by the trained model alone.
        scheme: a registered scheme. `structured` derives codes from the vectors where there is an encoder, else from
            features of the model's own vision tower.
        alphabet: "new" adds the scheme's symbols to the tokenizer and the model. "existing" uses tokens of the
            vocabulary, so that the adapter of the trained index fits the unmodified base model.
        overwrite: True allows replacing an index at `out`.
    Raises:
        IndexExists: `out` is not free. IdentifierError: no such scheme, the tokenizer cannot spell its identifiers, or
            an image lacks the caption that its identifier is derived from. EncoderError: the encoder returns no
            finite vectors.
    """
    check_free(out, overwrite=overwrite)
    vectors = None if encoder is None else _vectors(encoder, corpus.records, mllm, None, progress)
    options = dict(scheme_options or {})
    if scheme == "structured" and vectors is not None and vectors.any(axis=1).all():
        options.setdefault("source", "vectors")
    naming = get_scheme(scheme, **options)
    images = _facts(naming, corpus.records, mllm, vectors, progress)
    identifiers = naming.fit(images, seed=seed)
    spelling = spelling_of(naming, mllm.tokenizer, alphabet)
    prompts = render_prompts(mllm)
    spelled = _spell(spelling, identifiers, corpus.records, prompts)
    return create_index(
        out,
        images=corpus.folder,
        records=corpus.records,
        identifiers=spelled,
        scheme=naming,
        tokenizer=spelling.tokenizer,
        model=mllm.entry(),
        prompts=prompts,
        alphabet=alphabet,
        encoder=None if encoder is None else EncoderEntry.of(encoder),
        vectors=vectors,
        overwrite=overwrite,
    )


@dataclass(frozen=True)
class NewIdentifiers:
    """Identifiers of images that are not in an index yet, with the scheme and tokenizer to store with them.

    identifiers: one per image; each symbol is one token of `tokenizer`.
    scheme: the extended scheme. Its `new_symbols` and `arrays` may hold more than the index's scheme.
    tokenizer: the index's tokenizer, with the symbols that the scheme gained.
    """

    identifiers: list[Identifier]
    scheme: Scheme
    tokenizer: IndexTokenizer


def add_to_index(
    index: Index,
    records: Sequence[Record],
    mllm: Mllm | None = None,
    *,
    encoder: Encoder | None = None,
    progress: Progress = iter,
) -> Index:
    """Assign identifiers with the frozen scheme of `index` and write the images into it: a search finds them at once.

    The encoder gives each image its vector. Symbols that the trained weights lack get rows that are predicted from the
    vectors, else from image features (`new_symbol_rows`); the index has other weights then.

    Args:
        mllm: the index's base model, where `needs_features`.
        encoder: that of the index, which is loaded if not given.
    Raises:
        DuplicateImage: an image id is in the index already.
        IdentifierError: the tokenizer cannot spell an identifier, there is nothing to predict a symbol's row from, or
            an image lacks the caption that its identifier is derived from.
        EncoderError: the encoder does not load, or is not that of the index. MissingExtra: sentence-transformers is
            missing.
    """
    vectors = None
    if records and index.manifest.encoder is not None:
        if encoder is None:
            encoder = open_encoder(index.manifest.encoder, device=str(mllm.model.device) if mllm else "cpu")
        else:
            index.manifest.encoder.check(encoder)
        vectors = _vectors(encoder, records, mllm, index, progress)
    elif index.manifest.encoder is not None:
        vectors = np.zeros((0, index.manifest.encoder.dimension), np.float32)
    new = assign_identifiers(index, records, mllm, vectors=vectors, progress=progress)
    new_rows = None
    if index.is_trained and new.tokenizer.fingerprint != index.tokenizer.fingerprint:
        new_rows = _new_rows(index, records, new, mllm, vectors, progress)
    return add_images(
        index, records, new.identifiers, new.scheme, tokenizer=new.tokenizer, vectors=vectors, new_rows=new_rows
    )


def _vectors(
    encoder: Encoder, records: Sequence[Record], mllm: Mllm | None, index: Index | None, progress: Progress
) -> NDArray[np.float32]:
    """Return (n, d) vectors of images that join an index, or that make a new one (index None).

    Images without captions are placed by a projection of their features, if the encoder embeds no images. The
    projection is fitted on the images with captions, of the index where they join one. Where there are too few, the
    vector stays 0, which is logged.
    """
    vectors = embed_records(encoder, records, progress)
    empty = np.flatnonzero(~vectors.any(axis=1))
    if not len(empty):
        return vectors
    if index is None or index.vectors is None:
        known, place_of = vectors, [record.path for record in records]
    else:
        known, place_of = np.asarray(index.vectors, np.float32), [record.path for record in index.records]
    fitted = np.flatnonzero(known.any(axis=1))[:MAX_FITTED]
    if mllm is None or len(fitted) < MIN_FITTED:
        log.warning(
            "%d images have no captions and the encoder %r embeds texts only: text queries do not find them before "
            "`genret train`. Give captions, or a CLIP-like --encoder.",
            len(empty),
            encoder.name,
        )
        return vectors
    of_known = vision_features(mllm, [place_of[row] for row in fitted], progress)
    features = np.zeros((len(records), of_known.shape[1]), np.float32)
    features[empty] = vision_features(mllm, [records[row].path for row in empty], progress)
    return project_features(vectors, features, known[fitted], of_known)


def _new_rows(
    index: Index,
    records: Sequence[Record],
    assigned: NewIdentifiers,
    mllm: Mllm | None,
    vectors: NDArray[np.float32] | None,
    progress: Progress,
) -> NewRows:
    if mllm is None:
        raise IdentifierError(
            f"the scheme {index.manifest.scheme!r} gives new images symbols of their own, whose rows are predicted "
            "with the base model. Pass it as mllm: load_base(index)."
        )
    symbols = set(assigned.scheme.new_symbols()) - set(index.scheme().new_symbols())
    token_ids = sorted(map(assigned.tokenizer.symbol_id, symbols))
    identifiers = [tuple(map(assigned.tokenizer.symbol_id, symbols)) for symbols in assigned.identifiers]
    return guess_rows(index, records, identifiers, token_ids, mllm, vectors=vectors, progress=progress)


def needs_features(index: Index) -> bool:
    """Tell whether adding images needs the base model's vision tower: for identifiers, or for rows of new symbols."""
    return "features" in index.scheme().needs or (index.is_trained and bool(new_token_ids(index)))


def assign_identifiers(
    index: Index,
    records: Sequence[Record],
    mllm: Mllm | None = None,
    *,
    vectors: NDArray[np.float32] | None = None,
    progress: Progress = iter,
) -> NewIdentifiers:
    """Assign identifiers to new images of `index` with its frozen scheme. No identifier of the index changes.

    Args:
        vectors: (n, d) vectors of the images, if the index has an encoder.
    Raises:
        IdentifierError: the tokenizer cannot spell an identifier, or see `add_to_index`.
    """
    scheme = index.scheme()
    in_use = spelling_of(scheme, index.tokenizer, index.manifest.alphabet).unspell(index.identifiers)
    identifiers = scheme.extend(_facts(scheme, records, mllm, vectors, progress), in_use)
    spelling = spelling_of(scheme, index.tokenizer, index.manifest.alphabet)
    spelled = _spell(spelling, identifiers, records, index.prompts)
    return NewIdentifiers(spelled, scheme, spelling.tokenizer)


def _facts(
    scheme: Scheme,
    records: Sequence[Record],
    mllm: Mllm | None,
    vectors: NDArray[np.float32] | None,
    progress: Progress,
) -> ImageFacts:
    features = vectors
    if "vectors" in scheme.needs:
        _check_placed(records, vectors)
    elif "features" in scheme.needs:
        features = vision_features(mllm, [record.path for record in records], progress) if mllm and records else None
    return ImageFacts(len(records), features, tuple(tuple(record.captions) for record in records))


def _check_placed(records: Sequence[Record], vectors: NDArray[np.float32] | None) -> None:
    if vectors is None:
        raise IdentifierError(
            "the scheme derives identifiers from vectors of an encoder, and there is none: create the index with one "
            "(`genret index --encoder`), or with --scheme-option source=features."
        )
    bare = [record.image_id for record, vector in zip(records, vectors, strict=True) if not vector.any()]
    if bare:
        raise IdentifierError(
            f"{len(bare)} of {len(records)} images have no vector, {bare[0]!r} the first: they have no captions, and "
            "the encoder embeds no images. Write captions, or choose --scheme-option source=features."
        )


def _spell(
    spelling: Spelling, identifiers: Sequence[Identifier], records: Sequence[Record], prompts: PromptSet
) -> list[Identifier]:
    spelled = spelling.spell(identifiers)
    prompt = prompts.retrieve.before + "?" + prompts.retrieve.after
    spelling.check(identifiers, spelled, [record.file_name for record in records], prompt)
    return spelled
