"""Build an index from a folder of images: read, encode, assign identifiers, store. The model is not trained yet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.corpus import Corpus, Record
from llama_index_genret.errors import IdentifierError, MissingExtra, TrainingError
from llama_index_genret.identifiers import Alphabet, Identifier, ImageFacts, Scheme, Spelling, get_scheme, spelling_of
from llama_index_genret.models.encoder import TextEncoder, embed_by_captions
from llama_index_genret.models.features import vision_features
from llama_index_genret.models.mllm import Mllm, Progress, render_prompts
from llama_index_genret.models.prompts import PromptSet
from llama_index_genret.models.tokenizer import IndexTokenizer
from llama_index_genret.store import Index, NewRows, add_images, check_free, create_index
from llama_index_genret.store.model_state import new_token_ids
from llama_index_genret.store.new_symbol_rows import guess_rows

log = logging.getLogger(__name__)


def build_index(
    corpus: Corpus,
    out: Path,
    mllm: Mllm,
    *,
    scheme: str = "structured",
    scheme_options: dict[str, Any] | None = None,
    alphabet: Alphabet = "new",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = iter,
) -> Index:
    """Assign identifiers to the images of `corpus` and write an index for `mllm`.

    Args:
        scheme: a registered scheme; one that needs features gets those of the model's own vision tower, one that needs
            those of captions those of the text encoder that its option `encoder` names.
        alphabet: "new" adds the scheme's symbols to the tokenizer and the model; "existing" takes words that they have,
            so that the adapter of the trained index fits the base model as it is.
        overwrite: whether an index at `out` may be replaced.
    Raises:
        IndexExists: `out` is not free. IdentifierError: no such scheme, the tokenizer cannot spell its identifiers, or
            an image lacks the caption that its identifier is derived from. TrainingError: the encoder does not load.
    """
    check_free(out, overwrite=overwrite)
    naming = get_scheme(scheme, **(scheme_options or {}))
    images = _facts(naming, corpus.records, mllm, progress)
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
        overwrite=overwrite,
    )


@dataclass(frozen=True)
class NewIdentifiers:
    """Identifiers of images that are not in an index yet, and what the index must store with them.

    identifiers: one an image, each symbol one token of `tokenizer`.
    scheme: grown; its `new_symbols` and `arrays` may hold more than those of the index.
    tokenizer: of the index, with the symbols that the scheme gained.
    """

    identifiers: list[Identifier]
    scheme: Scheme
    tokenizer: IndexTokenizer


def add_to_index(
    index: Index,
    records: Sequence[Record],
    mllm: Mllm | None = None,
    *,
    teacher: str | None = None,
    progress: Progress = iter,
) -> Index:
    """Assign identifiers by the frozen scheme of `index` and write the images into it: a search finds them at once.

    Where they bring symbols that the trained weights lack, rows are guessed from their captions or from the pictures
    (`new_rows`): the index has other weights then. An index that was not trained yet needs none: the training will
    give them.

    Args:
        mllm: the index's base model, where `needs_features`.
        teacher: a text encoder that `sentence-transformers` loads, by which captions tell of rows. If not given, that
            of the training; where there was none or it is not at hand, which is logged, the pictures tell.
    Raises:
        DuplicateImage: an image id is in the index already.
        IdentifierError: the tokenizer cannot spell an identifier, there is nothing to guess a symbol's row from, or an
            image lacks the caption that its identifier is derived from.
        TrainingError: `teacher` does not load, or the encoder of the scheme. MissingExtra: sentence-transformers is
            missing.
    """
    new = assign_identifiers(index, records, mllm, progress=progress)
    new_rows = None
    if index.is_trained and new.tokenizer.fingerprint != index.tokenizer.fingerprint:
        new_rows = _new_rows(index, records, new, mllm, teacher, progress)
    elif teacher:
        log.warning("the teacher was not asked: these images bring no symbols that trained weights lack.")
    return add_images(index, records, new.identifiers, new.scheme, tokenizer=new.tokenizer, new_rows=new_rows)


def _new_rows(
    index: Index,
    records: Sequence[Record],
    assigned: NewIdentifiers,
    mllm: Mllm | None,
    teacher: str | None,
    progress: Progress,
) -> NewRows:
    if mllm is None:
        raise IdentifierError(
            f"the scheme {index.manifest.scheme!r} gives new images symbols of their own; their rows are guessed from "
            "the pictures, by the base model's vision tower. Pass it as mllm: load_base(index)."
        )
    symbols = set(assigned.scheme.new_symbols()) - set(index.scheme().new_symbols())
    token_ids = sorted(map(assigned.tokenizer.symbol_id, symbols))
    identifiers = [tuple(map(assigned.tokenizer.symbol_id, symbols)) for symbols in assigned.identifiers]
    captioned = any(record.captions for record in records)
    encoder = _teacher(index, teacher, str(mllm.model.device)) if captioned else None
    return guess_rows(index, records, identifiers, token_ids, mllm, teacher=encoder, progress=progress)


def _teacher(index: Index, chosen: str | None, device: str) -> TextEncoder | None:
    name = chosen or (index.manifest.training or {}).get("teacher")
    if name is None:
        return None
    try:
        return TextEncoder(name, device=device)
    except (TrainingError, MissingExtra) as error:
        if chosen:
            raise
        log.warning("new images are placed by how they look, not by their captions: %s", error)
        return None


def needs_features(index: Index) -> bool:
    """Whether adding images takes the base model's vision tower: for their names, or for rows of their symbols."""
    return "features" in index.scheme().needs or (index.is_trained and bool(new_token_ids(index)))


def assign_identifiers(
    index: Index, records: Sequence[Record], mllm: Mllm | None = None, *, progress: Progress = iter
) -> NewIdentifiers:
    """Assign identifiers to images that join `index`, by its frozen scheme. No identifier of the index changes.

    Raises:
        IdentifierError: the tokenizer cannot spell an identifier, or see `add_to_index`.
    """
    scheme = index.scheme()
    in_use = spelling_of(scheme, index.tokenizer, index.manifest.alphabet).unspell(index.identifiers)
    identifiers = scheme.extend(_facts(scheme, records, mllm, progress), in_use)
    spelling = spelling_of(scheme, index.tokenizer, index.manifest.alphabet)
    spelled = _spell(spelling, identifiers, records, index.prompts)
    return NewIdentifiers(spelled, scheme, spelling.tokenizer)


def _facts(scheme: Scheme, records: Sequence[Record], mllm: Mllm | None, progress: Progress) -> ImageFacts:
    paths = [record.path for record in records]
    features = None
    if "features" in scheme.needs:
        features = vision_features(mllm, paths, progress) if mllm and paths else None
    elif "caption features" in scheme.needs and records:
        features = _caption_features(scheme.options()["encoder"], records, mllm, progress)
    return ImageFacts(len(records), features, tuple(tuple(record.captions) for record in records))


def _caption_features(
    encoder: str, records: Sequence[Record], mllm: Mllm | None, progress: Progress
) -> NDArray[np.float32]:
    bare = [record.image_id for record in records if not record.captions]
    if bare:
        raise IdentifierError(
            f"{len(bare)} of {len(records)} images have no caption, {bare[0]!r} the first, and the scheme "
            "derives identifiers from caption embeddings. Write captions, or make an index without encoder=."
        )
    reader = TextEncoder(encoder, device=str(mllm.model.device) if mllm else "cpu", progress=progress)
    return embed_by_captions(reader, [record.captions for record in records])[0]


def _spell(
    spelling: Spelling, identifiers: Sequence[Identifier], records: Sequence[Record], prompts: PromptSet
) -> list[Identifier]:
    spelled = spelling.spell(identifiers)
    prompt = prompts.retrieve.before + "?" + prompts.retrieve.after
    spelling.check(identifiers, spelled, [record.file_name for record in records], prompt)
    return spelled
