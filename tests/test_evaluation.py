"""Figures against their definitions; query files; baselines."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_index_genret import FakeScorer
from llama_index_genret.errors import CorpusError, QueryError
from llama_index_genret.evaluation import Query, baseline, evaluate, read_queries
from llama_index_genret.metrics import mean_reciprocal_rank, ndcg_at, recall_at

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


def test_a_query_that_is_refused_is_a_miss_and_stays_in_the_count(untrained_index):
    scorer = FakeScorer(untrained_index.tokenizer.vocab_size)
    everything = frozenset(record.image_id for record in untrained_index.records)
    result = evaluate(untrained_index, scorer, [Query("red", everything), Query(" ", everything)])
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
        Query("a", frozenset({"red-circle"})),
        Query("b", frozenset({"red-bar", "blue-bar"}), "tag"),
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
    captions = [Query(record.captions[0], frozenset([record.image_id])) for record in records]
    assert baseline(name, records, captions).figures()["recall@1"] == 1.0
    nothing_in_common = [Query("zzz qqq", frozenset([record.image_id])) for record in records]
    assert baseline(name, records, nothing_in_common).figures()["recall@10"] == 0.0


def test_an_unknown_baseline_names_the_known_ones(untrained_index):
    with pytest.raises(QueryError, match="bm25, tfidf"):
        baseline("clip", untrained_index.records, [])
