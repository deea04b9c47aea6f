"""Recall through a server's endpoint: one request per query instead of one per search step.

The server must serve the same version of the index. If the client returns None, the caller falls back to the stock
protocol.

Depends on HTTP and the index; independent of vLLM.
"""

from __future__ import annotations

import logging
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

log = logging.getLogger(__name__)

RECALL = "/recall"


@dataclass(frozen=True)
class RecallQuery:
    """A query for the endpoint.

    text: query text, may be empty for an image query.
    prompt: the prompt of `text` or of an image.
    options: `k`, `width`, `mode` and `max_expansions` are sent. The server computes the leaf filter and the prior
        itself from `filters` and `scoring`.
    filters: metadata filters, None for all images.
    scoring: ranking of hits.
    """

    text: str
    prompt: Prompt
    options: SearchOptions
    filters: RecordFilters | None
    scoring: Scoring


class RecallClient:
    """Client of the route `POST /v1/recall` of `server`."""

    def __init__(self, index: Index, server: Server) -> None:
        self._index = index
        self._server = server
        self._has_warned = False
        self._is_served = True  # until the server responds with 404

    def recall(self, query: RecallQuery) -> Ranking | None:
        """Return the best `k` images.

        Returns:
            None if the server does not serve this version of the index, or the query exceeds the endpoint's limits.
        Raises:
            ServerUnreachable: no server responds.
            ServerError: the response is an error, or contains invalid images.
            ImageError: the image cannot be read.
            QueryError: the image is larger than the server accepts.
        """
        body = self._body(query) if self._is_served else None
        if body is None:
            return None
        with self._server.connection() as connection:
            return self._ranking(connection.request("POST", RECALL, body), query)

    async def arecall(self, query: RecallQuery) -> Ranking | None:
        """Return the best `k` images, asynchronously; see `recall`."""
        body = self._body(query) if self._is_served else None
        if body is None:
            return None
        async with self._server.async_connection() as connection:
            return self._ranking(await connection.request("POST", RECALL, body), query)

    def _body(self, query: RecallQuery) -> dict[str, Any] | None:
        """Return the request body, or None if the query exceeds the limits of the endpoint."""
        options, image = query.options, to_data_url(query.prompt.image) if query.prompt.image else None
        fields: dict[str, Any] = {"query": query.text or None, "image": image, "filters": query.filters}
        fields |= {"k": options.k, "beam_width": options.width, "mode": options.mode}
        fields |= {"max_expansions": options.max_expansions, "scoring": asdict(query.scoring)}
        try:
            return RecallRequest(**fields, version=self._index.version).model_dump(mode="json")
        except ValidationError as error:
            if image is None:
                return None
            raise QueryError(f"the server's endpoint does not accept this query: {error}") from None

    def _ranking(self, answer: httpx.Response, query: RecallQuery) -> Ranking | None:
        """Return the ranking of a response, or None if the caller must search itself.

        This is the case after a 404, or if the result must be exact and the server's `max_expansions` was too small.
        """
        if answer.status_code == 404:  # a stock server, or another version of the index
            self._is_served = False
            return None
        response = _validate(RecallResponse, answer)
        if len(response.results) != 1 or len(response.results[0].hits) > query.options.k:
            raise ServerError(
                f"{response_address(answer)} returned other images than the best {query.options.k} of one query: got "
                f"{[len(result.hits) for result in response.results]} images per query."
            )
        self._check_scoring(response.scoring, query)
        result = response.results[0]
        if query.options.mode == "exact" and query.options.max_expansions is None and not result.exact:
            return None
        return Ranking(tuple(self._hits(result, response_address(answer))), result.exact, result.nodes_expanded)

    def _check_scoring(self, used: Scoring, query: RecallQuery) -> None:
        """Log once if the server should have blended a text query with the encoder of the index, but did not."""
        expected = self._index.manifest.encoder is not None and query.prompt.image is None
        if expected and used.model_weight == 1.0 != query.scoring.model_weight and not self._has_warned:
            self._has_warned = True
            log.warning(
                "the server recalls %s by its trained model alone, because it has not loaded the encoder. Its log and "
                "GET /v1/recall/indexes have the reason.",
                self._index.folder,
            )

    def _hits(self, result: RecallResult, where: str) -> list[Hit]:
        rows = [self._index.rows_by_id.get(hit.image_id, -1) for hit in result.hits]
        if -1 in rows or len(set(rows)) < len(rows):
            raise ServerError(f"{where} returned an image twice, or an image that the index does not have.")
        pairs = zip(rows, result.hits, strict=True)
        return [Hit(row, row, self._index.token_ids(row), min(hit.log_prob, 0.0), hit.ranked_by) for row, hit in pairs]


def _validate(model: Any, answer: httpx.Response) -> Any:
    body = json_object(answer)
    try:
        return model.model_validate(body)
    except (ValidationError, SearchError) as error:
        raise ServerError(
            f"{response_address(answer)} returned something else than a recall response: {error}"
        ) from error
