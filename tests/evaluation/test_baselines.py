"""Baselines rank by captions, and a tie counts against the baseline."""

import numpy as np
import pytest

from llama_index_genret.errors import QueryError
from llama_index_genret.evaluation.baselines import baseline, evaluation_by_score
from llama_index_genret.store.queries import EvaluationQuery


def test_right_image_ranks_last_among_equal_scores(untrained_index):
    records = untrained_index.records
    query = EvaluationQuery("?", frozenset([records[0].image_id]))
    tied, ahead = np.zeros((1, len(records))), np.zeros((1, len(records)))
    tied[0, :5] = 1
    ahead[0, :5], ahead[0, 0] = 1, 2
    (ranked,) = evaluation_by_score(tied, records, [query]).ranked
    assert ranked.index(records[0].image_id) == 4
    assert evaluation_by_score(ahead, records, [query]).ranked[0][0] == records[0].image_id


@pytest.mark.parametrize("name", ["tfidf", "bm25"])
def test_baseline_finds_captions_and_ties_count_against_it(untrained_index, name):
    records = untrained_index.records
    captions = [EvaluationQuery(record.captions[0], frozenset([record.image_id])) for record in records]
    assert baseline(name, records, captions).figures()["recall@1"] == 1.0
    nothing_in_common = [EvaluationQuery("zzz qqq", frozenset([record.image_id])) for record in records]
    assert baseline(name, records, nothing_in_common).figures()["recall@10"] == 0.0


def test_unknown_baseline_error_lists_the_known_ones(untrained_index):
    with pytest.raises(QueryError, match="bm25, tfidf"):
        baseline("clip", untrained_index.records, [])
