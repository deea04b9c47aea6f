"""From a folder of images to an index: read, encode, name, store. The model is not trained yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_index_genret.corpus import Corpus
from llama_index_genret.identifiers import get_scheme
from llama_index_genret.modeling import Mllm, Progress, render_prompts, vision_features
from llama_index_genret.store import Index, check_free, create_index


def build_index(
    corpus: Corpus,
    out: Path,
    mllm: Mllm,
    *,
    scheme: str = "structured",
    scheme_options: dict[str, Any] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = iter,
) -> Index:
    """Name the images of `corpus` and write an index for `mllm`.

    Args:
        scheme: a registered scheme; one that needs features gets those of the model's own vision tower.
        overwrite: whether an index at `out` may be replaced.
    Raises:
        IndexExists: `out` is not free. IdentifierError: no such scheme, or the tokenizer cannot spell its symbols.
    """
    check_free(out, overwrite=overwrite)
    naming = get_scheme(scheme, **(scheme_options or {}))
    paths = [record.path for record in corpus.records]
    features = vision_features(mllm, paths, progress) if naming.needs_features else None
    identifiers = naming.fit(len(corpus.records), features, seed=seed)
    symbols = naming.new_symbols()
    tokenizer = mllm.tokenizer
    return create_index(
        out,
        images=corpus.folder,
        records=corpus.records,
        identifiers=identifiers,
        scheme=naming,
        tokenizer=tokenizer.with_symbols(symbols) if symbols else tokenizer,
        model=mllm.entry(),
        prompts=render_prompts(mllm),
        overwrite=overwrite,
    )
