"""Processes of a killed server end with it: vLLM's engine would keep its memory, a GPU's too, for ever.

A plugin of vLLM (entry point `vllm.general_plugins`), which every process of vLLM's loads. Does nothing in a server
without this package's indexes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

from llama_index_genret.serving.endpoint.schema import INDEXES_VARIABLE

GRACE_S = 5.0
"""From the request to end until the end."""


def end_with_parent() -> None:
    """End this process soon after the one that started it, where that is one of multiprocessing's."""
    parent = multiprocessing.parent_process()
    if parent is not None and INDEXES_VARIABLE in os.environ:
        threading.Thread(target=_end_after, args=(parent,), name="end-with-parent", daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)
