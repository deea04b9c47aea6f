"""End the child processes of a killed server. vLLM's engine would otherwise keep running and hold its GPU memory.

vLLM loads this module in all its processes, as a plugin (entry point `vllm.general_plugins`). The plugin does nothing
in a server without indexes of this package.

Depends on multiprocessing; independent of vLLM's modules.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

from llama_index_genret.serving.endpoint.schema import INDEXES_VARIABLE

GRACE_S = 5.0
"""Seconds between SIGTERM and the forced exit."""


def end_with_parent() -> None:
    """End this process soon after its parent process, if multiprocessing started it."""
    parent = multiprocessing.parent_process()
    if parent is not None and INDEXES_VARIABLE in os.environ:
        threading.Thread(target=_end_after, args=(parent,), name="end-with-parent", daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)
