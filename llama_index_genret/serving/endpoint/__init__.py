"""`POST /v1/recall` inside a vLLM server: `--middleware llama_index_genret.serving.endpoint.RecallMiddleware`.

`app`, `engine_scorer` and `vllm_serve` need vLLM or FastAPI and load in the server only. The other modules are light.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "RecallMiddleware":
        from llama_index_genret.serving.endpoint.app import RecallMiddleware

        return RecallMiddleware
    raise AttributeError(name)
