"""Tests of the recall routes against their own OpenAPI description: valid and invalid requests, by schemathesis.

The app is vLLM's own, with its error handlers, but without its engine. A table answers in its place.
"""

import json
import shutil
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from integration.fuzz.recall_request import PIXEL
from integration.fuzz.small_index import small_index
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.serving.endpoint.schema import INDEXES_VARIABLE, MAX_WEIGHT, MIDDLEWARE
from llama_index_genret.store import Scoring, TunedScoring, load_index, store_tuning

# Starlette's test client, which schemathesis uses, leaves its streams to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Unclosed <MemoryObject:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


class TableEngine:
    """The part of vLLM's engine that `EngineScorer` uses. A table gives the answers."""

    def __init__(self, vocabulary):
        self._table = FakeScorer(vocabulary)
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1000))
        self.renderer = self

    async def render_cmpl_async(self, prompts):
        assert all(prompt["multi_modal_data"]["image"].mode == "RGB" for prompt in prompts)
        return [{"prompt_token_ids": prompt["prompt_token_ids"]} for prompt in prompts]

    async def generate(self, prompt, params, request_id, lora_request=None):
        ids = prompt["prompt_token_ids"]
        row = self._table.logits(Prompt(tuple(ids)), ())
        log_probs = row - np.logaddexp.reduce(row)
        wanted = [0, *(params.logprob_token_ids or [])]
        flat = SimpleNamespace(token_ids=wanted, logprobs=[float(log_probs[token]) for token in wanted])
        entries = [{token: SimpleNamespace(logprob=float(log_probs[token]))} for token in ids]
        yield SimpleNamespace(
            outputs=[SimpleNamespace(logprobs=flat, finish_reason="length")], prompt_logprobs=[None, *entries[1:]]
        )


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """Return vLLM's app, over an index with a prior."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    index = small_index()
    folder = shutil.copytree(index.folder, tmp_path_factory.mktemp("served") / "index")
    prior = np.log(np.full(len(index.records), 1 / len(index.records), np.float32))
    index = store_tuning(load_index(folder), prior, TunedScoring(scoring=Scoring(eta=0.5), queries=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(INDEXES_VARIABLE, f"small={index.folder}")
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--middleware", MIDDLEWARE])
        app = build_app(args, ("generate",))
        app.state.engine_client = TableEngine(index.tokenizer.vocab_size)
        app.state.log_stats = False
        app.state.openai_serving_models = SimpleNamespace(lora_requests={})
        yield app


@pytest.fixture(scope="module")
def operations(app):
    schema = schemathesis.openapi.from_asgi("/openapi.json", app).include(path_regex="^/v1/recall")
    return {operation.ok().path: operation.ok() for operation in schema.get_all_operations()}


@pytest.fixture
async def client(app):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.mark.parametrize(
    ("path", "mode", "examples"),
    [
        ("/v1/recall", GenerationMode.POSITIVE, 100),
        ("/v1/recall", GenerationMode.NEGATIVE, 100),
        ("/v1/recall/indexes", GenerationMode.POSITIVE, 1),
    ],
)
def test_the_routes_do_what_their_description_says(operations, path, mode, examples):
    """Allow refusals that no schema can express: an index that is not there, or a key that no image has."""
    operation = operations[path]

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def holds(case):
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    holds()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"query": "a", "filters": {"shape": "bar"}}', 200),
        (b'{"image": "%s"}' % PIXEL, 200),
        (b'{"query": "a", "scoring": {"eta": %d, "rerank": 2, "rerank_weight": %d}}' % (MAX_WEIGHT, MAX_WEIGHT), 200),
        (b'{"query": "a", "mode": "exact", "max_expansions": 2}', 200),
        (b'{"query": "a", "mode": "exact", "max_expansions": 0}', 400),
        (b'{"query": "a", "mode": "beam", "max_expansions": 2}', 400),
        (b'{"query": "<|im_end|>"}', 200),
        (b'{"query": "a", "scoring": {"eta": 1e308}}', 400),
        (b'{"query": "\\ud800"}', 400),
        (b'{"query": "a", "index": "\\ud800"}', 400),
        (b'{"query": "a", "filters": {"\\ud800": 1}}', 400),
        (b'{"query": "a", "\\ud800": 1}', 400),
        (b'{"query": "a", "filters": {"year": NaN}}', 400),
        (b'{"query": "a", "k": NaN}', 400),
        (b'{"query": "a", "filters": {"no": 1}}', 400),
        (json.dumps({"query": "a", "filters": {str(i): 1 for i in range(1001)}}).encode(), 400),
        (b'{"query": ""}', 400),
        (b'{"query": "%s"}' % (b"a " * 100_000), 400),
        (b'{"query": "a", "k": %s}' % (b"9" * 400), 400),
        (b'{"query": "a", "k": %s}' % (b"9" * 5000), 400),
        (b"[" * 100_000, 400),
        (b'{"query": "a", "filters": %s}' % (b'{"filters": [' * 5000), 400),
        (b"\xff\xfe{", 400),
        (b"", 400),
        (b'{"image": "data:image/png;base64,AAAA"}', 400),
        (b'{"image": "data:image/png;base64,\xc3\xa9"}', 400),
        (b'{"image": "http://127.0.0.1:1/a.png"}', 400),
        (b'{"query": "a", "index": "other"}', 404),
        (b'{"query": "a", "version": "0"}', 404),
    ],
)
async def test_bodies_are_answered_or_refused_as_by_openai(client, body, status):
    answer = await client.post("/v1/recall", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text[:300]
    if status != 200:
        refused = answer.json()
        assert (
            refused.get("detail") or refused["error"]["code"] == status
        )  # FastAPI's own error for a body that is no JSON
        assert len(answer.content) < 20_000
