"""One request instead of one a step: recall by a server's own endpoint, where it serves the very version of the index.

Knows HTTP and the index; nothing of vLLM. Whoever calls it falls back to the stock protocol where it gives None.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import httpx
from pydantic import ValidationError

from llama_index_genret.corpus.images import to_data_url
from llama_index_genret.errors import QueryError, SearchError, ServerError
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.http_client import Server, json_object, response_address
from llama_index_genret.search import Hit, Ranking, SearchOptions
from llama_index_genret.serving.endpoint.schema import RecallRequest, RecallResponse, RecallResult
from llama_index_genret.store import Index, RecordFilters, Scoring

RECALL = "/recall"


@dataclass(frozen=True)
class RecallQuery:
    """What one recall asks.

    prompt: of `text` or of an image. scoring: how hits are ranked.
    options: `k`, `width`, `mode` and `max_expansions` are sent. The server finds the leaf filter and the prior by
        itself, from `filters` and `scoring`.
    """

    text: str
    prompt: Prompt
    options: SearchOptions
    filters: RecordFilters | None
    scoring: Scoring


class RecallClient:
    """Recalls from `POST /v1/recall` of `server`."""

    def __init__(self, index: Index, server: Server) -> None:
        self._index = index
        self._server = server
        self._is_served = True  # until the server says that it is not

    def recall(self, query: RecallQuery) -> Ranking | None:
        """The best `k` images, or None where the server does not serve this version of the index, or not so many.

        Raises:
            ServerUnreachable, ServerError: nothing answers, or with an error, or with images that cannot be.
            ImageError: the image cannot be read. QueryError: it is larger than the server takes.
        """
        body = self._body(query) if self._is_served else None
        if body is None:
            return None
        with self._server.connection() as connection:
            return self._ranking(connection.request("POST", RECALL, body), query)

    async def arecall(self, query: RecallQuery) -> Ranking | None:
        """The same for an event loop."""
        body = self._body(query) if self._is_served else None
        if body is None:
            return None
        async with self._server.async_connection() as connection:
            return self._ranking(await connection.request("POST", RECALL, body), query)

    def _body(self, query: RecallQuery) -> dict[str, Any] | None:
        """None where it is beyond the limits of the endpoint."""
        options, image = query.options, to_data_url(query.prompt.image) if query.prompt.image else None
        asked: dict[str, Any] = {"query": query.text or None, "image": image, "filters": query.filters}
        asked |= {"k": options.k, "beam_width": options.width, "mode": options.mode}
        asked |= {"max_expansions": options.max_expansions, "scoring": asdict(query.scoring)}
        try:
            return RecallRequest(**asked, version=self._index.version).model_dump(mode="json")
        except ValidationError as error:
            if image is None:
                return None
            raise QueryError(f"the server's endpoint does not take this query: {error}") from None

    def _ranking(self, answer: httpx.Response, query: RecallQuery) -> Ranking | None:
        """Return None also where the result must be exact, and the server's `max_expansions` did not suffice."""
        if answer.status_code == 404:  # a stock server, or one that has another version
            self._is_served = False
            return None
        response = _validate(RecallResponse, answer)
        if len(response.results) != 1 or len(response.results[0].hits) > query.options.k:
            raise ServerError(
                f"{response_address(answer)} answered other images than the best {query.options.k} of one query."
            )
        result = response.results[0]
        if query.options.mode == "exact" and query.options.max_expansions is None and not result.exact:
            return None
        return Ranking(tuple(self._hits(result, response_address(answer))), result.exact, result.nodes_expanded)

    def _hits(self, result: RecallResult, where: str) -> list[Hit]:
        rows = [self._index.rows_by_id.get(hit.image_id, -1) for hit in result.hits]
        if -1 in rows or len(set(rows)) < len(rows):
            raise ServerError(f"{where} answered an image twice, or one that the index does not have.")
        pairs = zip(rows, result.hits, strict=True)
        return [Hit(row, row, self._index.token_ids(row), min(hit.log_prob, 0.0), hit.ranked_by) for row, hit in pairs]


def _validate(model: Any, answer: httpx.Response) -> Any:
    body = json_object(answer)
    try:
        return model.model_validate(body)
    except (ValidationError, SearchError) as error:
        raise ServerError(f"{response_address(answer)} answered something else than a recall: {error}") from error
