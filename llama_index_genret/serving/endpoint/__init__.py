"""`POST /v1/recall` inside a vLLM server: `--middleware llama_index_genret.serving.endpoint.RecallMiddleware`.

`wire` and `registry` are light; the rest loads in the server, which has vLLM and FastAPI.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "RecallMiddleware":
        from llama_index_genret.serving.endpoint.app import RecallMiddleware

        return RecallMiddleware
    raise AttributeError(name)
