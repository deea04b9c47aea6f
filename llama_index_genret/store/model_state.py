"""Query the state that an index adds to its base model: tokens, adapter, update, rows, and images trained on.

Depends on the index and its files; independent of torch. `store.model_loading` loads this state into the model.
"""

from __future__ import annotations

from pathlib import Path

from llama_index_genret.errors import ModelMismatch
from llama_index_genret.models.tokenizer import IndexTokenizer
from llama_index_genret.store.index import Index
from llama_index_genret.store.weights import ADAPTER, IMAGES, NEW_ROWS, UPDATE, NewRows, image_key, read_images


def check_tokenizer(index: Index, tokenizer: IndexTokenizer, where: str) -> None:
    """Raise ModelMismatch unless `tokenizer` is the base tokenizer that the index was created with."""
    model = index.manifest.model
    if tokenizer.fingerprint != model.base_tokenizer:
        raise ModelMismatch(
            f"the tokenizer of {where} (sha256 {tokenizer.fingerprint[:12]}) is not the one that {index.folder} was "
            f"created with ({model.name_or_path}, sha256 {model.base_tokenizer[:12]}). "
            "Load the index with its own model, or create it again with `genret index`."
        )


def new_token_ids(index: Index) -> list[int]:
    """Return the ids of the trainable tokens that the index adds to the base model's vocabulary, ascending."""
    if index.manifest.alphabet == "existing":
        return []
    return sorted(index.tokenizer.symbol_id(symbol) for symbol in index.scheme().new_symbols())


def has_update(index: Index) -> bool:
    """Tell whether the index has an update on top of the trained weights."""
    return any(name.startswith(UPDATE) for name in index.manifest.files)


def unseen_rows(index: Index, *, update: bool = True) -> list[int] | None:
    """Return the rows of records that were not trained under their identifiers, or None if that is not known.

    Args:
        update: True counts images of the update as trained.
    """
    name = f"{UPDATE if update and has_update(index) else ADAPTER}{IMAGES}"
    if name not in index.manifest.files:
        return None
    seen, pairs = read_images(index.file(name)), zip(index.records, index.identifiers, strict=True)
    return [row for row, (record, identifier) in enumerate(pairs) if image_key(record, identifier) not in seen]


def stored_new_rows(index: Index) -> NewRows | None:
    """Return the rows of symbols that were added after the training, or None without any."""
    return NewRows.load(index.file(NEW_ROWS)) if NEW_ROWS in index.manifest.files else None


def adapter_folder(index: Index) -> Path:
    """Verify the files of the trained weights without the update, and return their folder."""
    return _verified_folder(index, ADAPTER)


def update_folder(index: Index) -> Path:
    """Verify the files of the update, and return their folder."""
    return _verified_folder(index, UPDATE)


def _verified_folder(index: Index, prefix: str) -> Path:
    return [index.file(name) for name in index.manifest.files if name.startswith(prefix)].pop().parent
