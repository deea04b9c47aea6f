"""Evaluation covers refused queries and image queries, and matches the evaluator of LlamaIndex."""

import asyncio

import numpy as np
import pytest
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.evaluation.retrieval.metrics import MRR, NDCG

from llama_index_genret import FakeScorer, GenerativeImageRetriever
from llama_index_genret.errors import CorpusError
from llama_index_genret.evaluation.baselines import evaluation_by_score
from llama_index_genret.evaluation.evaluate import evaluate
from llama_index_genret.evaluation.metrics import mean_reciprocal_rank, ndcg_at
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.store.queries import EvaluationQuery, read_queries
from tests.evaluation.test_metrics import interval_by_loops
from tests.store.test_queries import write

pytestmark = pytest.mark.torch


def test_intervals_draw_queries_of_an_image_together(untrained_index):
    records = untrained_index.records
    queries = [EvaluationQuery(f"{r.captions[0]} {n}", frozenset([r.image_id])) for r in records[:6] for n in range(3)]
    scores = np.zeros((18, len(records)))
    scores[np.arange(9), np.repeat(np.arange(6), 3)[:9]] = 1  # the first three images are found
    evaluation = evaluation_by_score(scores, records, queries)
    figures = evaluation.figures()
    assert figures["recall@1"] == 0.5
    expected = interval_by_loops([1.0] * 9 + [0.0] * 9, [query.image_ids for query in queries], 0.95, 0)
    assert figures["interval"]["recall@1"] == pytest.approx(list(expected))
    assert set(figures["interval"]) == {"recall@1", "recall@5", "recall@10", "mrr", "ndcg@10"}


def test_image_query_is_read_and_evaluated(trained_index, trained_mllm, tmp_path):
    record = trained_index.records[3]
    (tmp_path / "q.png").write_bytes(record.path.read_bytes())
    path = write(tmp_path / "q.jsonl", {"image": "q.png", "image_id": record.image_id, "kind": "image"})
    queries = read_queries(path, trained_index.records)
    assert queries == [EvaluationQuery("", frozenset([record.image_id]), "image", tmp_path / "q.png")]
    result = evaluate(trained_index, TransformersScorer(trained_mllm), queries)
    assert len(result.ranked[0]) == 10
    (tmp_path / "q.png").unlink()
    with pytest.raises(CorpusError, match=r"line 1.*q\.png does not exist"):
        read_queries(path, trained_index.records)


def test_refused_query_counts_as_a_miss(untrained_index):
    scorer = FakeScorer(untrained_index.tokenizer.vocab_size)
    everything = frozenset(record.image_id for record in untrained_index.records)
    result = evaluate(untrained_index, scorer, [EvaluationQuery("red", everything), EvaluationQuery(" ", everything)])
    figures = result.figures()
    assert (figures["n"], figures["recall@1"]) == (2, 0.5)
    assert len(result.latency_ms) == 2


@pytest.mark.parametrize("how", ["sync", "async"])
def test_llama_index_evaluator_gives_the_same_figures(untrained_index, how):
    """Per query, its `hit_rate` is our recall@k. Its `recall` is equal too if one image is right.

    With several right images, its recall is the share of them among the results.
    """
    records, scorer = untrained_index.records, FakeScorer(untrained_index.tokenizer.vocab_size)
    wanted = [[r.image_id for r in records[n : n + 1 + n % 3]] for n in range(len(records) - 3)]
    queries = [EvaluationQuery(records[n].captions[0], frozenset(ids)) for n, ids in enumerate(wanted)]
    ours = evaluate(untrained_index, scorer, queries)
    retriever = GenerativeImageRetriever(untrained_index, scorer, similarity_top_k=10)
    theirs = RetrieverEvaluator.from_metric_names(["hit_rate", "mrr", "recall", "ndcg"], retriever=retriever)
    pairs = [(query.text, sorted(query.image_ids)) for query in queries]
    results = (
        [theirs.evaluate(*pair) for pair in pairs]
        if how == "sync"
        else [asyncio.run(theirs.aevaluate(*pair)) for pair in pairs]
    )
    figures = {name: [r.metric_vals_dict[name] for r in results] for name in ("hit_rate", "mrr", "recall", "ndcg")}
    each = ours.of_each_query()
    assert figures["hit_rate"] == each["recall@10"]
    assert figures["mrr"] == each["mrr"]
    single = [row for row, query in enumerate(queries) if len(query.image_ids) == 1]
    assert [figures["recall"][row] for row in single] == [each["recall@10"][row] for row in single]
    assert np.mean(figures["ndcg"]) == pytest.approx(ours.figures()["ndcg@10"])
    assert 0 < np.mean(figures["hit_rate"]) < 1
    assert len(set(figures["ndcg"])) > 3


def test_figures_differ_from_llama_index_in_two_cases():
    """Its nDCG stays below one if there are more right images than results. Without results, it raises an error."""
    assert ndcg_at([["a"]], [{"a", "b"}], 1) == 1.0
    assert NDCG().compute(expected_ids=["a", "b"], retrieved_ids=["a"]).score == pytest.approx(0.6131, abs=1e-4)
    assert ndcg_at([[]], [{"a"}], 1) == mean_reciprocal_rank([[]], [{"a"}]) == 0.0
    with pytest.raises(ValueError, match="must be provided"):
        MRR().compute(expected_ids=["a"], retrieved_ids=[])
