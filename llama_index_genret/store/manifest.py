"""How an index lies on disk, and how it is replaced: the manifest is the commit point.

A write puts new files into a new folder, syncs them, and then replaces the manifest in one rename: a crash at any
point, or a power cut, leaves the old index or the new one. Folders that no manifest names are removed by the next
write. One process writes at a time, and only what is based on the version that lies there.

Knows files; nothing of what they hold.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from llama_index_genret.errors import (
    IndexChanged,
    IndexDamaged,
    IndexExists,
    IndexNotFound,
    IndexVersionError,
    StoreError,
)
from llama_index_genret.files import only_writer, sync, sync_tree, writing
from llama_index_genret.identifiers import Alphabet
from llama_index_genret.models.identity import ModelEntry
from llama_index_genret.models.prompts import PromptSet
from llama_index_genret.store.scoring import TunedScoring

FORMAT_VERSION = 4
READABLE = (3, FORMAT_VERSION)
"""Version 3 had no checksum of the manifest itself; the next write makes it one of the newest."""

MANIFEST = "manifest.json"
LOCK = "write.lock"
LOCK_WAIT_S = 60.0
"""How long a write waits for another one, which takes as long as copying the trained weights."""

PICTURES = "pictures"
"""Folder inside an index of images that were given as bytes: not of the index, and left alone by its writes."""

_DATA_FOLDER = re.compile(r"data-[0-9a-f]{12}")
_CHECKSUM = "checksum"
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
    tuned: TunedScoring | None = None
    files: dict[str, FileEntry]


def check_free(folder: Path, *, overwrite: bool = False) -> None:
    """Raise IndexExists unless an index may be written to `folder`, StoreError where none could be read from it."""
    _check_name(folder)
    if not folder.exists() or (folder.is_dir() and all(map(_is_left_over, folder.iterdir()))):
        return
    if not (folder / MANIFEST).is_file():
        raise IndexExists(f"{folder} exists and holds something that is no index: name a new folder.")
    if not overwrite:
        raise IndexExists(f"{folder} holds an index already: name a new folder, or pass --overwrite to replace it.")


def _check_name(folder: Path) -> None:
    """Refuse a name that tokenizers and safetensors, which take text for a path, could not open."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"the folder {str(folder)!r} has a name that is not UTF-8: rename it.") from error


def _is_left_over(path: Path) -> bool:
    """Whether it may lie in a folder without an index: pictures, and what a killed `genret index` leaves."""
    return path.name in (PICTURES, LOCK) or bool(
        _DATA_FOLDER.fullmatch(path.name) or _TEMPORARY_MANIFEST.fullmatch(path.name)
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an index folder, held against its own checksum.

    Raises:
        IndexNotFound, IndexDamaged, IndexVersionError: there is none, it cannot be read, or not by this release.
        StoreError: the folder's name is not UTF-8.
    """
    _check_name(folder)
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
    if not isinstance(raw, dict) or type(version) is not int or version not in READABLE:
        raise IndexVersionError(
            f"{path} has format version {version!r}, this release reads {' and '.join(map(str, READABLE))}. "
            "Install the release that wrote it, or make the index anew with `genret index`."
        )
    recorded = raw.pop(_CHECKSUM, None)
    if recorded != _checksum(raw) and not (recorded is None and version < FORMAT_VERSION):
        raise IndexDamaged(
            f"{path} is damaged: it differs from its own checksum. Restore it, or make the index anew. Nothing in it "
            "is meant to be changed by hand."
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise IndexDamaged(f"{path} is damaged: {error}. Restore it, or make the index anew.") from error


def readable_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of an index folder, or None if it is missing or damaged."""
    try:
        return read_manifest(folder)
    except (IndexNotFound, IndexDamaged):
        return None


def manifest_text(manifest: Manifest) -> str:
    """What `manifest.json` holds: the manifest, and the checksum of it."""
    raw = manifest.model_dump(mode="json")
    return json.dumps({**raw, _CHECKSUM: _checksum(raw)}, indent=1, ensure_ascii=False)


def _checksum(raw: dict[str, Any]) -> str:
    """Of what a manifest says, not of how it is set."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


@contextmanager
def only_writer_of(folder: Path) -> Iterator[None]:
    """Keep other writers out of an index folder, for `commit`.

    Raises:
        IndexBusy: another one has been writing for `LOCK_WAIT_S`. NotWritten: the disk is full, or read only.
    """
    busy = f"another process is writing {folder}: wait until it is done, and run the command again."
    with writing(folder), only_writer(folder / LOCK, busy=busy, wait_s=LOCK_WAIT_S):
        yield


def check_unchanged(folder: Path, manifest: Manifest) -> None:
    """Raise IndexChanged unless `manifest` is the one that lies there; inside `only_writer_of`."""
    if read_manifest(folder) != manifest:
        raise IndexChanged(
            f"{folder} was changed by another process since it was read. Nothing was stored: run the command again, "
            "or, in a program, load the index anew."
        )


def commit(folder: Path, manifest: Manifest, write: Callable[[Path], None], *, keep: Callable[[str], bool]) -> None:
    """Write new files, then the manifest that names them and the kept ones, in one rename; inside `only_writer_of`.

    On an error the index is as it was, and nothing else is left.
    """
    data, temporary = folder / f"data-{uuid.uuid4().hex[:12]}", folder / f"{MANIFEST}.{uuid.uuid4().hex[:12]}"
    try:
        data.mkdir()
        write(data)
        files = {name: entry for name, entry in manifest.files.items() if keep(name)}
        for path in sorted(p for p in data.rglob("*") if p.is_file()):
            files[path.relative_to(data).as_posix()] = FileEntry(
                path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=_sha256(path)
            )
        sync_tree(data)
        update = {"files": files, "format_version": FORMAT_VERSION}
        temporary.write_text(manifest_text(manifest.model_copy(update=update)), encoding="utf-8")
        sync(temporary)
        sync(folder)  # the names of the new files are on the disk before a manifest names them
        temporary.replace(folder / MANIFEST)
        sync(folder)
    finally:
        _remove_unnamed(folder)


def _remove_unnamed(folder: Path) -> None:
    """Remove what the manifest on disk does not name; nothing where that is not known."""
    try:
        named = {Path(entry.path).parts[0] for entry in read_manifest(folder).files.values()}
    except IndexNotFound:
        named = set()
    except StoreError:
        return
    for path in folder.iterdir():
        if _DATA_FOLDER.fullmatch(path.name) and path.name not in named:
            shutil.rmtree(path, ignore_errors=True)
        elif _TEMPORARY_MANIFEST.fullmatch(path.name):
            with suppress(OSError):
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
    try:
        differs = path.stat().st_size != entry.size or _sha256(path) != entry.sha256
    except OSError as error:
        raise IndexDamaged(f"{path} cannot be read: {error}. Make it readable, or restore it.") from error
    if differs:
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
