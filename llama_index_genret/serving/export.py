"""A checkpoint that plain vLLM serves: base model, trained weights merged in, tokenizer with the symbols."""

from __future__ import annotations

from llama_index_genret.models.mllm import Mllm  # isort: skip  # first: it names the extra that brings torch

from pathlib import Path

import torch

from llama_index_genret.errors import ModelError
from llama_index_genret.files import new_folder
from llama_index_genret.store import Index
from llama_index_genret.store.model_loading import load_trained

DTYPES = ("float32", "bfloat16")


def export_checkpoint(
    index: Index, out: Path, *, dtype: str = "float32", device: str = "cpu", mllm: Mllm | None = None
) -> Path:
    """Write the index's trained model as a Hugging Face folder, whole or not at all.

    Args:
        dtype: of the stored weights, "float32" or "bfloat16".
        mllm: the trained model, if it is loaded already.
    Raises:
        ModelError: `out` exists and is not empty, or there is no such dtype.
        NotTrained: the index has no trained weights.
        NotWritten: the disk is full, or read only; nothing is left there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists and is not empty: name a new folder, nothing is overwritten.")
    if dtype not in DTYPES:
        raise ModelError(f"dtype={dtype!r}: a checkpoint is written in one of {', '.join(DTYPES)}.")
    mllm = mllm or load_trained(index, device=device)
    with new_folder(out) as into:
        mllm.model.to(getattr(torch, dtype)).save_pretrained(into)
        mllm.processor.save_pretrained(into)
        (into / "tokenizer.json").write_text(index.tokenizer.to_json(), encoding="utf-8")
    return out
