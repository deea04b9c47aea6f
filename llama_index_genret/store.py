"""The persisted index: one folder, whole or not at all.

    INDEX/manifest.json      the commit point: versions, scheme, fingerprints, and the checksum of every file
    INDEX/data-<12 hex>/     what one write added: records.jsonl, trie.bin, tokenizer.json, codebooks.safetensors,
                             adapter/...; files of earlier writes stay where they are while the manifest names them

A write puts new files into a new folder, syncs them, and then replaces the manifest in one rename: a crash at any
point leaves the old index or the new one. Folders that no manifest names are removed by the next write.

Knows files and the light parts; nothing of torch or LlamaIndex.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.numpy import load_file, save_file

from llama_index_genret.corpus import Record
from llama_index_genret.errors import (
    FilterError,
    IndexDamaged,
    IndexExists,
    IndexNotFound,
    IndexVersionError,
    ModelMismatch,
)
from llama_index_genret.identifiers import Alphabet, Identifier, Scheme, Spelling, get_scheme, spelling_of
from llama_index_genret.prompts import PromptSet
from llama_index_genret.search import Hit
from llama_index_genret.tokenization import IndexTokenizer
from llama_index_genret.trie import LeafFilter, LiveTrie, build_trie, close_beginnings, open_trie, save_trie

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_DATA_FOLDER = re.compile(r"data-[0-9a-f]{12}")
_TEMPORARY_MANIFEST = re.compile(re.escape(MANIFEST) + r"\.[0-9a-f]{12}")
ADAPTER = "adapter/"
"""Prefix of the logical names of the trained weights' files."""


class FileEntry(BaseModel):
    """One stored file: where it lies below the index folder, and what it must hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    size: int
    sha256: str


class ModelEntry(BaseModel):
    """The base model that the index was made with.

    fingerprint: of its configuration and weights; base_tokenizer: of its tokenizer, before symbols were added.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name_or_path: str
    fingerprint: str
    base_tokenizer: str


class Manifest(BaseModel):
    """What an index is. Unknown fields are an error: a newer format has another version."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: int
    images: str
    scheme: str
    scheme_options: dict[str, Any]
    alphabet: Alphabet = "new"
    model: ModelEntry
    tokenizer: str
    prompts: PromptSet
    training: dict[str, Any] | None = None
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Index:
    """A loaded index. Immutable: a change is a new write (`write_index`, `add_files`) and a new load."""

    folder: Path
    manifest: Manifest
    records: tuple[Record, ...]
    identifiers: tuple[Identifier, ...]
    trie: LiveTrie
    tokenizer: IndexTokenizer

    @property
    def prompts(self) -> PromptSet:
        """The rendered prompts of the base model."""
        return self.manifest.prompts

    @property
    def is_trained(self) -> bool:
        """Whether trained weights are stored."""
        return any(name.startswith(ADAPTER) for name in self.manifest.files)

    @property
    def weights_id(self) -> str | None:
        """Twelve hex digits that name the trained weights, None without them. A server of theirs carries it."""
        entry = self.manifest.files.get(f"{ADAPTER}adapter_model.safetensors")
        return entry.sha256[:12] if entry else None

    @cached_property
    def rows_by_id(self) -> dict[str, int]:
        """Position of every image id among `records`."""
        return {record.image_id: row for row, record in enumerate(self.records)}

    def record_of(self, hit: Hit) -> Record:
        """The image that a hit names."""
        return self.records[hit.key]

    def identifier_of(self, hit: Hit) -> str:
        """The identifier as people read it, `<g0_17><g1_5>` or `red apple`."""
        return self.tokenizer.read(self.identifiers[hit.key])

    def token_ids(self, row: int) -> tuple[int, ...]:
        """Token ids of the identifier of record `row`."""
        return tuple(self.tokenizer.symbol_id(symbol) for symbol in self.identifiers[row])

    def leaf_filter(self, keep: Callable[[Record], bool]) -> LeafFilter:
        """The leaves whose records `keep` accepts, for the `allowed` of a search."""
        kept = np.fromiter((keep(record) for record in self.records), bool, len(self.records))
        return LeafFilter.from_mask(kept[self.trie.key(np.arange(self.trie.n_leaves))])

    def equals_filter(self, wanted: Mapping[str, str]) -> LeafFilter:
        """Records whose metadata equal all of `wanted`, compared as text.

        Raises:
            FilterError: no record has one of the keys.
        """
        known = {key for record in self.records for key in record.metadata}
        for key in wanted:
            if key not in known:
                raise FilterError(f"no image has metadata {key!r}; the index knows {sorted(known)}.")
        return self.leaf_filter(lambda r: all(str(r.metadata.get(key)) == value for key, value in wanted.items()))

    def scheme(self) -> Scheme:
        """The scheme with its frozen codebooks."""
        scheme = get_scheme(self.manifest.scheme, **self.manifest.scheme_options)
        arrays = load_file(self.file("codebooks.safetensors")) if "codebooks.safetensors" in self.manifest.files else {}
        scheme.restore(arrays)
        return scheme

    def spelling(self) -> Spelling:
        """How the scheme's identifiers are written in the index's tokens."""
        return spelling_of(self.scheme(), self.tokenizer, self.manifest.alphabet)

    def new_token_ids(self) -> list[int]:
        """Tokens that the index added to the base model's vocabulary, which must learn them; ascending."""
        if self.manifest.alphabet == "existing":
            return []
        return sorted(self.tokenizer.symbol_id(symbol) for symbol in self.scheme().new_symbols())

    def file(self, name: str) -> Path:
        """Path of a stored file, its checksum verified.

        Raises:
            IndexDamaged: it is missing or differs from the manifest.
        """
        entry = self.manifest.files[name]
        path = self.folder / entry.path
        _verify(path, entry)
        return path

    def adapter_folder(self) -> Path:
        """Folder of the trained weights, every file verified."""
        return [self.file(name) for name in self.manifest.files if name.startswith(ADAPTER)].pop().parent

    def check_tokenizer(self, tokenizer: IndexTokenizer, where: str) -> None:
        """Raise ModelMismatch unless `tokenizer` is the base tokenizer the index was made with."""
        if tokenizer.fingerprint != self.manifest.model.base_tokenizer:
            raise ModelMismatch(
                f"the tokenizer of {where} (sha256 {tokenizer.fingerprint[:12]}) is not the one that {self.folder} was "
                f"made with ({self.manifest.model.name_or_path}, sha256 {self.manifest.model.base_tokenizer[:12]}). "
                "Load the index with its own model, or make it anew with `genret index`."
            )


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
    overwrite: bool = False,
) -> Index:
    """Write a new index, untrained.

    Args:
        identifiers: as `Spelling.spell` gives them, each symbol one token.
        tokenizer: with the scheme's symbols added, where the alphabet is new.
        overwrite: whether an index that is there already may be replaced, its trained weights included.
    Raises:
        IndexExists: there is an index in `folder` already, or something else.
        IdentifierError: identifiers are not unique, or a symbol is not one token.
    """
    check_free(folder, overwrite=overwrite)
    token_ids = [[tokenizer.symbol_id(symbol) for symbol in identifier] for identifier in identifiers]
    end = tokenizer.encode_markup(prompts.end)[0]
    trie, order = build_trie(close_beginnings(token_ids, end))

    def write(into: Path) -> None:
        lines = (
            json.dumps({**record.to_json(), "identifier": identifier}, ensure_ascii=False)
            for record, identifier in zip(records, identifiers, strict=True)
        )
        (into / "records.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (into / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        save_trie(trie, into / "trie.bin")
        np.save(into / "leaf_to_record.npy", order)
        if scheme.arrays():
            save_file(dict(scheme.arrays()), into / "codebooks.safetensors")

    manifest = Manifest(
        format_version=FORMAT_VERSION,
        images=str(images.resolve()),
        scheme=scheme.name,
        scheme_options=scheme.options(),
        alphabet=alphabet,
        model=model,
        tokenizer=tokenizer.fingerprint,
        prompts=prompts,
        files={},
    )
    folder.mkdir(parents=True, exist_ok=True)
    _commit(folder, manifest, write, keep=lambda name: False)
    return load_index(folder)


def check_free(folder: Path, *, overwrite: bool = False) -> None:
    """Raise IndexExists unless an index may be written to `folder`."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise IndexExists(f"{folder} exists and holds something that is no index: name a new folder.")
    if not overwrite:
        raise IndexExists(f"{folder} holds an index already: name a new folder, or pass --overwrite to replace it.")


def store_adapter(index: Index, source: Path, training: Mapping[str, Any]) -> Index:
    """Store trained weights (the files of `source`) in place of any earlier ones."""

    def write(into: Path) -> None:
        shutil.copytree(source, into / ADAPTER.rstrip("/"))

    manifest = index.manifest.model_copy(update={"training": dict(training)})
    _commit(index.folder, manifest, write, keep=lambda name: not name.startswith(ADAPTER))
    return load_index(index.folder)


def load_index(folder: Path) -> Index:
    """Open an index. The trie is memory-mapped; trained weights are not read.

    Raises:
        IndexNotFound, IndexVersionError, IndexDamaged: as their names say; each names the file.
    """
    manifest = _read_manifest(folder)

    def verified(name: str) -> Path:
        if name not in manifest.files:
            raise IndexDamaged(f"{folder / MANIFEST} names no file {name!r}. Make the index anew with `genret index`.")
        path = folder / manifest.files[name].path
        _verify(path, manifest.files[name])
        return path

    rows = [json.loads(line) for line in verified("records.jsonl").read_text(encoding="utf-8").splitlines()]
    identifiers = tuple(tuple(row.pop("identifier")) for row in rows)
    tokenizer = IndexTokenizer.from_file(verified("tokenizer.json"))
    if tokenizer.fingerprint != manifest.tokenizer:
        raise IndexDamaged(f"{folder / MANIFEST} records another tokenizer than tokenizer.json beside it.")
    return Index(
        folder=folder,
        manifest=manifest,
        records=tuple(Record.from_json(row, Path(manifest.images)) for row in rows),
        identifiers=identifiers,
        trie=LiveTrie(
            open_trie(verified("trie.bin")), keys=np.load(verified("leaf_to_record.npy"), allow_pickle=False)
        ),
        tokenizer=tokenizer,
    )


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IndexNotFound(
            f"there is no index in {folder}: {MANIFEST} is missing. Make one: `genret index`."
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IndexDamaged(f"{path} is damaged: {error}. Restore it, or make the index anew.") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise IndexVersionError(
            f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}. "
            "Install the release that wrote it, or make the index anew with `genret index`."
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise IndexDamaged(f"{path} is damaged: {error}. Restore it, or make the index anew.") from error


def _commit(folder: Path, manifest: Manifest, write: Callable[[Path], None], *, keep: Callable[[str], bool]) -> None:
    """Write new files, then the manifest that names them and the kept ones, in one rename."""
    data = folder / f"data-{uuid.uuid4().hex[:12]}"
    data.mkdir()
    write(data)
    files = {name: entry for name, entry in manifest.files.items() if keep(name)}
    for path in sorted(p for p in data.rglob("*") if p.is_file()):
        _sync(path)
        files[path.relative_to(data).as_posix()] = FileEntry(
            path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=_sha256(path)
        )
    for directory in [data, *(p for p in data.rglob("*") if p.is_dir())]:
        _sync(directory)
    temporary = folder / f"{MANIFEST}.{uuid.uuid4().hex[:12]}"
    temporary.write_text(manifest.model_copy(update={"files": files}).model_dump_json(indent=1), encoding="utf-8")
    _sync(temporary)
    temporary.replace(folder / MANIFEST)
    _sync(folder)
    _remove_unnamed(folder, {Path(entry.path).parts[0] for entry in files.values()})


def _remove_unnamed(folder: Path, named: set[str]) -> None:
    for path in folder.iterdir():
        if _DATA_FOLDER.fullmatch(path.name) and path.name not in named:
            shutil.rmtree(path, ignore_errors=True)
        elif _TEMPORARY_MANIFEST.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _verify(path: Path, entry: FileEntry) -> None:
    if not path.is_file():
        raise IndexDamaged(f"{path} is missing. Restore it, or make the index anew with `genret index`.")
    if path.stat().st_size != entry.size or _sha256(path) != entry.sha256:
        raise IndexDamaged(
            f"{path} differs from its recorded checksum ({path.stat().st_size} bytes, {entry.size} expected). "
            "Restore it, or make the index anew with `genret index`."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
