"""One request instead of one a step: recall by a server's own endpoint, where it serves the very version of the index.

Knows HTTP and the index; nothing of vLLM. Whoever calls it falls back to the stock protocol where it gives None.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import httpx

from llama_index_genret.endpoint.wire import EXACT_BUDGET, RecallRequest, RecallResponse, RecallResult
from llama_index_genret.errors import SearchError, ServerError
from llama_index_genret.images import to_data_url
from llama_index_genret.prompts import Prompt
from llama_index_genret.scorers.http import Server, json_object
from llama_index_genret.search import Hit, Ranking
from llama_index_genret.store import Index, MetadataFilters, Scoring

RECALL = "/recall"


@dataclass(frozen=True)
class Query:
    """What one recall asks.

    prompt: of `text` or of an image. scoring: how hits are ranked. The other arguments are those of `search.search`.
    """

    text: str
    prompt: Prompt
    k: int
    width: int | None
    budget: int | None
    filters: MetadataFilters | None
    scoring: Scoring


class RecallClient:
    """Recalls from `POST /v1/recall` of `server`."""

    def __init__(self, index: Index, server: Server) -> None:
        self._index = index
        self._server = server
        self._is_served = True  # until the server says that it is not

    def recall(self, query: Query) -> Ranking | None:
        """The best `k` images, or None where the server does not serve this version of the index.

        Raises:
            ServerUnreachable, ServerError: nothing answers, or with an error. ImageError: the image cannot be read.
        """
        if not self._is_served:
            return None
        with self._server.connection() as connection:
            return self._ranking(connection.request("POST", RECALL, self._body(query)), query)

    async def arecall(self, query: Query) -> Ranking | None:
        """The same for an event loop."""
        if not self._is_served:
            return None
        async with self._server.async_connection() as connection:
            return self._ranking(await connection.request("POST", RECALL, self._body(query)), query)

    def _body(self, query: Query) -> dict[str, Any]:
        most = EXACT_BUDGET if query.budget is None else query.budget
        mode: dict[str, Any] = {"mode": "beam"} if query.budget == 0 else {"mode": "exact", "budget": most}
        image = to_data_url(query.prompt.image) if query.prompt.image else None
        asked: dict[str, Any] = {"query": query.text or None, "image": image, "k": query.k, "beam_width": query.width}
        asked |= {"filters": query.filters, "version": self._index.version}
        request = RecallRequest(**asked, **mode, **asdict(query.scoring))
        return request.model_dump(mode="json")

    def _ranking(self, answer: httpx.Response, query: Query) -> Ranking | None:
        """None too where the result must be certain, and the server's budget did not suffice."""
        if answer.status_code == 404:  # a stock server, or one that has another version
            self._is_served = False
            return None
        result = self._result(answer, query)
        if query.budget is None and not result.exact:
            return None
        pairs = [(self._index.rows_by_id[hit.image_id], hit) for hit in result.hits]
        hits = [Hit(row, row, self._index.token_ids(row), min(hit.log_prob, 0.0), hit.ranked_by) for row, hit in pairs]
        return Ranking(tuple(hits), result.exact, result.nodes_expanded)

    def _result(self, answer: httpx.Response, query: Query) -> RecallResult:
        body = json_object(answer)
        try:
            (result,) = RecallResponse.model_validate(body).results
            found = [hit.image_id for hit in result.hits]
            if len(set(found)) != len(found) or len(found) > query.k or not self._index.rows_by_id.keys() >= set(found):
                raise ValueError(f"{found!r:.200} are not {query.k} images of the index at most, each once")
        except (ValueError, SearchError) as error:
            raise ServerError(f"{answer.url} answered something else than a recall: {error}") from error
        return result
