"""A checkpoint that plain vLLM serves: base model, trained weights merged in, tokenizer with the symbols."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import torch

from llama_index_genret.errors import ModelError
from llama_index_genret.modeling import Mllm, load_trained
from llama_index_genret.store import Index


def export_checkpoint(
    index: Index, out: Path, *, dtype: str = "float32", device: str = "cpu", mllm: Mllm | None = None
) -> Path:
    """Write the index's trained model as a Hugging Face folder, whole or not at all.

    Args:
        dtype: of the stored weights, "float32" or "bfloat16".
        mllm: the trained model, if it is loaded already.
    Raises:
        ModelError: `out` exists and is not empty. NotTrained: the index has no trained weights.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists and is not empty: name a new folder, nothing is overwritten.")
    mllm = mllm or load_trained(index, device=device)
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    try:
        mllm.model.to(getattr(torch, dtype)).save_pretrained(temporary)
        mllm.processor.save_pretrained(temporary)
        (temporary / "tokenizer.json").write_text(index.tokenizer.to_json(), encoding="utf-8")
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out
