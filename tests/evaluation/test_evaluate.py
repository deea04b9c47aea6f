"""Figures against their definitions; query files; baselines."""

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.evaluation.retrieval.metrics import MRR, NDCG

from llama_index_genret import FakeScorer, GenerativeImageRetriever
from llama_index_genret.errors import CorpusError, QueryError
from llama_index_genret.evaluation.baselines import baseline, evaluation_by_score
from llama_index_genret.evaluation.evaluate import evaluate
from llama_index_genret.evaluation.metrics import (
    RESAMPLES,
    bootstrap_interval,
    mean_reciprocal_rank,
    ndcg_at,
    recall_at,
)
from llama_index_genret.evaluation.queries import EvaluationQuery, read_queries
from llama_index_genret.scorers.transformers import TransformersScorer

RANKED = [["a", "b", "c"], ["b", "c", "a"], ["c"], []]
EXPECTED = [{"a"}, {"a"}, {"a"}, {"a"}]


def test_figures_of_a_worked_example():
    assert [recall_at(RANKED, EXPECTED, k) for k in (1, 2, 3)] == [0.25, 0.25, 0.5]
    assert mean_reciprocal_rank(RANKED, EXPECTED) == pytest.approx((1 + 1 / 3) / 4)
    assert ndcg_at(RANKED, EXPECTED, 3) == pytest.approx((1 + 0.5) / 4)
    assert ndcg_at([["x", "a", "b"]], [{"a", "b"}], 3) == pytest.approx((0.63093 + 0.5) / (1 + 0.63093), abs=1e-4)


@given(st.lists(st.permutations(["a", "b", "c", "d"]), min_size=1, max_size=5), st.integers(1, 4))
def test_figures_lie_between_none_and_all_and_a_perfect_ranking_is_one(ranked, k):
    expected = [{ids[0]} for ids in ranked]
    assert recall_at(ranked, expected, k) == mean_reciprocal_rank(ranked, expected) == 1.0
    assert ndcg_at(ranked, expected, k) == pytest.approx(1.0)
    assert 0 <= recall_at(ranked, [{"a"}] * len(ranked), k) <= 1


def interval_by_loops(values, groups, level, seed):
    """The definition: draw groups, pool their values, take the mean; then the middle of the sorted means."""
    distinct = list(dict.fromkeys(groups))
    counts = np.random.default_rng(seed).multinomial(len(distinct), [1 / len(distinct)] * len(distinct), size=RESAMPLES)
    means = []
    for drawn in counts.tolist():
        pool = [v for v, g in zip(values, groups, strict=True) for _ in range(drawn[distinct.index(g)])]
        means.append(sum(pool) / len(pool))
    means.sort()

    def quantile(share):
        place = share * (len(means) - 1)
        below = int(place)
        above = min(below + 1, len(means) - 1)
        return means[below] + (place - below) * (means[above] - means[below])

    return quantile((1 - level) / 2), quantile((1 + level) / 2)


@pytest.mark.parametrize(("level", "seed"), [(0.95, 0), (0.5, 3)])
def test_the_bootstrap_is_its_definition(level, seed):
    rng = np.random.default_rng(seed)
    values, groups = rng.normal(size=23).tolist(), rng.choice(list("abcdefgh"), size=23).tolist()
    assert bootstrap_interval(values, groups, level=level, seed=seed) == pytest.approx(
        interval_by_loops(values, groups, level, seed)
    )
    alone = interval_by_loops(values, range(23), level, seed)
    assert bootstrap_interval(values, level=level, seed=seed) == pytest.approx(alone)


def test_an_interval_is_as_wide_as_the_normal_one_and_no_narrower_for_repeated_queries():
    values = [1.0] * 120 + [0.0] * 280
    low, high = bootstrap_interval(values)
    half = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.006)
    again = bootstrap_interval([v for v in values for _ in range(4)], [i for i in range(400) for _ in range(4)])
    assert again == pytest.approx((low, high))
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)
    assert bootstrap_interval([]) == (0.0, 0.0)


def test_figures_have_an_interval_around_each_recall_with_queries_of_an_image_drawn_together(untrained_index):
    records = untrained_index.records
    asked = [EvaluationQuery(f"{r.captions[0]} {n}", frozenset([r.image_id])) for r in records[:6] for n in range(3)]
    scores = np.zeros((18, len(records)))
    scores[np.arange(9), np.repeat(np.arange(6), 3)[:9]] = 1  # the first three images are found
    evaluation = evaluation_by_score(scores, records, asked)
    figures = evaluation.figures()
    assert figures["recall@1"] == 0.5
    expected = interval_by_loops([1.0] * 9 + [0.0] * 9, [query.image_ids for query in asked], 0.95, 0)
    assert figures["interval"]["recall@1"] == pytest.approx(list(expected))
    assert set(figures["interval"]) == {"recall@1", "recall@5", "recall@10", "mrr", "ndcg@10"}


def test_of_images_of_equal_score_the_right_one_is_ranked_last(untrained_index):
    records = untrained_index.records
    query = EvaluationQuery("?", frozenset([records[0].image_id]))
    tied, ahead = np.zeros((1, len(records))), np.zeros((1, len(records)))
    tied[0, :5] = 1
    ahead[0, :5], ahead[0, 0] = 1, 2
    (ranked,) = evaluation_by_score(tied, records, [query]).ranked
    assert ranked.index(records[0].image_id) == 4
    assert evaluation_by_score(ahead, records, [query]).ranked[0][0] == records[0].image_id


def test_a_query_may_be_a_picture(trained_index, trained_mllm, tmp_path):
    asked = trained_index.records[3]
    (tmp_path / "q.png").write_bytes(asked.path.read_bytes())
    path = write(tmp_path / "q.jsonl", {"image": "q.png", "image_id": asked.image_id, "kind": "image"})
    queries = read_queries(path, trained_index.records)
    assert queries == [EvaluationQuery("", frozenset([asked.image_id]), "image", tmp_path / "q.png")]
    result = evaluate(trained_index, TransformersScorer(trained_mllm), queries)
    assert len(result.ranked[0]) == 10
    (tmp_path / "q.png").unlink()
    with pytest.raises(CorpusError, match=r"line 1.*q\.png does not exist"):
        read_queries(path, trained_index.records)


def test_a_query_that_is_refused_is_a_miss_and_stays_in_the_count(untrained_index):
    scorer = FakeScorer(untrained_index.tokenizer.vocab_size)
    everything = frozenset(record.image_id for record in untrained_index.records)
    result = evaluate(untrained_index, scorer, [EvaluationQuery("red", everything), EvaluationQuery(" ", everything)])
    figures = result.figures()
    assert (figures["n"], figures["recall@1"]) == (2, 0.5)
    assert len(result.latency_ms) == 2


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_queries_name_images_by_file_or_id_one_or_several(untrained_index, tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        {"query": "a", "file_name": "red-circle.png"},
        "",
        {"query": "b", "image_id": ["red-bar", "blue-bar"], "kind": "tag"},
    )
    assert read_queries(path, untrained_index.records) == [
        EvaluationQuery("a", frozenset({"red-circle"})),
        EvaluationQuery("b", frozenset({"red-bar", "blue-bar"}), "tag"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        "{",
        "[]",
        '"text"',
        '{"query": "x"}',
        '{"query": 1, "file_name": "red-bar.png"}',
        '{"query": "x", "file_name": "no.png"}',
        '{"query": "x", "image_id": []}',
    ],
)
def test_a_broken_line_is_an_error_that_names_file_and_line(untrained_index, tmp_path, row):
    path = write(tmp_path / "q.jsonl", {"query": "a", "file_name": "red-circle.png"}, row)
    with pytest.raises(CorpusError, match=r"q\.jsonl, line 2"):
        read_queries(path, untrained_index.records)


def test_a_missing_or_empty_file_is_an_error_that_names_it(untrained_index, tmp_path):
    with pytest.raises(CorpusError, match="nowhere"):
        read_queries(tmp_path / "nowhere.jsonl", untrained_index.records)
    with pytest.raises(CorpusError, match="no queries"):
        read_queries(write(tmp_path / "empty.jsonl"), untrained_index.records)


@pytest.mark.parametrize("name", ["tfidf", "bm25"])
def test_a_baseline_finds_captions_and_counts_ties_against_itself(untrained_index, name):
    records = untrained_index.records
    captions = [EvaluationQuery(record.captions[0], frozenset([record.image_id])) for record in records]
    assert baseline(name, records, captions).figures()["recall@1"] == 1.0
    nothing_in_common = [EvaluationQuery("zzz qqq", frozenset([record.image_id])) for record in records]
    assert baseline(name, records, nothing_in_common).figures()["recall@10"] == 0.0


def test_an_unknown_baseline_names_the_known_ones(untrained_index):
    with pytest.raises(QueryError, match="bm25, tfidf"):
        baseline("clip", untrained_index.records, [])


@pytest.mark.parametrize("how", ["sync", "async"])
def test_the_evaluator_of_llama_index_gives_the_same_figures(untrained_index, how):
    """Query by query: its `hit_rate` is our recall@k, and its `recall` too where one image is right.

    Of several right images its own recall is the share that was found.
    """
    records, scorer = untrained_index.records, FakeScorer(untrained_index.tokenizer.vocab_size)
    wanted = [[r.image_id for r in records[n : n + 1 + n % 3]] for n in range(len(records) - 3)]
    queries = [EvaluationQuery(records[n].captions[0], frozenset(ids)) for n, ids in enumerate(wanted)]
    ours = evaluate(untrained_index, scorer, queries)
    retriever = GenerativeImageRetriever(untrained_index, scorer, similarity_top_k=10)
    theirs = RetrieverEvaluator.from_metric_names(["hit_rate", "mrr", "recall", "ndcg"], retriever=retriever)
    asked = [(query.text, sorted(query.image_ids)) for query in queries]
    results = (
        [theirs.evaluate(*query) for query in asked]
        if how == "sync"
        else [asyncio.run(theirs.aevaluate(*query)) for query in asked]
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


def test_where_the_figures_of_llama_index_are_other_ones():
    """Of more right images than results, its nDCG can never be one; where nothing is found, it ends in an error."""
    assert ndcg_at([["a"]], [{"a", "b"}], 1) == 1.0
    assert NDCG().compute(expected_ids=["a", "b"], retrieved_ids=["a"]).score == pytest.approx(0.6131, abs=1e-4)
    assert ndcg_at([[]], [{"a"}], 1) == mean_reciprocal_rank([[]], [{"a"}]) == 0.0
    with pytest.raises(ValueError, match="must be provided"):
        MRR().compute(expected_ids=["a"], retrieved_ids=[])
