"""The answers of a server to the clients of this package: the first byte selects the request, the rest is the answer.

For any answer the client raises an error of this package, or returns results that could be true.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import httpx
import numpy as np

from integration.fuzz.small_index import small_index
from llama_index_genret.errors import QueryError, ServerError
from llama_index_genret.scorers.http_client import Server
from llama_index_genret.scorers.rerank import Continuation
from llama_index_genret.scorers.vllm_http import VllmScorer
from llama_index_genret.search import Normalise, Row, Rows, SearchOptions
from llama_index_genret.serving.endpoint.client import RecallClient, RecallQuery
from llama_index_genret.store import Scoring

MODELS, COMPLETIONS, LIKELIHOODS, RECALL = b"m", b"c", b"l", b"r"
ROWS = Rows.of([Row(0, (), np.array([3, 4])), Row(1, (5,), np.array([7]))])


def _choice(number: int, **logprobs: object) -> dict[str, object]:
    return {"index": number, **logprobs}


def _seeds() -> tuple[bytes, ...]:
    models = {"data": [{"id": "only", "max_model_len": 500}]}
    tops = [{"token_id:3": -1.5, "token_id:4": -0.25, "token_id:7": -9}, {"token_id:7": -0.0, "token_id:3": -1e3}]
    scored = {"choices": [_choice(i, logprobs={"top_logprobs": [top]}) for i, top in enumerate(tops)]}
    entries = [None, {"3": {"logprob": -0.5}}, {"4": {"logprob": -1}, "9": {"logprob": -0.1}}]
    likely = {"choices": [_choice(0, prompt_logprobs=entries)]}
    hits = [
        {
            "image_id": name,
            "file_name": "",
            "caption": "",
            "identifier": "",
            "score": 0.5,
            "log_prob": -0.7,
            "metadata": {},
        }
        for name in ("a", "third")
    ]
    result = {"query": "red", "hits": hits, "exact": True, "nodes_expanded": 4}
    scoring = {"eta": 0.0, "rerank": 0, "rerank_weight": 1.0, "rerank_by": "identifier"}
    recalled = {"index": "x", "version": small_index().version, "scoring": scoring, "results": [result]}
    answers = ((MODELS, models), (COMPLETIONS, scored), (LIKELIHOODS, likely), (RECALL, recalled))
    return tuple(kind + json.dumps(answer).encode() for kind, answer in answers)


SEEDS = _seeds()
WORDS = (
    *(
        b'"data"',
        b'"id"',
        b'"max_model_len"',
        b'"choices"',
        b'"index"',
        b'"logprobs"',
        b'"top_logprobs"',
        b'"token_id:3"',
    ),
    *(b'"prompt_logprobs"', b'"logprob"', b'"hits"', b'"results"', b'"image_id"', b'"log_prob"', b'"ranked_by"'),
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1" * 400, b"null", b"true", b"[[[[", b"{}", b"\\ud800", b"-1"),
)


@dataclass(frozen=True)
class Played(Server):
    """A server that answers every request with `content`, except the list of models, which is fixed."""

    content: bytes = b""
    request_kind: bytes = field(default=MODELS)

    @contextmanager
    def connection(self) -> Iterator["Played"]:
        yield self

    def request(self, method: str, path: str, body: object = None) -> httpx.Response:
        content = SEEDS[0][1:] if path == "/models" and self.request_kind != MODELS else self.content
        return httpx.Response(200, content=content, request=httpx.Request(method, f"{self.api_base}{path}"))


@cache
def _prompt() -> object:
    return small_index().prompts.for_query(small_index().tokenizer, "red")


def one(data: bytes) -> None:
    kind, server = data[:1], Played("http://none/v1", content=data[1:], request_kind=data[:1])
    try:
        (_recall if kind == RECALL else _score)(server)
    except ServerError:
        return
    except QueryError:  # the server reports a shorter maximum length
        assert kind == MODELS


def _score(server: Played) -> None:
    scorer, prompt = VllmScorer(server.api_base), _prompt()
    scorer.server = server
    if server.request_kind == MODELS:
        assert isinstance(scorer.served_model(), str)
    with scorer.session([prompt, prompt], Normalise.CHILDREN) as session:
        if server.request_kind == COMPLETIONS:
            scores = np.asarray(session.score(ROWS))
            assert scores.shape == (3,)
        elif server.request_kind == LIKELIHOODS:
            scores = session.log_likelihoods([Continuation(prompt, (3, 4))])
            assert scores.shape == (1,)
        else:
            return
        assert not np.isnan(scores).any(), scores
        assert (scores <= 0.01).all(), scores


def _recall(server: Played) -> None:
    index = small_index()
    ranking = RecallClient(index, server).recall(RecallQuery("red", _prompt(), SearchOptions(k=2), None, Scoring()))
    assert ranking is not None
    assert len(ranking.hits) <= 2
    assert len({hit.key for hit in ranking.hits}) == len(ranking.hits)
    for hit in ranking.hits:
        assert 0 <= hit.score <= 1
        assert hit.ranked_by is None or np.isfinite(hit.ranked_by)
        assert index.record_of(hit).image_id
