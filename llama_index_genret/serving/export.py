"""Export a checkpoint that plain vLLM serves: base model with merged weights, and tokenizer with the symbols.

Depends on torch and the index; independent of vLLM.
"""

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
    """Write the index's trained model as a Hugging Face folder, atomically.

    Args:
        dtype: dtype of the stored weights, "float32" or "bfloat16".
        mllm: the trained model, if it is already loaded.
    Raises:
        ModelError: `out` exists and is not empty, or `dtype` is unknown.
        NotTrained: the index has no trained weights.
        NotWritten: the disk is full or read-only. No partial folder is left.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists and is not empty: choose a new folder. Nothing was overwritten.")
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; choose from: {', '.join(DTYPES)}.")
    mllm = mllm or load_trained(index, device=device)
    with new_folder(out) as into:
        mllm.model.to(getattr(torch, dtype)).save_pretrained(into)
        mllm.processor.save_pretrained(into)
        (into / "tokenizer.json").write_text(index.tokenizer.to_json(), encoding="utf-8")
    return out
