"""How an index lies on disk, and how it is replaced: the manifest is the commit point.

A write puts new files into a new folder, syncs them, and then replaces the manifest in one rename: a crash at any
point leaves the old index or the new one. Folders that no manifest names are removed by the next write.

Knows files; nothing of what they hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from llama_index_genret.errors import IndexDamaged, IndexExists, IndexNotFound, IndexVersionError
from llama_index_genret.identifiers import Alphabet
from llama_index_genret.prompts import PromptSet
from llama_index_genret.store.scoring import Tuned

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
PICTURES = "pictures"
"""Folder inside an index of images that were given as bytes: not of the index, and left alone by its writes."""

_DATA_FOLDER = re.compile(r"data-[0-9a-f]{12}")
_STORED = re.compile(rf"{_DATA_FOLDER.pattern}(/[^/\\:\0]+)+")
_TEMPORARY_MANIFEST = re.compile(re.escape(MANIFEST) + r"\.[0-9a-f]{12}")


class FileEntry(BaseModel):
    """One stored file: where it lies below the index folder, and what it must hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    size: int
    sha256: str

    @field_validator("path")
    @classmethod
    def _below_the_index(cls, path: str) -> str:
        if not _STORED.fullmatch(path) or ".." in path.split("/"):
            raise ValueError(f"{path!r} is no file of a data folder of the index")
        return path


class ModelEntry(BaseModel):
    """The base model that the index was made with.

    fingerprint: of its configuration and weights; base_tokenizer: of its tokenizer, before symbols were added.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name_or_path: str
    fingerprint: str
    base_tokenizer: str


class Manifest(BaseModel):
    """What an index is. Unknown fields are an error: a newer format has another version.

    folders: of the images; a record names its own by position.
    training, update: options and course of both trainings.
    tuned: of the trained weights; others drop it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: int
    folders: list[str]
    scheme: str
    scheme_options: dict[str, Any]
    alphabet: Alphabet = "new"
    model: ModelEntry
    tokenizer: str
    prompts: PromptSet
    training: dict[str, Any] | None = None
    update: dict[str, Any] | None = None
    tuned: Tuned | None = None
    files: dict[str, FileEntry]


def check_free(folder: Path, *, overwrite: bool = False) -> None:
    """Raise IndexExists unless an index may be written to `folder`."""
    if not folder.exists() or (folder.is_dir() and all(path.name == PICTURES for path in folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise IndexExists(f"{folder} exists and holds something that is no index: name a new folder.")
    if not overwrite:
        raise IndexExists(f"{folder} holds an index already: name a new folder, or pass --overwrite to replace it.")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an index folder.

    Raises:
        IndexNotFound, IndexDamaged, IndexVersionError: there is none, it cannot be read, or not by this release.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IndexNotFound(
            f"there is no index in {folder}: {MANIFEST} is missing. Make one: `genret index`."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
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


def commit(folder: Path, manifest: Manifest, write: Callable[[Path], None], *, keep: Callable[[str], bool]) -> None:
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


def verify(path: Path, entry: FileEntry) -> None:
    """Hold a file against its entry in the manifest.

    Raises:
        IndexDamaged: it is not there, or has another size or checksum.
    """
    try:
        present = path.is_file()
    except OSError:  # a name that no file can have
        present = False
    if not present:
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
