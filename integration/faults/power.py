"""The states that a power cut may leave: everything that no `fsync` has brought to the disk may be lost.

A write lasts once its file is synced, a name in a folder once the folder is. A file system may keep more, in any order.
Each part that may be lost is therefore removed alone, and then all of them together.

Depends on calls and files; independent of indexes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from integration.faults.syscalls import Event

_WRITES = {"write", "pwrite", "writev", "pwritev", "pwritev2", "ftruncate", "fallocate", "sendfile", "copy_file_range"}


@dataclass(frozen=True)
class Name:
    """A name not yet made durable by a sync of its folder. was: the path before a rename. old: the replaced content."""

    path: Path
    was: Path | None = None
    old: bytes | None = None


class Disk:
    """Follows the calls of a process.

    `see` takes each before it is made. `cuts` makes the states that a cut would leave.
    """

    def __init__(self) -> None:
        self._unwritten: set[int] = set()
        self._names: list[Name] = []

    def see(self, event: Event) -> None:
        """Record a call that will be made."""
        path, to = event.path, event.to
        if event.call in _WRITES:
            self._unwritten.add(path.stat().st_ino)
        elif event.call in ("fsync", "fdatasync"):
            self._unwritten.discard(path.stat().st_ino)
            self._names = [name for name in self._names if name.path.parent != path]
        elif event.call.startswith("rename") and to is not None and path.exists():
            old = to.read_bytes() if to.is_file() else None
            others = [name for name in self._names if name.path != path]
            inside = {name: to / name.path.relative_to(path) for name in others if path in name.path.parents}
            self._names = [replace(name, path=inside.get(name, name.path)) for name in others] + [Name(to, path, old)]
        elif event.call in ("unlink", "unlinkat", "rmdir"):
            self._names = [name for name in self._names if name.path != path]
        elif event.call in ("open", "openat", "creat", "mkdir", "mkdirat") and not path.exists():
            self._names.append(Name(path))

    def cuts(self, under: Path, into: Path) -> Iterator[str]:
        """Make one state after another in `into`, a copy of `under`, and yield a description of the loss."""
        if self._unwritten:
            for kept in (0, 0.5):
                self._copy(under, into)
                self._cut(into, kept)
                yield f"content, {kept:.0%} kept"
        for name in self._names:
            self._copy(under, into)
            _undo(_moved(name, under, into))
            yield f"name {name.path}"
        if len(self._names) > 1 or (self._names and self._unwritten):
            self._copy(under, into)
            self._cut(into, 0)
            for name in reversed(self._names):
                _undo(_moved(name, under, into))
            yield "all"

    def _copy(self, under: Path, into: Path) -> None:
        shutil.rmtree(into, ignore_errors=True)
        self._inodes = {}
        for path in under.rglob("*"):
            self._inodes[into / path.relative_to(under)] = path.stat().st_ino
        shutil.copytree(under, into)

    def _cut(self, into: Path, kept: float) -> None:
        for path, inode in self._inodes.items():
            if inode in self._unwritten and path.is_file():
                os.truncate(path, int(path.stat().st_size * kept))


def _moved(name: Name, under: Path, into: Path) -> Name:
    under = under.resolve()
    was = into / name.was.relative_to(under) if name.was else None
    return replace(name, path=into / name.path.relative_to(under), was=was)


def _undo(name: Name) -> None:
    if not os.path.lexists(name.path):
        return
    if name.was is not None:
        name.was.parent.mkdir(parents=True, exist_ok=True)
        name.path.rename(name.was)
        if name.old is not None:
            name.path.write_bytes(name.old)
    elif name.path.is_dir():
        shutil.rmtree(name.path)
    else:
        name.path.unlink()
