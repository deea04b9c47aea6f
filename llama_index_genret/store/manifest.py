"""The manifest of an index, its layout on disk, and the atomic write that replaces it.

A write puts new files into a new folder, syncs them, and then replaces the manifest in one rename. After a crash or a
power cut, either the old index or the new one is complete. The next write removes folders that the manifest does not
list. One process writes at a time, and a write based on an outdated version is refused.

Depends on files; independent of their content.
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
from llama_index_genret.store.vectors import EncoderEntry

FORMAT_VERSION = 5
READABLE = (3, 4, FORMAT_VERSION)
"""Format versions that this release reads. The next write upgrades an index.

Version 3 has no checksum of the manifest. Version 4 has no encoder and no vectors.
"""
CHECKSUMMED = 4
"""The first format whose manifest has a checksum."""

WITH_ENCODER = 5
"""The first format with an encoder, and the first whose `structured` identifiers have no suffix."""

SUFFIXES_BEFORE = 32
"""Suffix symbols in the vocabulary of a `structured` index before `WITH_ENCODER`."""

MANIFEST = "manifest.json"
LOCK = "write.lock"
LOCK_WAIT_S = 60.0
"""Seconds that a write waits for another one, which may copy trained weights meanwhile."""

PICTURES = "pictures"
"""Folder, inside the index folder, of images that were given as bytes. Writes of the index never touch it."""

_DATA_FOLDER = re.compile(r"data-[0-9a-f]{12}")
_CHECKSUM = "checksum"
_STORED = re.compile(rf"{_DATA_FOLDER.pattern}(/[^/\\:\0]+)+")
_TEMPORARY_MANIFEST = re.compile(re.escape(MANIFEST) + r"\.[0-9a-f]{12}")


class FileEntry(BaseModel):
    """One stored file: its path below the index folder, its size in bytes and its sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    size: int
    sha256: str

    @field_validator("path")
    @classmethod
    def _below_the_index(cls, path: str) -> str:
        if not _STORED.fullmatch(path) or ".." in path.split("/"):
            raise ValueError(f"{path!r} is not a file in a data folder of the index")
        return path


class Manifest(BaseModel):
    """The description of an index. Unknown fields are an error, because a newer format has another version.

    folders: image folders, absolute; each record stores the position of its folder.
    training, update: options and history of the training and of the update.
    tuned: scoring tuned for the trained weights; storing other weights drops it.
    encoder: identity of the encoder that computed `vectors.npy`. None for an index without vectors.
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
    encoder: EncoderEntry | None = None
    files: dict[str, FileEntry]


def check_free(folder: Path, *, overwrite: bool = False) -> None:
    """Check that an index may be written to `folder`.

    Raises:
        IndexExists: it holds an index and `overwrite` is False, or it holds other files.
        StoreError: the folder's name is not UTF-8.
    """
    _check_name(folder)
    if not folder.exists() or (folder.is_dir() and all(map(_is_left_over, folder.iterdir()))):
        return
    if not (folder / MANIFEST).is_file():
        raise IndexExists(f"{folder} exists and holds no index: choose a new folder.")
    if not overwrite:
        raise IndexExists(f"{folder} holds an index already: choose a new folder, or pass --overwrite to replace it.")


def _check_name(folder: Path) -> None:
    """Raise StoreError for a name that is not UTF-8: tokenizers and safetensors take paths as text only."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"the folder {str(folder)!r} has a name that is not UTF-8: rename it.") from error


def _is_left_over(path: Path) -> bool:
    """Tell whether a path may be in a folder without an index: images, or remains of a killed `genret index`."""
    return path.name in (PICTURES, LOCK) or bool(
        _DATA_FOLDER.fullmatch(path.name) or _TEMPORARY_MANIFEST.fullmatch(path.name)
    )


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of an index folder after verifying its checksum.

    Raises:
        IndexNotFound: the folder has no manifest.
        IndexDamaged: the manifest cannot be parsed, or differs from its checksum.
        IndexVersionError: this release does not read its format version.
        StoreError: the folder's name is not UTF-8.
    """
    _check_name(folder)
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IndexNotFound(
            f"there is no index in {folder}: {MANIFEST} is missing. Create one with `genret index`."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise IndexDamaged(f"{path} is damaged: {error}. Restore it, or create the index again.") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or type(version) is not int or version not in READABLE:
        raise IndexVersionError(
            f"{path} has format version {version!r}, this release reads {' and '.join(map(str, READABLE))}. "
            "Install the release that wrote it, or create the index again with `genret index`."
        )
    recorded = raw.pop(_CHECKSUM, None)
    if recorded != _checksum(raw) and not (recorded is None and version < CHECKSUMMED):
        raise IndexDamaged(
            f"{path} is damaged: it differs from its own checksum. Restore it, or create the index again. "
            "Do not edit it by hand."
        )
    if version < WITH_ENCODER and raw.get("scheme") == "structured" and isinstance(raw.get("scheme_options"), dict):
        raw["scheme_options"] = _upgraded_options(raw["scheme_options"])
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise IndexDamaged(f"{path} is damaged: {error}. Restore it, or create the index again.") from error


def _upgraded_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `structured` in format 5, from those of an older format."""
    kept = {name: value for name, value in options.items() if name != "encoder"}
    return {**kept, "source": "vectors" if "encoder" in options else "features", "suffixes": SUFFIXES_BEFORE}


def readable_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of an index folder, or None if it is missing or damaged."""
    try:
        return read_manifest(folder)
    except (IndexNotFound, IndexDamaged):
        return None


def manifest_text(manifest: Manifest) -> str:
    """Return the content of `manifest.json`: the manifest and its checksum."""
    raw = manifest.model_dump(mode="json")
    return json.dumps({**raw, _CHECKSUM: _checksum(raw)}, indent=1, ensure_ascii=False)


def _checksum(raw: dict[str, Any]) -> str:
    """Return the checksum of a manifest's content, independent of its formatting."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


@contextmanager
def only_writer_of(folder: Path) -> Iterator[None]:
    """Lock an index folder against other writers, for `commit`.

    Raises:
        IndexBusy: another process has held the lock for `LOCK_WAIT_S`.
        NotWritten: the disk is full or read-only.
    """
    busy = f"another process is writing {folder}: wait until it is done, and run the command again."
    with writing(folder), only_writer(folder / LOCK, busy=busy, wait_s=LOCK_WAIT_S):
        yield


def check_unchanged(folder: Path, manifest: Manifest) -> None:
    """Raise IndexChanged unless `manifest` is the one on disk. Call it inside `only_writer_of`."""
    if read_manifest(folder) != manifest:
        raise IndexChanged(
            f"{folder} was changed by another process since it was read. Nothing was stored: run the command again, "
            "or, in a program, load the index again."
        )


def commit(folder: Path, manifest: Manifest, write: Callable[[Path], None], *, keep: Callable[[str], bool]) -> None:
    """Write new files, then replace the manifest by one that lists the new and the kept files, in one rename.

    Call it inside `only_writer_of`. After an error the index is unchanged, and no other files are left.
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
        sync(folder)  # directory entries of the new files must be on the disk before a manifest lists them
        temporary.replace(folder / MANIFEST)
        sync(folder)
    finally:
        _remove_unnamed(folder)


def _remove_unnamed(folder: Path) -> None:
    """Remove data folders and temporary files that the manifest on disk does not list. Keep all if it is damaged."""
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
    """Verify a file against its entry in the manifest.

    Raises:
        IndexDamaged: the file is missing, or has another size or checksum.
    """
    try:
        present = path.is_file()
    except OSError:  # the name is invalid on this file system
        present = False
    if not present:
        raise IndexDamaged(f"{path} is missing. Restore it, or create the index again with `genret index`.")
    try:
        differs = path.stat().st_size != entry.size or _sha256(path) != entry.sha256
    except OSError as error:
        raise IndexDamaged(f"{path} cannot be read: {error}. Make it readable, or restore it.") from error
    if differs:
        raise IndexDamaged(
            f"{path} differs from its recorded checksum ({path.stat().st_size} bytes, {entry.size} expected). "
            "Restore it, or create the index again with `genret index`."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
