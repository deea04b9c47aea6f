"""Stop a process before each system call that changes files, to inspect it, kill it, or let the call fail.

A seccomp filter hands the calls to this supervisor (`SECCOMP_RET_USER_NOTIF`), below Python and every library: torch,
safetensors, numpy's C code. Needs Linux 5.5 on x86-64, but not root.

Depends on processes and paths; independent of indexes. See seccomp(2), seccomp_unotify(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import os
import platform
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

MKDIRAT, UNLINKAT, OPENAT = 258, 263, 257
CALLS = {
    1: "write", 18: "pwrite", 20: "writev", 296: "pwritev", 328: "pwritev2", 40: "sendfile", 326: "copy_file_range",
    74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate", 285: "fallocate",
    82: "rename", 264: "renameat", 316: "renameat2", 83: "mkdir", MKDIRAT: "mkdirat", 84: "rmdir", 87: "unlink",
    UNLINKAT: "unlinkat", 85: "creat", 2: "open", OPENAT: "openat",
    86: "link", 265: "linkat", 88: "symlink", 266: "symlinkat",
}  # fmt: skip
_WRITE = {"write", "pwrite", "writev", "pwritev", "pwritev2"}
_NAME = {"mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat", "rename", "renameat", "renameat2"}
GROWS = _WRITE | _NAME | {"sendfile", "copy_file_range", "ftruncate", "fallocate", "open", "openat", "creat"}
"""Calls that a full disk may refuse."""

_BY_FD = _WRITE | {"fsync", "fdatasync", "ftruncate", "fallocate"}
_AT = {"openat", "mkdirat", "unlinkat", "renameat", "renameat2", "linkat", "symlinkat"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_LOAD, _EQUALS, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NOTIFY, _ALLOW = 0x7FC00000, 0x7FFF0000
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1
_SECCOMP = 317


@dataclass(frozen=True)
class Event:
    """A call before it is made. path: the changed file. to: target of a rename. size: bytes of a write, else 0."""

    number: int
    call: str
    path: Path
    to: Path | None
    size: int
    pid: int
    fd: int = -1
    address: int = 0

    def __str__(self) -> str:
        return f"{self.number}: {self.call} {self.path}{f' -> {self.to}' if self.to else ''}"


KILL, KILL_HALF, GO = "kill", "kill half", None
"""Results of `decide`, beside an errno. KILL_HALF writes half of the data before the process is killed."""

Decide = Callable[[Event], "str | int | None"]


@dataclass
class Outcome:
    """status: as of `os.waitstatus_to_exitcode`, -9 if the process was killed. said: its output on stderr."""

    events: list[Event] = field(default_factory=list)
    status: int = 0
    said: str = ""


def supported() -> bool:
    """Return True if this machine lets a process supervise another's calls."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return False
    try:
        return supervised(lambda: None, Path("/nowhere")).status == 0
    except OSError:
        return False


def supervised(work: Callable[[], None], under: Path, decide: Decide = lambda event: GO) -> Outcome:
    """Fork, do `work`, and call `decide` before each call that changes a file below a folder."""
    ours, theirs = socket.socketpair()
    said = os.memfd_create("stderr")
    pid = os.fork()
    if not pid:
        ours.close()
        _child(work, said, theirs)
    theirs.close()
    outcome = Outcome()
    try:
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        if descriptors:
            _supervise(descriptors[0], pid, under.resolve(), decide, outcome)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        outcome.status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ours.close()
    outcome.said = os.pread(said, 2**16, 0).decode(errors="replace")
    os.close(said)
    return outcome


def _child(work: Callable[[], None], said: int, theirs: socket.socket | None = None) -> NoReturn:
    """Do the work of a forked process, and end it."""
    torch.set_num_threads(1)  # the threads of a forked process are gone, and the exit would wait for them
    gc.freeze()  # a collection would copy every page that is shared with the parent: a second each time
    status = 1
    try:
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr = os.fdopen(2, "w", closefd=False)  # pytest replaced it with a file of its own
        if theirs:
            listener = _install()
            socket.send_fds(theirs, [b"x"], [listener])
            os.close(listener)
            theirs.close()
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _install() -> int:
    """Install the filter on this thread and those that it will start. Returns the listener."""
    opens = [(nr, _argument(1 if nr == 2 else 2)) for nr in (2, OPENAT)]
    program = [(_LOAD, 0, 0, 0)]
    for nr, flags in opens:
        program += [(_EQUALS, 0, 4, nr), (_LOAD, 0, 0, flags), (_ANY_BIT, 0, 1, _WRITES)]
        program += [(_RETURN, 0, 0, _NOTIFY), (_RETURN, 0, 0, _ALLOW)]
    for nr in CALLS:
        if nr not in (2, OPENAT):
            program += [(_EQUALS, 0, 1, nr), (_RETURN, 0, 0, _NOTIFY)]
    program.append((_RETURN, 0, 0, _ALLOW))
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer)), 16)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "prctl")
    listener = libc.syscall(_SECCOMP, 1, 8, ctypes.byref(head))  # SET_MODE_FILTER, NEW_LISTENER
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(listener)


def _argument(place: int) -> int:
    return 16 + 8 * place


def _supervise(listener: int, child: int, under: Path, decide: Decide, outcome: Outcome) -> None:
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    alive = True
    while alive:
        (_, found), *_ = poll.poll()
        if not found & select.POLLIN:
            break
        request = bytearray(80)
        try:
            fcntl.ioctl(listener, _RECEIVE, request)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                continue
            raise
        notification, pid, _, nr, _, _, *arguments = struct.unpack("QIIiIQ6Q", request)
        event = _event(len(outcome.events), CALLS[nr], pid, arguments, under)
        answer: str | int | None = GO
        if event is not None:
            outcome.events.append(event)
            answer = decide(event)
        if answer in (KILL, KILL_HALF):
            if answer == KILL_HALF:
                _write_half(event)
            os.kill(child, signal.SIGKILL)
            alive = False
            continue
        failed = -answer if isinstance(answer, int) else 0
        try:
            fcntl.ioctl(listener, _SEND, struct.pack("QqiI", notification, 0, failed, 0 if failed else _CONTINUE))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
    os.close(listener)


def _event(number: int, call: str, pid: int, arguments: list[int], under: Path) -> Event | None:
    """Return the event, or None if its path is elsewhere."""
    to, size, fd, address = None, 0, -1, 0
    if call in _BY_FD or call in ("sendfile", "copy_file_range"):
        fd = arguments[2] if call == "copy_file_range" else arguments[0]
        try:
            path = Path(f"/proc/{pid}/fd/{fd & 0xFFFFFFFF}").readlink()
        except OSError:
            return None
        if call in ("write", "pwrite"):
            address, size = arguments[1], arguments[2]
    elif call in _AT:
        symbolic = call == "symlinkat"
        path = _path(pid, arguments[1] if symbolic else arguments[0], arguments[2] if symbolic else arguments[1])
        if call in ("renameat", "renameat2", "linkat"):
            to = _path(pid, arguments[2], arguments[3])
    else:
        path = _path(pid, _cwd, arguments[0])
        if call in ("rename", "link", "symlink"):
            to = _path(pid, _cwd, arguments[1])
    inside = any(one is not None and (one == under or under in one.parents) for one in (path, to))
    return Event(number, call, path, to, size, pid, fd, address) if inside else None


_cwd = 2**64 - 100  # AT_FDCWD


def _path(pid: int, folder: int, address: int) -> Path:
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        memory.seek(address)
        name = b""
        while b"\0" not in name and len(name) < 4096:  # a page at a time: the next may not be mapped
            name += memory.read(4096 - (address + len(name)) % 4096)
    name = name.partition(b"\0")[0]
    if name.startswith(b"/"):
        return _real(Path(os.fsdecode(name)))
    fd = folder & 0xFFFFFFFF
    where = "cwd" if fd == _cwd & 0xFFFFFFFF else f"fd/{fd}"
    return _real(Path(f"/proc/{pid}/{where}").readlink() / os.fsdecode(name))


def _real(path: Path) -> Path:
    return path.parent.resolve() / path.name


def _write_half(event: Event | None) -> None:
    """Write the first half of the data of the stopped write, at its place."""
    assert event is not None
    with Path(f"/proc/{event.pid}/mem").open("rb", 0) as memory:
        memory.seek(event.address)
        content = memory.read(event.size // 2)
    position = int(Path(f"/proc/{event.pid}/fdinfo/{event.fd}").read_text().split()[1])
    with event.path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def wait_for_child(work: Callable[[], None], *, timeout_s: float = 120.0) -> tuple[int, str]:
    """Do `work` in a forked process. Returns its exit status, and its output on stderr."""
    said = os.memfd_create("stderr")
    pid = os.fork()
    if not pid:
        _child(work, said)
    end = time.monotonic() + timeout_s
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"the forked process did not end within {timeout_s:g} s")
        time.sleep(0.002)
    text = os.pread(said, 2**16, 0).decode(errors="replace")
    os.close(said)
    return os.waitstatus_to_exitcode(ended[1]), text
