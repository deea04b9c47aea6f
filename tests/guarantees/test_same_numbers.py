"""Scores do not depend on the process, the batch, the search, or the precision of the weights.

Tolerances in log p: SAME_MODEL between batches of one model, which sum in another order; HALF for weights in half
precision. Only images whose log p differ by less than twice a tolerance may change places. Ties are ordered by the
identifiers' token ids.
"""

import asyncio
import json
import os
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_index_genret import FakeScorer, GenerativeImageRetriever, RecallVerifier
from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import GenretError, NotANumber
from llama_index_genret.evaluation.tuning import image_prior
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.scorers.base import arecall, recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.scorers.vllm_http import VllmScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.store import ScoringChoice
from llama_index_genret.store.build import build_index
from tests.openai_server import OpenAIServer, running

pytestmark = pytest.mark.torch

SAME_MODEL = 1e-4
HALF = {"bfloat16": 0.2, "float16": 0.03}
QUERIES = [
    f"{color} {shape}" for color in ("red", "green", "blue", "a black") for shape in ("bar", "circle", "frame", "x")
]


@pytest.fixture(scope="module")
def scorer(tiny_mllm):
    return TransformersScorer(tiny_mllm)


@pytest.fixture(scope="module")
def numbered(pictures, tiny_mllm, tmp_path_factory):
    """An index with digits as symbols, which the untrained model knows."""
    return build_index(
        read_corpus(pictures), tmp_path_factory.mktemp("numbered") / "index", tiny_mllm, scheme="numeric"
    )


def prompts_of(index, queries=QUERIES):
    return [index.prompts.for_query(index.tokenizer, query) for query in queries]


def ranked(index, scorer, *, batch=8, k=20, **options):
    """Return (image, log p) of the hits of each query, best first."""
    prompts = prompts_of(index)
    parts = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    search = SearchOptions(k=k, **options)
    rankings = [ranking for part in parts for ranking in recall(scorer, index.trie, part, search)]
    return [[(hit.key, hit.log_prob) for hit in ranking.hits] for ranking in rankings]


def assert_same_within(found, expected, tolerance):
    """Compare every log p, and the order of hits that differ by more than twice the tolerance."""
    for one, other in zip(found, expected, strict=True):
        known = dict(other)
        assert dict(one).keys() == known.keys()
        np.testing.assert_allclose([known[key] for key, _ in one], [log_p for _, log_p in one], atol=tolerance)
        in_this_order = [known[key] for key, _ in one]
        assert all(a > b - 2 * tolerance for a, b in pairwise(in_this_order))


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_batch_size_does_not_change_scores(numbered, scorer, batch):
    assert_same_within(ranked(numbered, scorer, batch=batch), ranked(numbered, scorer), SAME_MODEL)


def test_provably_exact_beam_equals_exact_search(numbered, scorer):
    prompts = prompts_of(numbered)
    beams = recall(scorer, numbered.trie, prompts, SearchOptions(k=3))
    exact = recall(scorer, numbered.trie, prompts, SearchOptions(k=3, mode="exact"))
    certain = [(one, other) for one, other in zip(beams, exact, strict=True) if one.exact]
    assert all(other.exact for other in exact)
    assert certain
    for one, other in certain:
        assert [hit.key for hit in one.hits] == [hit.key for hit in other.hits]
        np.testing.assert_allclose([h.log_prob for h in one.hits], [h.log_prob for h in other.hits], atol=SAME_MODEL)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_scores_are_within_tolerance(numbered, scorer, tiny_model_dir, dtype):
    half = TransformersScorer(load_mllm(str(tiny_model_dir), device="cpu", dtype=dtype))
    found, expected = ranked(numbered, half), ranked(numbered, scorer)
    assert_same_within(found, expected, HALF[dtype])


CHILD = """
import json, sys
from pathlib import Path
from llama_index_genret.corpus import read_corpus
from llama_index_genret.store.build import build_index
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.scorers.transformers import TransformersScorer
from tests.guarantees.test_same_numbers import ranked
pictures, model, out = map(Path, sys.argv[1:])
mllm = load_mllm(str(model), device="cpu")
codes = build_index(read_corpus(pictures), out / "codes", mllm)
numbered = build_index(read_corpus(pictures), out / "numbered", mllm, scheme="numeric")
print(json.dumps({"identifiers": codes.identifiers, "ranked": ranked(numbered, TransformersScorer(mllm))}))
"""


def test_other_process_gives_identical_results(pictures, tiny_model_dir, untrained_index, numbered, scorer, tmp_path):
    """Results are equal bit for bit, although string hashes differ between the processes."""
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [sys.executable, "-c", CHILD, str(pictures), str(tiny_model_dir), str(tmp_path)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    output = json.loads(done.stdout.splitlines()[-1])
    assert output["identifiers"] == [list(identifier) for identifier in untrained_index.identifiers]
    assert output["ranked"] == json.loads(json.dumps(ranked(numbered, scorer)))


def test_ties_are_ordered_by_token_ids_in_every_route(untrained_index):
    flat = FakeScorer(untrained_index.tokenizer.vocab_size, spread=0.0)
    index = untrained_index
    for options in ({}, {"mode": "exact"}, {"scoring": ScoringChoice(rerank=20)}, {"normalise": "vocabulary"}):
        retriever = GenerativeImageRetriever(index, flat, similarity_top_k=20, **options)
        found = [(node.score, index.token_ids(index.rows_by_id[node.node_id])) for node in retriever.retrieve("x")]
        assert found == sorted(found, key=lambda pair: (-pair[0], pair[1]))
    scores = [score for score, _ in found]
    assert len(set(scores)) < len(scores)


@dataclass(frozen=True)
class Broken:
    """A scorer with one replaced value among its scores or its log-likelihoods."""

    scorer: FakeScorer
    value: float
    where: str

    @contextmanager
    def session(self, prompts, normalise):
        with self.scorer.session(prompts, normalise) as session:
            yield _BrokenSession(session, self)

    @asynccontextmanager
    async def async_session(self, prompts, normalise):
        async with self.scorer.async_session(prompts, normalise) as session:
            yield _AsyncBrokenSession(session, self)


@dataclass(frozen=True)
class _BrokenSession:
    session: object
    broken: Broken

    def spoilt(self, numbers, where):
        if self.broken.where == where:
            numbers[-1] = self.broken.value
        return numbers

    def score(self, rows):
        return self.spoilt(self.session.score(rows), "scores")

    def log_likelihoods(self, continuations):
        return self.spoilt(self.session.log_likelihoods(continuations), "likelihoods")


class _AsyncBrokenSession(_BrokenSession):
    async def score(self, rows):
        return self.spoilt(await self.session.score(rows), "scores")

    async def log_likelihoods(self, continuations):
        return self.spoilt(await self.session.log_likelihoods(continuations), "likelihoods")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("scores", {}),
        ("scores", {"mode": "exact"}),
        ("scores", {"scoring": ScoringChoice(rerank=3)}),
        ("likelihoods", {"scoring": ScoringChoice(rerank=3)}),
    ],
)
def test_nan_raises_in_search_and_reranking(untrained_index, value, where, options):
    broken = Broken(FakeScorer(untrained_index.tokenizer.vocab_size), value, where)
    retriever = GenerativeImageRetriever(untrained_index, broken, **options)
    with pytest.raises(NotANumber, match="NaN or"):
        retriever.retrieve("red circle")
    with pytest.raises(NotANumber, match="NaN or"):
        asyncio.run(retriever.aretrieve("red circle"))


@pytest.mark.parametrize("where", ["scores", "likelihoods"])
def test_nan_raises_in_verification_and_calibration(untrained_index, where):
    table = FakeScorer(untrained_index.tokenizer.vocab_size)
    found = GenerativeImageRetriever(untrained_index, table).retrieve("red circle")
    verifier = RecallVerifier(GenerativeImageRetriever(untrained_index, Broken(table, np.nan, where)))
    with pytest.raises(NotANumber):
        verifier.postprocess_nodes(found, query_str="red circle")
    with pytest.raises(NotANumber):
        asyncio.run(verifier.apostprocess_nodes(found, query_str="red circle"))
    with pytest.raises(NotANumber):
        verifier.calibrated(["red circle"])


def test_nan_raises_in_the_prior(untrained_index):
    with pytest.raises(NotANumber):
        image_prior(untrained_index, Broken(FakeScorer(untrained_index.tokenizer.vocab_size), np.nan, "scores"))


def test_image_with_probability_zero_is_no_error(untrained_index):
    """Log p = -inf is valid, also with a weight of zero."""
    table = FakeScorer(untrained_index.tokenizer.vocab_size)
    for scoring in (ScoringChoice(rerank=20), ScoringChoice(rerank=20, rerank_weight=0.0)):
        broken = Broken(table, -np.inf, "likelihoods")
        found = GenerativeImageRetriever(untrained_index, broken, similarity_top_k=20, scoring=scoring).retrieve("x")
        assert len(found) == 20
        assert all(0 < node.score <= 1 for node in found)


@pytest.mark.parametrize("answer", ["NaN", "Infinity", "1e999", '"nan"'])
@pytest.mark.parametrize("options", [{}, {"scoring": ScoringChoice(rerank=3)}], ids=["scores", "likelihoods"])
def test_nan_in_a_server_response_raises(untrained_index, answer, options):
    with running(OpenAIServer(vocabulary=untrained_index.tokenizer.vocab_size)) as server:
        server.models = [{"id": "only", "max_model_len": 2000}]
        field = "prompt_logprobs" if options else "top_logprobs"

        def spoil(body):
            text = json.dumps(body)
            return _last_number(text, answer).encode() if field in text else body

        server.spoil = spoil
        retriever = GenerativeImageRetriever(untrained_index, VllmScorer(server.api_base), **options)
        with pytest.raises(GenretError, match=r"NaN or|no JSON|is not a log-probability"):
            retriever.retrieve("red circle")


def _last_number(text, answer):
    place = text.rindex("-")
    end = min(i for i in (text.find("}", place), text.find(",", place)) if i > 0)
    return text[:place] + answer + text[end:]


async def test_nan_in_weights_raises_in_process(numbered, tiny_model_dir):
    mllm = load_mllm(str(tiny_model_dir), device="cpu")
    with torch.no_grad():
        next(mllm.model.get_decoder().layers[0].parameters()).fill_(torch.nan)
    scorer, prompt = TransformersScorer(mllm), prompts_of(numbered)[:1]
    with pytest.raises(NotANumber):
        recall(scorer, numbered.trie, prompt, SearchOptions(k=3))
    with pytest.raises(NotANumber):
        await arecall(scorer, numbered.trie, prompt, SearchOptions(k=3))
    retriever = GenerativeImageRetriever(numbered, scorer)
    with pytest.raises(NotANumber):
        retriever.retrieve("red circle")
