"""Test every scheme from a folder to recalled images: assign identifiers, train briefly, search."""

import math

import pytest

from llama_index_genret.corpus import read_corpus
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.store.build import build_index
from llama_index_genret.store.model_loading import load_trained
from llama_index_genret.training.recipe import TrainOptions, train

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("numeric", {}),
        ("string", {}),
        ("semantic", {}),
        ("semantic", {"words": 1}),
        ("structured", {}),
        ("structured", {"method": "rq", "sizes": [5, 3]}),
        ("atomic", {}),
    ],
)
def test_all_images_are_recalled_with_probabilities_of_sum_1(pictures, tiny_mllm, tmp_path, scheme, options):
    corpus = read_corpus(pictures)
    index = build_index(corpus, tmp_path / "index", tiny_mllm, scheme=scheme, scheme_options=options)
    index = train(index, TrainOptions(max_steps=2, lora_rank=2), device="cpu", show_progress=False)
    scorer = TransformersScorer(load_trained(index, device="cpu"))
    prompt = index.prompts.for_query(index.tokenizer, "red circle")
    for mode in ("beam", "exact"):
        (ranking,) = recall(scorer, index.trie, [prompt], SearchOptions(k=20, mode=mode))
        assert {index.record_of(hit).image_id for hit in ranking.hits} == {r.image_id for r in corpus.records}
        assert math.fsum(hit.score for hit in ranking.hits) == pytest.approx(1.0, abs=1e-4)
        assert ranking.exact
    (few,) = recall(scorer, index.trie, [prompt], SearchOptions(k=3, mode="exact"))
    assert [hit.key for hit in few.hits] == [hit.key for hit in ranking.hits[:3]]
    if scheme == "atomic":
        assert few.nodes_expanded == 1
