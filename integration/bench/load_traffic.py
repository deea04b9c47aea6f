"""The clients of the load test: each sends one request after another, and judges every answer.

Depends on HTTP, the reference and the effects of an outage; independent of how the server is started or measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from integration.bench.load_faults import FAULTS, Target
from integration.bench.load_reference import QUESTIONS, EditedIndex, Question, Reference

SHARES = {
    **{"beam": 30, "exact": 8, "filtered": 15, "batch": 8, "cancelled": 15, "chat": 5},
    **{"malformed": 4, "wrong types": 6, "megabyte": 1, "unknown index": 4, "unknown route": 4},
}
"""Kinds of requests, and the weight with which each is drawn."""

MOST_IN_A_BATCH = 8
LONGEST_STAY_S = 0.05
"""Seconds within which a disconnecting client disconnects."""

PAUSE_S = 0.5
"""Seconds that a client waits when the server is down."""

MALFORMED = (
    b"",
    b"{",
    b'{"query": "red dog"',
    b"\xff\xfe",
    b'{"query": "a" "k": 1}',
    b"query=dog",
    b"nul",
)
WRONG = (
    *([], "red dog", 5, None, {}, {"query": 5}, {"query": ["red dog"]}, {"query": None}, {"query": " "}),
    *({"queries": "red dog"}, {"queries": []}, {"queries": ["red", 1]}, {"query": "a", "queries": ["b"]}),
    *({"query": "a", "k": "many"}, {"query": "a", "k": 0}, {"query": "a", "k": 10**9}, {"query": "a", "k": 1.5}),
    *({"query": "a", "filters": [1]}, {"query": "a", "filters": {"no such key": 1}}, {"query": "a", "mode": "best"}),
    *({"query": "a", "max_expansions": -1}, {"query": "a", "beam_width": 0}, {"query": "a", "index": 3}),
)
ROUTES = ("/v1/recal", "/v1/recall/index", "/v2/recall", "/recall")


class TurnedAway(Exception):
    """Return True if the server says that it cannot answer a recall now."""

    def __init__(self, answer: httpx.Response) -> None:
        super().__init__(f"status {answer.status_code}: {answer.text[:300]}")
        self.status, self.retry_after = answer.status_code, answer.headers.get("Retry-After")
        self.is_by_proxy = "the proxy" in answer.text


@dataclass
class Tally:
    """The outcomes of the requests of one kind. Each request is counted under one outcome."""

    outcomes: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)


@dataclass
class Traffic:
    """The results of all clients so far.

    excuses: returns True if there was an outage between two times. is_limited: the server limits the recalls.
    """

    name: str
    reference: Reference
    index: EditedIndex
    texts: Sequence[str]
    tallies: dict[str, Tally] = field(default_factory=lambda: {kind: Tally() for kind in (*SHARES, *FAULTS)})
    problems: list[str] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)
    stalest_s: float = 0.0
    excuses: Callable[[float, float], bool] = lambda start_s, end_s: False
    is_limited: bool = False

    @property
    def answered_recalls(self) -> int:
        """Return the number of recalls that were answered."""
        return sum(self.tallies[kind].outcomes["answered"] for kind in (*QUESTIONS, "batch", "cancelled"))

    async def client(self, http: httpx.AsyncClient, seed: int, end: float) -> None:
        """Run one client, which sends the next request as soon as the last has an answer."""
        draw = random.Random(seed)
        while time.monotonic() < end:
            (kind,) = draw.choices(list(SHARES), list(SHARES.values()))
            start, outcome, problem, pause_s = time.monotonic(), "unanswered", "", 0.0
            try:
                outcome, problem = await self._request(http, kind, draw)
            except TurnedAway as error:
                outcome, problem = "turned away", str(error)
                if self.is_limited and error.retry_after and not error.is_by_proxy:
                    problem = ""
                pause_s = float(error.retry_after or 0) * draw.random()
            except httpx.TimeoutException as error:
                self.problems.append(f"{kind}: hangs: {error!r}")
            except httpx.HTTPError as error:
                problem = f"no answer: {error!r}"
            self._note(kind, start, outcome, problem)
            await asyncio.sleep(PAUSE_S if outcome == "unanswered" else pause_s)

    def _note(self, kind: str, start: float, outcome: str, problem: str) -> None:
        """Count a request. In an outage it may be refused or unanswered, but not answered wrongly."""
        tally = self.tallies[kind]
        failed = outcome in ("unanswered", "turned away") or (kind == "chat" and "status 5" in problem)
        if problem and failed and self.excuses(start, time.monotonic()):
            tally.outcomes["in an outage"] += 1
            return
        if problem:
            self.problems.append(f"{kind}: {problem}")
        tally.outcomes["wrong" if problem and not failed else outcome] += 1
        if outcome != "cancelled":
            tally.latencies_s.append(time.monotonic() - start)

    async def faulty(self, target: Target, seed: int, end: float) -> None:
        """Run one client that misuses its connections."""
        draw = random.Random(seed)
        while time.monotonic() < end:
            kind = draw.choice(list(FAULTS))
            start = time.monotonic()
            try:
                problem = await FAULTS[kind](target, draw)
                outcome = "ended"
            except OSError as error:
                outcome, problem = "unanswered", f"no connection: {error!r}"
            self._note(kind, start, outcome, problem)
            await asyncio.sleep(PAUSE_S)

    async def _request(self, http: httpx.AsyncClient, kind: str, draw: random.Random) -> tuple[str, str]:
        """Send a request. Returns (outcome, problem)."""
        if kind in QUESTIONS:
            return await self.recall(http, [draw.choice(self.texts)], draw.choice(QUESTIONS[kind]))
        if kind == "batch":
            texts = draw.choices(self.texts, k=draw.randint(1, MOST_IN_A_BATCH))
            return await self.recall(http, texts, draw.choice(QUESTIONS[draw.choice(list(QUESTIONS))]), batch=True)
        if kind == "cancelled":
            question = draw.choice(QUESTIONS[draw.choice(list(QUESTIONS))])
            staying = asyncio.create_task(self.recall(http, [draw.choice(self.texts)], question))
            done, _ = await asyncio.wait({staying}, timeout=draw.uniform(0, LONGEST_STAY_S))
            if not done:
                staying.cancel()
                await asyncio.wait({staying})
            return ("cancelled", "") if staying.cancelled() else staying.result()
        if kind == "chat":
            return await self._chat(http, draw.choice(self.texts))
        return await _refused(http, *_wrong_request(kind, self.name, draw))

    async def recall(
        self, http: httpx.AsyncClient, texts: Sequence[str], question: Question, *, batch: bool = False
    ) -> tuple[str, str]:
        """Send a recall and judge the answer. Returns ("answered", problem)."""
        oldest, queries = self.index.oldest_allowed(), {"queries": list(texts)} if batch else {"query": texts[0]}
        sent = time.monotonic()
        answer = await http.post("/v1/recall", json={**queries, **question.body(), "index": self.name})
        if answer.status_code == 503:
            raise TurnedAway(answer)
        if answer.status_code != 200:
            return "answered", f"status {answer.status_code}: {answer.text[:300]}"
        body = answer.json()
        edition = await self.index.edition(body["version"])
        if edition is None:
            return "answered", f"version {body['version']} was never written"
        if edition.number < oldest:
            return "answered", f"edition {edition.number}, but {oldest} was there when the request was sent"
        self.versions.add(edition.number)
        self.stalest_s = max(self.stalest_s, sent - self.index.replaced_s(edition))
        if len(body["results"]) != len(texts):
            return "answered", f"{len(body['results'])} results for {len(texts)} queries"
        pairs = zip(texts, body["results"], strict=True)
        problems = (self.reference.problem(edition.state, text, question, result) for text, result in pairs)
        what = next(filter(None, problems), "")
        return "answered", what and f"edition {edition.number}, {question}, {texts}: {what}"

    async def _chat(self, http: httpx.AsyncClient, text: str) -> tuple[str, str]:
        body = {"model": "genret", "messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0}
        answer = await http.post("/v1/chat/completions", json=body)
        right = answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1
        return "answered", "" if right else f"status {answer.status_code}: {answer.text[:300]}"


def _wrong_request(kind: str, name: str, draw: random.Random) -> tuple[str, bytes, int]:
    """Draw (route, body, expected status)."""
    if kind == "malformed":
        return "/v1/recall", draw.choice(MALFORMED), 400
    if kind == "wrong types":
        wrong = draw.choice(WRONG)
        return (
            "/v1/recall",
            json.dumps({**wrong, "index": name, **wrong} if isinstance(wrong, dict) else wrong).encode(),
            400,
        )
    if kind == "megabyte":
        long = draw.choice(["x" * 1_000_000, "red dog " * 125_000, "\U0001f415" * 250_000])
        return "/v1/recall", json.dumps({"query": long, "index": name}).encode(), 400
    if kind == "unknown index":
        return (
            "/v1/recall",
            json.dumps({"query": "red dog", "index": draw.choice(["", "nowhere", f"{name}/.."])}).encode(),
            404,
        )
    return draw.choice(ROUTES), json.dumps({"query": "red dog", "index": name}).encode(), 404


async def _refused(http: httpx.AsyncClient, route: str, content: bytes, status: int) -> tuple[str, str]:
    answer = await http.post(route, content=content, headers={"Content-Type": "application/json"})
    if answer.status_code == 503:
        raise TurnedAway(answer)
    if answer.status_code != status:
        return "refused", f"{content[:80]!r} to {route}: status {answer.status_code}, not {status}: {answer.text[:300]}"
    said: Mapping[str, Any] = answer.json()
    error = said.get("error") or {}
    if route == "/v1/recall" and (error.get("code") != status or not error.get("message")):
        return "refused", f"{content[:80]!r}: the error is not of the OpenAI API's shape: {answer.text[:300]}"
    return "refused", ""
