"""Load the base model of an index, or the model with its trained weights merged in.

Model and tokenizer are checked against the fingerprints of the index. Depends on torch and transformers; independent
of training. It is imported on first use.
"""

from __future__ import annotations

from llama_index_genret.models.mllm import Mllm, fingerprint, load_mllm  # isort: skip  # first: it names the extra that brings torch

from typing import Any

import torch
from tokenizers import Tokenizer

from llama_index_genret.errors import ModelMismatch, NotTrained
from llama_index_genret.store import Index
from llama_index_genret.store.model_state import (
    adapter_folder,
    check_tokenizer,
    has_update,
    stored_new_rows,
    update_folder,
)


def load_trained(
    index: Index, *, device: str = "auto", dtype: str = "auto", base: str | None = None, update: bool = True
) -> Mllm:
    """Return the index's model with its trained weights merged in.

    Args:
        base: another location of the same base model, if it has moved.
        update: True merges the index's update, if it has one.
    Raises:
        NotTrained: the index has no trained weights.
        ModelMismatch: `base` is another model or tokenizer.
    """
    if not index.is_trained:
        raise NotTrained(f"{index.folder} has no trained weights yet: run `genret train {index.folder}`.")
    from peft import PeftModel

    mllm = load_base(index, device=device, dtype=dtype, base=base)
    _set_new_rows(mllm.model, index)
    merged = PeftModel.from_pretrained(mllm.model, adapter_folder(index)).merge_and_unload()
    if update and has_update(index):
        merged = PeftModel.from_pretrained(merged, update_folder(index)).merge_and_unload()
    return Mllm(mllm.name_or_path, merged.eval(), mllm.processor)


@torch.no_grad()
def _set_new_rows(model: Any, index: Index) -> None:
    """Set the rows of new symbols, in place. An adapter merged later replaces the rows of symbols it was trained on."""
    new = stored_new_rows(index)
    if new is None:
        return
    for name, module in model.named_modules():
        rows = new.rows.get(name.rpartition(".")[2])
        if rows is not None:
            module.weight[torch.from_numpy(new.token_ids)] = torch.from_numpy(rows).to(module.weight)


def load_base(index: Index, *, device: str = "auto", dtype: str = "auto", base: str | None = None) -> Mllm:
    """Return the index's base model, with embeddings resized for the index's symbols.

    Raises:
        ModelMismatch: the weights or the tokenizer differ from those of the index.
    """
    where = base or index.manifest.model.name_or_path
    mllm = load_mllm(where, device=device, dtype=dtype)
    check_tokenizer(index, mllm.tokenizer, where)
    found = fingerprint(mllm.model)
    if found != index.manifest.model.fingerprint:
        raise ModelMismatch(
            f"the weights of {where} (fingerprint {found[:12]}) differ from those that {index.folder} was created with "
            f"({index.manifest.model.name_or_path}, {index.manifest.model.fingerprint[:12]}). Pass the right model."
        )
    rows = mllm.model.get_input_embeddings().weight.shape[0]
    if index.tokenizer.vocab_size > rows:
        mllm.model.resize_token_embeddings(index.tokenizer.vocab_size, mean_resizing=False)
    mllm.processor.tokenizer._tokenizer = Tokenizer.from_str(index.tokenizer.to_json())
    return mllm
