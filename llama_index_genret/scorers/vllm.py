"""A running vLLM OpenAI-compatible server, stock, as a scorer: one round trip a step.

Each step posts the live prefixes as token-id prompts to `/v1/completions` with `max_tokens=1` and reads the
log-probabilities of exactly the trie's children (`logprob_token_ids`), whatever their rank. vLLM's prefix cache
keeps the prompts. Needs httpx only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from llama_index_genret.errors import QueryError, ServerError, ServerUnreachable
from llama_index_genret.prompts import Prompt
from llama_index_genret.scorers.base import AsyncSession, Scores, Session
from llama_index_genret.search import Normalise, Rows

MAX_TOKENS_ASKED = 128
"""vLLM's limit of `logprob_token_ids` in one request."""

ROOM_FOR_IDENTIFIER = 16
"""Tokens of the served context kept free behind the prompt."""

MAX_PROMPTS = 256
"""Prompts in one request; a server's queue holds more, its body limit may not."""


@dataclass(frozen=True)
class Part:
    """A row, or a slice of a row with more children than one request may ask.

    prompt: token ids of the query's prompt and the row's prefix. token_ids: to score, from the row's `start` on.
    """

    row: int
    start: int
    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]


def parts_of(rows: Rows, prompts: Sequence[Prompt]) -> list[Part]:
    """What to ask vLLM for one step: the rows in order, each in as many parts as `MAX_TOKENS_ASKED` needs."""
    return [
        Part(
            i,
            start,
            prompts[row.query].token_ids + row.prefix,
            tuple(row.token_ids[start : start + MAX_TOKENS_ASKED].tolist()),
        )
        for i, row in enumerate(rows)
        for start in range(0, len(row.token_ids), MAX_TOKENS_ASKED)
    ]


class VllmScorer:
    """Scores with a model that a stock vLLM server serves.

    Args:
        api_base: address up to `/v1`, for example `http://127.0.0.1:8000/v1`.
        model: the served name; the server's only model if not given.
        timeout_s: of one request, connecting included.
        weights_id: `Index.weights_id`; a server started by `genret serve` with other weights is then refused.
    """

    def __init__(
        self,
        api_base: str,
        *,
        model: str | None = None,
        api_key: str = "EMPTY",
        timeout_s: float = 60.0,
        weights_id: str | None = None,
    ) -> None:
        self.api_base = api_base.rstrip("/")
        self._model = model
        self._weights_id = weights_id
        self._served: tuple[str, int | None] | None = None
        self._options: dict[str, Any] = {
            "timeout": timeout_s,
            "headers": {"Authorization": f"Bearer {api_key}"},
            "verify": httpx.create_ssl_context() if self.api_base.startswith("https") else False,
        }

    def served_model(self) -> str:
        """The name under which the server serves the model.

        Raises:
            ServerUnreachable, ServerError: nothing answers, or the model is not served.
        """
        with self.session([], Normalise.CHILDREN):
            pass
        return self._served[0] if self._served else ""

    @contextmanager
    def session(self, prompts: Sequence[Prompt], normalise: Normalise) -> Iterator[Session]:
        """See `Scorer.session`.

        Raises:
            ServerUnreachable, ServerError: nothing answers, or the model is not served.
            QueryError: an image prompt, or one longer than the served model reads.
        """
        with httpx.Client(
            transport=httpx.HTTPTransport(retries=2, verify=self._options["verify"]), **self._options
        ) as client:
            with server_errors(self.api_base):
                if self._served is None:
                    self._served = self._choose_model(client.get(f"{self.api_base}/models"))
            _check_prompts(prompts, *self._served)
            yield _HttpSession(client, f"{self.api_base}/completions", self._served[0], prompts)

    @asynccontextmanager
    async def async_session(self, prompts: Sequence[Prompt], normalise: Normalise) -> AsyncIterator[AsyncSession]:
        """See `Scorer.async_session`: a client of its own for each session, so that event loops may come and go."""
        transport = httpx.AsyncHTTPTransport(retries=2, verify=self._options["verify"])
        async with httpx.AsyncClient(transport=transport, **self._options) as client:
            if self._served is None:
                with server_errors(self.api_base):
                    answer = await client.get(f"{self.api_base}/models")
                self._served = self._choose_model(answer)
            _check_prompts(prompts, *self._served)
            yield _AsyncHttpSession(client, f"{self.api_base}/completions", self._served[0], prompts)

    def _choose_model(self, response: httpx.Response) -> tuple[str, int | None]:
        """Name and context length of the served model."""
        models = {m.get("id"): m.get("max_model_len") for m in _json(response).get("data", []) if isinstance(m, dict)}
        ids = {str(name).removeprefix("genret-") for name in models if str(name).startswith("genret-")}
        if self._weights_id and ids and self._weights_id not in ids:
            raise ServerError(
                f"{self.api_base} serves the weights {sorted(ids)}, the index has {self._weights_id}: it was trained "
                "again, or is another one. Restart `genret serve` on this index."
            )
        ours = [name for name in models if not str(name).startswith("genret-")]
        name = self._model or (ours[0] if len(ours) == 1 else None)
        if name not in models:
            raise ServerError(
                f"{self.api_base} serves {sorted(map(str, ours))}, not {name!r}: name one of them as model."
            )
        return str(name), models[name]


@dataclass(frozen=True)
class _HttpSession:
    client: httpx.Client
    url: str
    model: str
    prompts: Sequence[Prompt]

    def score(self, rows: Rows) -> Scores:
        groups = _plan(rows, self.prompts)
        with server_errors(self.url):
            answers = [self.client.post(self.url, json=_request(self.model, group)) for group in groups]
        return _merge(rows, groups, answers)


@dataclass(frozen=True)
class _AsyncHttpSession:
    client: httpx.AsyncClient
    url: str
    model: str
    prompts: Sequence[Prompt]

    async def score(self, rows: Rows) -> Scores:
        groups = _plan(rows, self.prompts)
        with server_errors(self.url):
            posts = [self.client.post(self.url, json=_request(self.model, group)) for group in groups]
            answers = await asyncio.gather(*posts)
        return _merge(rows, groups, answers)


@contextmanager
def server_errors(url: str) -> Iterator[None]:
    """Turn httpx's errors into ours, which tell what to do."""
    try:
        yield
    except httpx.ConnectError as error:
        raise ServerUnreachable(
            f"no server answers at {url}: {error}. Start one with `genret serve INDEX`, or correct the address."
        ) from error
    except httpx.TimeoutException as error:
        raise ServerUnreachable(
            f"{url} did not answer in time: {error!r}. Raise timeout_s, or look at the server."
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerUnreachable(f"the connection to {url} failed: {error!r}.") from error


def _check_prompts(prompts: Sequence[Prompt], model: str, max_model_len: int | None) -> None:
    for prompt in prompts:
        if prompt.image is not None:
            raise QueryError(
                "a stock vLLM server cannot score image queries: recall them with a model in this process."
            )
        if max_model_len and len(prompt.token_ids) > max_model_len - ROOM_FOR_IDENTIFIER:
            raise QueryError(
                f"the query's prompt has {len(prompt.token_ids)} tokens, but {model!r} is served with "
                f"--max-model-len {max_model_len}: shorten the query or raise it."
            )


def _plan(rows: Rows, prompts: Sequence[Prompt]) -> list[list[Part]]:
    """Requests for one step: parts whose children together fit into one `logprob_token_ids`."""
    groups: list[tuple[set[int], list[Part]]] = []
    for part in parts_of(rows, prompts):
        for asked, members in groups:
            if len(members) < MAX_PROMPTS and len(asked | set(part.token_ids)) <= MAX_TOKENS_ASKED:
                asked.update(part.token_ids)
                members.append(part)
                break
        else:
            groups.append((set(part.token_ids), [part]))
    return [members for _, members in groups]


def _request(model: str, group: Sequence[Part]) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": [list(part.prompt) for part in group],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "logprob_token_ids": sorted({token for part in group for token in part.token_ids}),
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
    }


def _merge(rows: Rows, groups: Sequence[Sequence[Part]], answers: Sequence[httpx.Response]) -> Scores:
    scores = np.full(len(rows.token_ids), np.nan)
    for group, answer in zip(groups, answers, strict=True):
        choices = sorted(_json(answer).get("choices", []), key=lambda choice: int(choice.get("index", 0)))
        if len(choices) != len(group):
            raise ServerError(f"{answer.url} answered {len(choices)} choices for {len(group)} prompts.")
        for part, choice in zip(group, choices, strict=True):
            start = rows.offsets[part.row] + part.start
            scores[start : start + len(part.token_ids)] = _read_choice(choice, part, answer.url)
    return scores


def _read_choice(choice: dict[str, Any], part: Part, url: httpx.URL) -> list[float]:
    try:
        top = choice["logprobs"]["top_logprobs"][0]
        return [float(top[f"token_id:{token}"]) for token in part.token_ids]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ServerError(
            f"{url} did not give the log-probabilities asked for ({error!r}). It must be a vLLM server (0.30 or newer) "
            "started with --max-logprobs -1, as `genret serve` does."
        ) from error


def _json(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != 200:
        raise ServerError(f"{response.url} answered {response.status_code}: {response.text[:500]}")
    try:
        body = response.json()
    except ValueError as error:
        raise ServerError(f"{response.url} answered no JSON: {response.text[:200]!r}. Is it a vLLM server?") from error
    if not isinstance(body, dict):
        raise ServerError(f"{response.url} answered {type(body).__name__}, not an object. Is it a vLLM server?")
    return body
