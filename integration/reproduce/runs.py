"""One scheme under one protocol: index -> train -> add -> recall. Each step leaves a file, and is not done twice.

    index/                      the package's own folder. A killed training resumes from its last checkpoint
    trained.json                the weights, and a record that no held-out image was trained on
    added.json                  how many images joined afterwards, or the reason why they could not
    hits-POOL-VERSION.jsonl     the ranked images of every query, of one version of the index

Depends on the package's steps; independent of tables and of published figures.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from integration.reproduce.karpathy import Karpathy
from integration.reproduce.protocols import Plan, check_no_leak
from llama_index_genret.corpus import Corpus
from llama_index_genret.errors import TrainingError
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.serving.batch import open_batch
from llama_index_genret.store import Index, load_index
from llama_index_genret.store.build import add_to_index, build_index, needs_features
from llama_index_genret.store.model_loading import load_base, load_trained
from llama_index_genret.store.model_state import has_update
from llama_index_genret.store.weights import ADAPTER, MODEL
from llama_index_genret.training.recipe import TrainOptions, train

DEPTH = 10
"""Number of ranked images of a query, and so of MRR@10."""

Pool = Literal["split", "full"]
POOLS: tuple[Pool, ...] = ("split", "full")
"""The searched images: those of the evaluated split (1k, 5k), or the whole dataset (31k, 123k)."""


@dataclass(frozen=True)
class Ranked:
    """The ranked image ids of every query, in their order.

    failed: queries that were refused, or whose images could not be added. They have no results and count as misses.
    note: facts about the index that a reader of the table needs.
    """

    ids: tuple[tuple[str, ...], ...]
    failed: int = 0
    note: str = ""


@dataclass(frozen=True)
class Run:
    """The inputs of one scheme under one protocol. split: the evaluated one, by the records' metadata."""

    folder: Path
    dataset: Karpathy
    images: Path
    scheme: str
    plan: Plan
    split: str
    model: str
    scheme_options: Mapping[str, Any]
    train_options: TrainOptions
    device: str = "auto"
    batch_size: int = 32

    @property
    def index_dir(self) -> Path:
        """Return the folder of the package's index."""
        return self.folder / "index"

    def build(self) -> Index:
        """Return the index of the images that are trained on. An existing one is reused."""
        if self.index_dir.exists():
            return load_index(self.index_dir)
        mllm = load_mllm(self.model, device=self.device)
        options = dict(self.scheme_options)
        built = build_index(
            Corpus(self.images, self.plan.trained),
            self.index_dir,
            mllm,
            scheme=self.scheme,
            scheme_options=options,
            progress=bar("Encoding"),
        )
        del mllm
        _free()
        return built

    def train(self) -> Index:
        """Return the trained index. Before its training it is checked for held-out captions and later images.

        Raises:
            TrainingError: the index has one of these, or differs from the plan's.
        """
        index = self.build()
        if self._done("trained.json"):
            return index
        if [record.image_id for record in index.records] != [record.image_id for record in self.plan.trained]:
            raise TrainingError(f"{index.folder} does not hold the images that the protocol trains on: remove it.")
        check_no_leak(index, self.dataset, self.plan)
        if not index.is_trained:
            index = train(index, self.train_options, device=self.device)
            _free()
        late = {record.image_id for record in self.plan.added}
        self._write(
            "trained.json",
            adapter=_adapter(index),
            images=len(index.records),
            added_later=len(late),
            training=index.manifest.training,
        )
        return index

    def add(self) -> Index:
        """Return the index with the images that join after the training, none of them trained."""
        index = self.train()
        if not self.plan.added or self._done("added.json"):
            return index
        missing = [record for record in self.plan.added if record.image_id not in index.rows_by_id]
        if missing:
            mllm = load_base(index, device=self.device) if needs_features(index) else None
            index = add_to_index(index, missing, mllm, progress=bar("Encoding"))
            del mllm
            _free()
        self._write("added.json", images=len(self.plan.added))
        return index

    def recall(self, queries: Sequence[tuple[str, str]]) -> dict[Pool, Ranked]:
        """Return for each pool the ranked images of every query (text, image id). After a kill it resumes.

        Raises:
            TrainingError: the weights are not those of trained.json, which were trained without the added images.
        """
        index = self.add()
        if has_update(index) or _adapter(index) != json.loads((self.folder / "trained.json").read_text())["adapter"]:
            raise TrainingError(f"{index.folder} was trained again after its images were added: remove {self.folder}.")
        query_file = self.folder / "queries.jsonl"
        query_file.write_text("".join(json.dumps({"query": text, "image_id": name}) + "\n" for text, name in queries))
        files = {pool: self.folder / f"hits-{pool}-{index.version}.jsonl" for pool in POOLS}
        if not all(file.exists() for file in files.values()):
            scorer = TransformersScorer(load_trained(index, device=self.device))
            for pool, file in files.items():
                if not file.exists():
                    self._ask(index, scorer, query_file, pool, file)
            del scorer
            _free()
        return {pool: read_hits(file) for pool, file in files.items()}

    def _ask(self, index: Index, scorer: Any, query_file: Path, pool: Pool, out: Path) -> None:
        filters = {"split": self.split} if pool == "split" else None
        with (
            open_batch(
                index, query_file, out, k=DEPTH, filters=filters, scored_by="transformers", overwrite=True
            ) as run,
            tqdm(total=run.total, desc=f"Recalling, {pool} pool", unit="query") as progress,
        ):
            run.finish(scorer, batch_size=self.batch_size, progress=lambda done: progress.update(done - progress.n))

    def _done(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _write(self, name: str, **facts: Any) -> None:
        write_whole(self.folder / name, json.dumps(facts, indent=1))


def read_hits(path: Path) -> Ranked:
    """Return the ranked ids of a finished file of hits. A query with an error has none."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    ids = tuple(tuple(hit["image_id"] for hit in row.get("hits", ())) for row in rows)
    return Ranked(ids, sum("error" in row for row in rows))


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def bar(label: str) -> Any:
    """Return a progress bar on stderr, in the form that the package's steps take."""

    def progress(items: Iterable[Any]) -> Iterable[Any]:
        return tqdm(items, desc=label)

    return progress


def _adapter(index: Index) -> str:
    """Return the checksum of the trained weights. Rows of symbols that join later are stored separately."""
    return index.manifest.files[f"{ADAPTER}{MODEL}"].sha256


def _free() -> None:
    """Free the GPU memory of models that went out of scope, before the next is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
