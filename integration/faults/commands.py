"""The commands that change an index, on a tiny random model, and the content of a folder before and after them.

Each command runs in a forked process: models are loaded once, and a killed process leaves nothing in memory.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from integration.faults.syscalls import wait_for_child
from llama_index_genret import cli
from llama_index_genret.errors import GenretError
from llama_index_genret.models import mllm
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.serving.batch import open_batch
from llama_index_genret.store import load_index, model_loading
from llama_index_genret.store.manifest import MANIFEST
from llama_index_genret.store.model_state import has_update, stored_new_rows, unseen_rows
from llama_index_genret.training import checkpoints  # noqa: F401  # loads the Trainer before a process is forked
from llama_index_genret.training.pseudo_queries import WriteOptions, WriterReply, open_writing
from llama_index_genret.training.recipe import TrainOptions, train
from tests.conftest import draw_pictures
from tests.tiny_model import make_tiny_model

OPTIONS = TrainOptions(max_steps=4, batch_size=2, lora_rank=2, checkpoint_every=2)
State = dict[str, Any]

LOADING = (mllm, model_loading)
"""Modules through which commands load a model."""


@dataclass(frozen=True)
class Command:
    """A command under test.

    before: name of the folder that it starts from, or None. run: takes the folder that holds `index` and `out`.
    anew: True if it rebuilds the index from its images, whatever others did to the old one until then.
    """

    name: str
    before: str | None
    run: Callable[[Path], None]
    rebuilds: bool = False


class Workshop:
    """A model, images, the folders that commands start from, and the folder that they work in."""

    def __init__(self, root: Path) -> None:
        self.root, self.place = root, root / "place"
        self.pictures = draw_pictures(root / "pictures")
        self.more = draw_pictures(root / "more")
        metadata = self.more / "metadata.jsonl"
        first = metadata.read_text().splitlines()[0].replace("red-circle", "another")
        (self.more / "red-circle.png").rename(self.more / "another.png")
        metadata.write_text(first + "\n")
        self.queries = root / "queries.jsonl"
        self.queries.write_text("".join(f'{{"query": "picture {n}"}}\n' for n in range(9)))
        self.model = make_tiny_model(root / "model")
        loaded = mllm.load_mllm(str(self.model), device="cpu")
        for module in LOADING:
            module.load_mllm = lambda *_, **__: loaded  # each process has its own copy
        self._bases = {None: root / "nothing"}
        (root / "nothing").mkdir()

    @cached_property
    def commands(self) -> dict[str, Command]:
        """Return all commands by name."""
        new = ("index", str(self.pictures), "--model", str(self.model), "--encoder", "none", "--device", "cpu", "--out")
        found = [
            Command("index", None, lambda at: genret(*new, at / "index")),
            Command("index --overwrite", "tuned", lambda at: genret(*new, at / "index", "--overwrite"), rebuilds=True),
            Command("train", "untrained", _train),
            Command("train --update", "grown", lambda at: _train(at, update=True)),
            Command("train --drop-update", "updated", lambda at: genret("train", at / "index", "--drop-update")),
            Command("add", "tuned", lambda at: genret("add", at / "index", self.more, "--device", "cpu")),
            Command("remove", "tuned", lambda at: genret("remove", at / "index", "red-bar", "red-frame", "blue-bar")),
            Command("tune", "trained", lambda at: genret("tune", at / "index", "--device", "cpu")),
            Command("write-queries", "untrained", _write_queries),
            Command("export", "trained", lambda at: genret("export", at / "index", "--out", at / "out")),
            Command("batch", "untrained", self._batch),
        ]
        return {command.name: command for command in found}

    def lay(self, command: Command) -> None:
        """Copy the folder that a command starts from to its place."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self._base(command.before), self.place)

    def _base(self, name: str | None) -> Path:
        if name not in self._bases:
            made_by = {
                "untrained": ("index",),
                "trained": ("train",),
                "tuned": ("tune",),
                "grown": ("add",),
                "updated": ("train --update",),
            }[name]
            for step in made_by:
                command = self.commands[step]
                self.lay(command)
                status, said = wait_for_child(lambda command=command: command.run(self.place))
                assert status == 0, said
            self._bases[name] = self.root / name
            self.place.rename(self._bases[name])
        return self._bases[name]

    def _batch(self, at: Path) -> None:
        _or_exit(lambda: _answered(at, self.queries))


def genret(*arguments: object) -> None:
    """Run the command line, which exits the process."""
    sys.argv = ["genret", *map(str, arguments)]
    cli.main()


def _or_exit(work: Callable[[], Any]) -> None:
    """Run the work, and exit with an error as `cli.main` does."""
    try:
        work()
    except GenretError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


def _train(at: Path, *, update: bool = False) -> None:
    index = at / "index"
    _or_exit(lambda: train(load_index(index), OPTIONS, update=update, device="cpu", show_progress=False))


class Writer:
    """A writer whose text depends on the seed alone."""

    model, fingerprint = "says what its seed tells", None

    def write(self, requests: Sequence[Any], sampling: Any) -> list[list[WriterReply]]:
        return [[WriterReply(f"picture {r.seed % 997} {place}", True) for place in range(sampling.n)] for r in requests]


def _write_queries(at: Path) -> None:
    def write() -> None:
        with open_writing(load_index(at / "index"), WriteOptions(per_image=3)) as run:
            run.finish(Writer)

    _or_exit(write)


def _answered(at: Path, queries: Path) -> None:
    index = load_index(at / "index")
    with open_batch(index, queries, at / "hits.jsonl") as run:
        run.finish(FakeScorer(index.tokenizer.vocab_size), batch_size=4)


def state_of(place: Path) -> State:
    """Read the folder's content, verify its checksums, and return its state. Raises if the content is not whole."""
    state: State = {"out": _contents(place / "out"), "hits": _contents(place / "hits.jsonl")}
    if not (place / "index" / MANIFEST).exists():
        return state
    index = load_index(place / "index")
    for name in index.manifest.files:
        index.file(name)
    scorer, n = FakeScorer(index.tokenizer.vocab_size), len(index.records)
    hits = recall(scorer, index.trie, [Prompt((1, 2))], SearchOptions(k=n + 1))[0].hits
    assert sorted(hit.key for hit in hits) == list(range(n)), "an image is lost, or found twice"
    assert index.log_prior is None or len(index.log_prior) == n
    return state | {
        "ids": [record.image_id for record in index.records],
        "identifiers": index.identifiers,
        "weights": index.weights_id,
        "new rows": stored_new_rows(index) is not None,
        "update": has_update(index),
        "trained": unseen_rows(index),
        "tuned": index.manifest.tuned,
        "prior": index.log_prior is not None,
        "queries": index.pseudo_queries,
    }


def _contents(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def fingerprint(place: Path) -> str:
    """Return a sha256 of all file names and contents, without the random parts, which the manifest also contains."""
    digest = hashlib.sha256()
    for path in sorted(place.rglob("*"), key=lambda path: _undrawn(path.relative_to(place))):
        content = path.read_bytes() if path.is_file() else b"a folder"
        if path.name.startswith(MANIFEST):
            content = re.sub(rb"[0-9a-f]{12,}", b"*", content)
        digest.update(f"{_undrawn(path.relative_to(place))}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _undrawn(path: Path) -> str:
    return re.sub(r"[0-9a-f]{8,}", "*", str(path))


def names_in(place: Path) -> list[str]:
    """Return the file names, with their random parts masked."""
    return sorted(_undrawn(path.relative_to(place)) for path in place.rglob("*"))
