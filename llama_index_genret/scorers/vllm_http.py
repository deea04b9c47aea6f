"""Score with a stock vLLM OpenAI-compatible server, in one round trip per step.

Each step posts the live prefixes as token-id prompts to `/v1/completions` with `max_tokens=1`. It reads the
log-probabilities of exactly the trie's children (`logprob_token_ids`), whatever their rank. vLLM's prefix cache
keeps the prompts. Needs httpx only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from llama_index_genret.errors import QueryError, ServerError
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import AsyncSession, Scores, Session
from llama_index_genret.scorers.http_client import (
    AsyncConnection,
    Connection,
    Server,
    json_objects,
    response_address,
    shown_address,
)
from llama_index_genret.scorers.rerank import Continuation, Float64
from llama_index_genret.search import Normalise, Rows

SERVED_NAME = "genret"
"""Name under which `genret serve` serves the model that answers questions."""

MAX_LOGPROB_TOKENS = 128
"""Limit of vLLM for `logprob_token_ids` in one request."""

ROOM_FOR_IDENTIFIER = 16
"""Tokens of the served context that stay free after the prompt."""

ROUNDING = 1e-2
"""Tolerance for log-probabilities above 0: servers compute with 16 bits."""

MAX_PROMPTS = 256
"""Maximum number of prompts in one request. The queue of a server accepts more, but its body limit may not."""


def served_name(weights_id: str) -> str:
    """Return the name of the model that recalls with the weights of an index; clients check the weights by it."""
    return f"{SERVED_NAME}-{weights_id}"


@dataclass(frozen=True)
class RowSlice:
    """A row, or a slice of a row that has more children than one request may contain.

    row: position of the row in its step.
    start: position of the first token of the slice in its row.
    query: position of the prompt in its session.
    prefix: the tokens that follow the prompt.
    token_ids: the tokens to score.
    """

    row: int
    start: int
    query: int
    prefix: tuple[int, ...]
    token_ids: tuple[int, ...]


def row_slices(rows: Rows) -> list[RowSlice]:
    """Split the rows of one step into slices of at most `MAX_LOGPROB_TOKENS` tokens, in order."""
    return [
        RowSlice(
            i,
            start,
            row.query,
            row.prefix,
            tuple(row.token_ids[start : start + MAX_LOGPROB_TOKENS].tolist()),
        )
        for i, row in enumerate(rows)
        for start in range(0, len(row.token_ids), MAX_LOGPROB_TOKENS)
    ]


class VllmScorer:
    """A scorer with a model that a stock vLLM server serves.

    Args:
        api_base: address up to `/v1`, for example `http://127.0.0.1:8000/v1`.
        model: served name of the model, default the only model of the server.
        api_key: bearer token, default "EMPTY".
        timeout_s: seconds for one request, connecting and retries included, default 60.
        weights_id: `Index.weights_id`. If given, a server that `genret serve` started with other weights is rejected.
        headers: sent with each request in addition to the key, default none.
    """

    def __init__(
        self,
        api_base: str,
        *,
        model: str | None = None,
        api_key: str = "EMPTY",
        timeout_s: float = 60.0,
        weights_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.server = Server(api_base.rstrip("/"), api_key, timeout_s, headers or {})
        self._model = model
        self._weights_id = weights_id
        self._served: tuple[str, int | None] | None = None

    def served_model(self) -> str:
        """Return the name under which the server serves the model that answers questions.

        Raises:
            ServerUnreachable: the server does not respond.
            ServerError: the server does not serve the model.
        """
        with self.session([], Normalise.CHILDREN):
            name = self._served[0] if self._served else ""
        return SERVED_NAME if name == served_name(self._weights_id or "") else name

    @contextmanager
    def session(self, prompts: Sequence[Prompt], normalise: Normalise) -> Iterator[Session]:
        """See `Scorer.session`.

        Raises:
            ServerUnreachable: the server does not respond.
            ServerError: the server does not serve the model.
            QueryError: a prompt has an image, or is longer than the served context allows.
        """
        with self.server.connection() as connection:
            if self._served is None:
                self._served = self._choose_model(connection.request("GET", "/models"))
            _check_prompts(prompts, *self._served)
            yield _HttpSession(connection, *self._served, prompts)

    @asynccontextmanager
    async def async_session(self, prompts: Sequence[Prompt], normalise: Normalise) -> AsyncIterator[AsyncSession]:
        """See `Scorer.async_session`. Each session has its own client, so that event loops may come and go."""
        async with self.server.async_connection() as connection:
            if self._served is None:
                self._served = self._choose_model(await connection.request("GET", "/models"))
            _check_prompts(prompts, *self._served)
            yield _AsyncHttpSession(connection, *self._served, prompts)

    def _choose_model(self, response: httpx.Response) -> tuple[str, int | None]:
        """Return name and context length of the served model."""
        models = _read_models(response)
        where = shown_address(self.server.api_base)
        recalling = [name for name in models if name.startswith(served_name(""))]
        own = served_name(self._weights_id or "")
        if self._weights_id and recalling and own not in recalling:
            raise ServerError(
                f"{where} serves the weights {sorted(n.removeprefix(served_name('')) for n in recalling)}, but "
                f"the index has {self._weights_id}: it was trained or extended since, or it is another index. Restart "
                "`genret serve` on this index."
            )
        others = [name for name in models if name not in recalling]
        name = self._model or (own if own in recalling else others[0] if len(others) == 1 else None)
        if name is None or name not in models:
            raise ServerError(f"{where} serves {sorted(others)}, not {name!r}: pass one of them as model.")
        return name, models[name]


@dataclass(frozen=True)
class _HttpSession:
    connection: Connection
    model: str
    max_model_len: int | None
    prompts: Sequence[Prompt]

    def score(self, rows: Rows) -> Scores:
        groups = _plan(rows)
        responses = [
            self.connection.request("POST", "/completions", _request(self.model, self.prompts, group))
            for group in groups
        ]
        return _merge(rows, groups, responses)

    def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        groups = _likelihood_groups(continuations, self.model, self.max_model_len)
        posts = [_likelihood_request(self.model, group) for group in groups]
        responses = [self.connection.request("POST", "/completions", post) for post in posts]
        return _read_likelihoods(groups, responses)


@dataclass(frozen=True)
class _AsyncHttpSession:
    connection: AsyncConnection
    model: str
    max_model_len: int | None
    prompts: Sequence[Prompt]

    async def score(self, rows: Rows) -> Scores:
        groups = _plan(rows)
        posts = [
            self.connection.request("POST", "/completions", _request(self.model, self.prompts, group))
            for group in groups
        ]
        return _merge(rows, groups, await asyncio.gather(*posts))

    async def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        groups = _likelihood_groups(continuations, self.model, self.max_model_len)
        posts = [_likelihood_request(self.model, group) for group in groups]
        responses = await asyncio.gather(*(self.connection.request("POST", "/completions", post) for post in posts))
        return _read_likelihoods(groups, responses)


def _read_models(response: httpx.Response) -> dict[str, int | None]:
    """Return the context length of every served model, None if the server does not report it."""
    models = json_objects(response, "data")
    lengths = {model.get("id"): model.get("max_model_len") for model in models if isinstance(model.get("id"), str)}
    return {str(name): length if type(length) is int and length > 0 else None for name, length in lengths.items()}


def _check_prompts(prompts: Sequence[Prompt], model: str, max_model_len: int | None) -> None:
    for prompt in prompts:
        if prompt.image is not None:
            raise QueryError(
                "a stock vLLM server cannot score image queries: recall them through the endpoint of `genret serve` "
                "on this version of the index, or with a model in this process."
            )
        if max_model_len and len(prompt.token_ids) > max_model_len - ROOM_FOR_IDENTIFIER:
            raise QueryError(
                f"the query's prompt has {len(prompt.token_ids)} tokens, but {model!r} is served with "
                f"--max-model-len {max_model_len}, of which {ROOM_FOR_IDENTIFIER} are for the identifier: shorten the "
                "query or raise the limit."
            )


def _plan(rows: Rows) -> list[list[RowSlice]]:
    """Group the slices of one step into requests; the tokens of a group fit into one `logprob_token_ids`."""
    groups: list[tuple[set[int], list[RowSlice]]] = []
    for part in row_slices(rows):
        for tokens, members in groups:
            if len(members) < MAX_PROMPTS and len(tokens | set(part.token_ids)) <= MAX_LOGPROB_TOKENS:
                tokens.update(part.token_ids)
                members.append(part)
                break
        else:
            groups.append((set(part.token_ids), [part]))
    return [members for _, members in groups]


def _request(model: str, prompts: Sequence[Prompt], group: Sequence[RowSlice]) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": [[*prompts[part.query].token_ids, *part.prefix] for part in group],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "logprob_token_ids": sorted({token for part in group for token in part.token_ids}),
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
    }


def _merge(rows: Rows, groups: Sequence[Sequence[RowSlice]], responses: Sequence[httpx.Response]) -> Scores:
    scores = np.full(len(rows.token_ids), np.nan)
    for group, response in zip(groups, responses, strict=True):
        for part, choice in zip(group, _read_choices(response, len(group)), strict=True):
            start = rows.offsets[part.row] + part.start
            scores[start : start + len(part.token_ids)] = _read_scores(choice, part, response_address(response))
    return scores


def _read_choices(response: httpx.Response, n_prompts: int) -> list[dict[str, Any]]:
    choices = json_objects(response, "choices")
    if len(choices) == n_prompts == 1:
        return choices
    by_index = {choice["index"]: choice for choice in choices if type(choice.get("index")) is int}
    if by_index.keys() != set(range(n_prompts)) or len(choices) != n_prompts:
        raise ServerError(
            f"{response_address(response)} returned other choices than one for each of {n_prompts} prompts. Check "
            "that it is a vLLM server."
        )
    return [by_index[place] for place in range(n_prompts)]


def _likelihood_groups(
    continuations: Sequence[Continuation], model: str, max_model_len: int | None
) -> list[Sequence[Continuation]]:
    """Split into requests of at most `MAX_PROMPTS`, after checking that all fit into the model's context."""
    _check_prompts([one.whole for one in continuations], model, max_model_len)
    return [continuations[start : start + MAX_PROMPTS] for start in range(0, len(continuations), MAX_PROMPTS)]


def _likelihood_request(model: str, group: Sequence[Continuation]) -> dict[str, Any]:
    """Request with `prompt_logprobs` 0, which returns the log-probability of each prompt token and of no others."""
    prompt = [list(one.whole.token_ids) for one in group]
    options = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "add_special_tokens": False}
    return {"model": model, "prompt": prompt, **options}


def _read_likelihoods(groups: Sequence[Sequence[Continuation]], responses: Sequence[httpx.Response]) -> Float64:
    likelihoods = []
    for group, response in zip(groups, responses, strict=True):
        for one, choice in zip(group, _read_choices(response, len(group)), strict=True):
            try:
                places = choice["prompt_logprobs"][-len(one.token_ids) :]
                pairs = zip(places, one.token_ids, strict=True)
                likelihoods.append(sum(_log_prob(place[str(token)]["logprob"]) for place, token in pairs))
            except _MALFORMED as error:
                raise ServerError(
                    f"{response_address(response)} did not return the log-probabilities of the prompt that re-ranking "
                    f"needs ({error!r}). It must be a vLLM server (0.30 or newer)."
                ) from error
    return np.array(likelihoods)


_MALFORMED = (KeyError, IndexError, TypeError, ValueError, OverflowError)


def _log_prob(value: Any) -> float:
    """Return the number, which may be minus infinity. Raise ValueError if it cannot be a log-probability."""
    number = float(value)
    if not number <= ROUNDING:
        raise ValueError(f"{number} is not a log-probability")
    return number


def _read_scores(choice: dict[str, Any], part: RowSlice, url: str) -> list[float]:
    try:
        top = choice["logprobs"]["top_logprobs"][0]
        return [_log_prob(top[f"token_id:{token}"]) for token in part.token_ids]
    except _MALFORMED as error:
        raise ServerError(
            f"{url} did not return the requested log-probabilities ({error!r}). It must be a vLLM server (0.30 or "
            "newer) started with --max-logprobs -1, as `genret serve` does."
        ) from error
