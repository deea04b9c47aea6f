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
        scheme: a registered scheme. Image features come from the model's own vision tower. Caption features come from
            the text encoder in the scheme's option `encoder`.
        alphabet: "new" adds the scheme's symbols to the tokenizer and the model. "existing" uses tokens of the
            vocabulary, so that the adapter of the trained index fits the unmodified base model.
        overwrite: True allows replacing an index at `out`.
    Raises:
        IndexExists: `out` is not free.
        IdentifierError: the scheme is unknown, the tokenizer cannot spell its identifiers, or an image lacks the
            caption that its identifier is derived from.
        TrainingError: the encoder does not load.
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
    teacher: str | None = None,
    progress: Progress = iter,
) -> Index:
    """Assign identifiers with the frozen scheme of `index` and write the images into it: a search finds them at once.

    New symbols that the trained weights lack get rows predicted from captions or images (`store.new_symbol_rows`).
    The index then has other weights. An untrained index stores no rows, because training creates them.

    Args:
        mllm: the index's base model; required if `needs_features` returns True.
        teacher: a text encoder that `sentence-transformers` loads, which predicts rows from captions. If not given,
            the teacher of the training. Without one, or if it cannot be loaded (logged), rows come from the images.
    Raises:
        DuplicateImage: an image id is in the index already.
        IdentifierError: the tokenizer cannot spell an identifier, nothing is available to predict a symbol's row from,
            or an image lacks the caption that its identifier is derived from.
        TrainingError: `teacher` or the encoder of the scheme does not load.
        MissingExtra: sentence-transformers is missing.
    """
    new = assign_identifiers(index, records, mllm, progress=progress)
    new_rows = None
    if index.is_trained and new.tokenizer.fingerprint != index.tokenizer.fingerprint:
        new_rows = _new_rows(index, records, new, mllm, teacher, progress)
    elif teacher:
        log.warning("the teacher was not used: these images add no symbols that the trained weights lack.")
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
            f"the scheme {index.manifest.scheme!r} gives new images symbols of their own. Their rows are predicted "
            "with the base model's vision tower. Pass the model: mllm=load_base(index)."
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
        log.warning("rows of new images are predicted from the images, not from their captions: %s", error)
        return None


def needs_features(index: Index) -> bool:
    """Tell whether adding images needs the base model's vision tower: for identifiers, or for rows of new symbols."""
    return "features" in index.scheme().needs or (index.is_trained and bool(new_token_ids(index)))


def assign_identifiers(
    index: Index, records: Sequence[Record], mllm: Mllm | None = None, *, progress: Progress = iter
) -> NewIdentifiers:
    """Assign identifiers to new images of `index` with its frozen scheme. No identifier of the index changes.

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
            "derives identifiers from caption embeddings. Write captions, or create an index without encoder=."
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
