"""Run nginx with the configuration of `integration/deploy`, on other addresses and, for a test, with other numbers.

Depends on the text of the configuration; independent of its effects.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from llama_index_genret.serving.launch import free_port

CONFIGURATION = Path(__file__).parent / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or "nginx"
UPSTREAM, LISTEN = "genret:8000", "listen 8080"
STARTED_S = 10.0
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
"""Kinds of files that nginx writes, by default where only root may write."""


def value_of(directive: str) -> str:
    """Return the value of a directive that the configuration has once."""
    (found,) = re.findall(rf"^ *{re.escape(directive)} (.*);$", CONFIGURATION.read_text(), re.MULTILINE)
    return str(found)


def configuration(folder: Path, port: int, upstream: str, changes: Mapping[str, str]) -> str:
    """Return the text of the configuration for these addresses, with its files below a folder.

    Args:
        changes: text of the configuration, and the text to put in its place.
    Raises:
        ValueError: the configuration has no such text.
    """
    text = CONFIGURATION.read_text()
    paths = " ".join(f"{kind}_temp_path {folder / kind};" for kind in TEMPORARY)
    placed = {LISTEN: f"listen 127.0.0.1:{port}", UPSTREAM: upstream, "http {": f"http {{ access_log off; {paths}"}
    for old, new in {**changes, **placed}.items():
        if old not in text:
            raise ValueError(f"{CONFIGURATION} has no text {old!r}, which {new!r} should replace.")
        text = text.replace(old, new)
    return text


@contextmanager
def running_proxy(folder: Path, upstream_port: int, changes: Mapping[str, str] | None = None) -> Iterator[int]:
    """Run nginx before the server at a port of this machine; yield its own port, and end it on leaving.

    Raises:
        RuntimeError: nginx ended, or did not listen in time; carries its log.
    """
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    written, log = folder / "nginx.conf", folder / "error.log"
    written.write_text(configuration(folder, port, f"127.0.0.1:{upstream_port}", changes or {}))
    user = "user root;" if os.geteuid() == 0 else ""
    settings = f"daemon off; pid {folder / 'pid'}; {user}"
    process = subprocess.Popen([NGINX, "-p", str(folder), "-e", str(log), "-c", str(written), "-g", settings])
    try:
        _wait_until_it_listens(process, port, log)
        yield port
    finally:
        process.terminate()
        process.wait(STARTED_S)


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + STARTED_S
    while process.poll() is None and time.monotonic() < end:
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"nginx does not listen. {log}:\n{log.read_text() if log.is_file() else ''}")
