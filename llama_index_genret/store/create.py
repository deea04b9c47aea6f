"""Write a new, untrained index: records, identifiers, trie, tokenizer and codebooks in one commit.

Depends on files and numpy; independent of models. `store.build.build_index` makes the identifiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from llama_index_genret.corpus import Record
from llama_index_genret.errors import NotWritten
from llama_index_genret.files import make_folder, writing
from llama_index_genret.identifiers import Alphabet, Identifier, Scheme
from llama_index_genret.models.identity import ModelEntry
from llama_index_genret.models.prompts import PromptSet
from llama_index_genret.models.tokenizer import IndexTokenizer
from llama_index_genret.store.index import Index
from llama_index_genret.store.manifest import FORMAT_VERSION, Manifest, check_free, commit, only_writer_of
from llama_index_genret.store.open import load_index
from llama_index_genret.store.records import write_records
from llama_index_genret.store.vectors import EncoderEntry, write_vectors
from llama_index_genret.trie import build_trie, close_beginnings, save_trie


def create_index(
    folder: Path,
    *,
    images: Path,
    records: Sequence[Record],
    identifiers: Sequence[Identifier],
    scheme: Scheme,
    tokenizer: IndexTokenizer,
    model: ModelEntry,
    prompts: PromptSet,
    alphabet: Alphabet = "new",
    encoder: EncoderEntry | None = None,
    vectors: NDArray[np.floating] | None = None,
    overwrite: bool = False,
) -> Index:
    """Write a new, untrained index.

    Args:
        identifiers: the output of `Spelling.spell`; each symbol is one token.
        tokenizer: includes the scheme's symbols if the alphabet is "new".
        encoder: identity of the encoder that computed the vectors. None for an index without vectors.
        vectors: (records, d) unit vectors.
        overwrite: True allows replacing an index in `folder`, its trained weights included.
    Raises:
        IndexExists: `folder` already holds an index or other files.
        IndexBusy: another process is writing the index.
        NotWritten: the disk is full or read-only.
        IdentifierError: identifiers are not unique, or a symbol is not one token.
        EncoderError: a vector is not finite.
    """
    check_free(folder, overwrite=overwrite)
    token_ids = [[tokenizer.symbol_id(symbol) for symbol in identifier] for identifier in identifiers]
    end = tokenizer.encode_markup(prompts.end)[0]
    trie, order = build_trie(close_beginnings(token_ids, end))

    def write(into: Path) -> None:
        write_records(into, records, identifiers, [0] * len(records))
        (into / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        save_trie(trie, into / "trie.bin")
        np.save(into / "leaf_to_record.npy", order)
        if vectors is not None:
            write_vectors(into, vectors)
        if scheme.arrays():
            save_file(dict(scheme.arrays()), into / "codebooks.safetensors")

    manifest = Manifest(
        format_version=FORMAT_VERSION,
        folders=[str(images.resolve())],
        scheme=scheme.name,
        scheme_options=scheme.options(),
        alphabet=alphabet,
        model=model,
        tokenizer=tokenizer.fingerprint,
        prompts=prompts,
        encoder=encoder if vectors is not None else None,
        files={},
    )
    with writing(folder):
        make_folder(folder)
    try:
        with only_writer_of(folder):
            check_free(folder, overwrite=overwrite)
            commit(folder, manifest, write, keep=lambda name: False)
    except NotWritten:
        with suppress(OSError):  # the folder holds images or an older index
            folder.rmdir()
        raise
    return load_index(folder)
