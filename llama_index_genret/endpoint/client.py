"""One request instead of one a step: recall by a server's own endpoint, where it serves the very version of the index.

Knows HTTP and the index; nothing of vLLM. Whoever calls it falls back to the stock protocol where it gives None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
from pydantic import ValidationError

from llama_index_genret.endpoint.wire import (
    EXACT_BUDGET,
    IndexList,
    RecallRequest,
    RecallResponse,
    RecallResult,
    Scalar,
)
from llama_index_genret.errors import ServerError
from llama_index_genret.scorers.vllm import server_errors
from llama_index_genret.search import Hit, Ranking
from llama_index_genret.store import Index

Filters = Mapping[str, Scalar | list[Scalar]]


class RecallClient:
    """Recalls from `POST /v1/recall`.

    Args:
        api_base: address up to `/v1`.
        timeout_s: of one request, connecting included.
    """

    def __init__(self, index: Index, api_base: str, *, api_key: str = "EMPTY", timeout_s: float = 60.0) -> None:
        self._index = index
        self._url = f"{api_base.rstrip('/')}/recall"
        self._name: str | None = None
        self._asked = False
        self._options: dict[str, Any] = {"timeout": timeout_s, "headers": {"Authorization": f"Bearer {api_key}"}}

    def recall(self, text: str, *, k: int, width: int | None, budget: int | None, filters: Filters) -> Ranking | None:
        """The best `k` images, or None where the server does not serve this version of the index.

        Raises:
            ServerUnreachable, ServerError: nothing answers, or with an error.
        """
        with httpx.Client(**self._options) as client, server_errors(self._url):
            if not self._asked:
                self._choose(client.get(f"{self._url}/indexes"))
            if self._name is None:
                return None
            answer = client.post(self._url, json=self._body(text, k, width, budget, filters))
            return self._ranking(answer, certain=budget is None)

    async def arecall(
        self, text: str, *, k: int, width: int | None, budget: int | None, filters: Filters
    ) -> Ranking | None:
        """The same for an event loop."""
        async with httpx.AsyncClient(**self._options) as client:
            with server_errors(self._url):
                if not self._asked:
                    self._choose(await client.get(f"{self._url}/indexes"))
                if self._name is None:
                    return None
                answer = await client.post(self._url, json=self._body(text, k, width, budget, filters))
                return self._ranking(answer, certain=budget is None)

    def _choose(self, answer: httpx.Response) -> None:
        """Remember under which name the server has this version; none, if it is a stock server or has another."""
        self._asked = True
        if answer.status_code == 404:
            return
        cards = IndexList.model_validate(_json(answer)).data
        self._name = next((card.name for card in cards if card.version == self._index.version), None)

    def _body(self, text: str, k: int, width: int | None, budget: int | None, filters: Filters) -> dict[str, Any]:
        most = EXACT_BUDGET if budget is None else budget
        mode = {"mode": "beam"} if budget == 0 else {"mode": "exact", "budget": most}
        body = {"query": text, "k": k, "beam_width": width, "filters": dict(filters) or None, "index": self._name}
        return RecallRequest.model_validate({**body, **mode}).model_dump()

    def _ranking(self, answer: httpx.Response, *, certain: bool) -> Ranking | None:
        """None too where the result must be certain, and the server's budget did not suffice."""
        response = RecallResponse.model_validate(_json(answer))
        if response.version != self._index.version:  # edited since: this client's records are older
            self._asked, self._name = False, None
            return None
        (result,) = response.results
        if certain and not result.exact:
            return None
        return Ranking(tuple(self._hits(result)), result.exact, result.nodes_expanded)

    def _hits(self, result: RecallResult) -> list[Hit]:
        rows = [self._index.rows_by_id[hit.image_id] for hit in result.hits]
        pairs = zip(rows, result.hits, strict=True)
        return [Hit(row, row, self._index.token_ids(row), min(hit.log_prob, 0.0)) for row, hit in pairs]


def _json(answer: httpx.Response) -> Any:
    if answer.status_code != 200:
        raise ServerError(f"{answer.url} answered {answer.status_code}: {answer.text[:500]}")
    try:
        return answer.json()
    except (ValueError, ValidationError) as error:
        raise ServerError(f"{answer.url} answered no JSON: {answer.text[:200]!r}.") from error
