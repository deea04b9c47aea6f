"""The parts of the recall table that need no download: the split, the queries, the fusion, prefix survival."""

import json
import math

import numpy as np
import pytest

from integration.recall.emoji import Emoji
from integration.recall.fusion import RRF_CONSTANT, Fusion, choose_fusion
from integration.recall.generative import prefix_survival, recall_queries
from integration.recall.grow import Neighbours, Stages, parted, update_recipe
from integration.recall.grow import measure as measure_growth
from integration.recall.openclipart import Clipart
from integration.recall.query_sets import QuerySet, corpus_of
from integration.recall.split import is_validation, write_queries
from integration.recall.table import BEAM, EXACT, HYBRID, Section, measure
from llama_index_genret import FakeScorer
from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import CorpusError
from llama_index_genret.evaluation.baselines import baseline, evaluation_by_score
from llama_index_genret.evaluation.evaluate import evaluate
from llama_index_genret.store.queries import EvaluationQuery
from llama_index_genret.training.options import TrainOptions

pytestmark = pytest.mark.torch


def test_split_depends_on_image_id_and_keeps_every_query(tmp_path):
    rows = [{"query": f"{n}", "image_id": f"image {n % 400}"} for n in range(1000)]
    write_queries(tmp_path, "all", rows)
    write_queries(tmp_path, "other", [{"query": "?", "image_id": f"image {n}"} for n in reversed(range(400))])

    def ids(name):
        return {json.loads(line)["image_id"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()}

    validation, test = ids("all-validation"), ids("all-test")
    assert validation == ids("other-validation") == {name for name in ids("all") if is_validation(name)}
    assert not validation & test
    lines = [len((tmp_path / f"all{part}.jsonl").read_text().splitlines()) for part in ("", "-validation", "-test")]
    assert lines[0] == lines[1] + lines[2] == 1000
    assert 30 <= len(validation) <= 75  # an eighth of 400, give or take four standard deviations
    assert validation != {name for name in ids("all") if is_validation(name, seed=1)}


def emoji(**changes):
    facts = {"label": "Red apple", "tags": ("apple", "fruit", "Health"), "keywords": (), "openmoji_tags": ()}
    return Emoji("1F34E", group="food-drink", picture=b"", openmoji_picture=b"", **(facts | changes))


def test_emoji_queries_exclude_the_indexed_words():
    apple = emoji(keywords=("red_apple", "school", "fruit", "health", "mac", "school"))
    assert apple.keyword_query() == "school, mac"
    assert apple.tag_query() == "fruit, health"
    assert emoji(keywords=("red_apple", "school")).keyword_query() is None
    assert emoji(tags=("apple", "fruit")).tag_query() is None
    assert emoji(openmoji_tags=("food", "round")).openmoji_query() == "food, round"
    assert emoji().openmoji_query() is None


def test_clipart_queries_say_more_than_the_title(tmp_path):
    def clipart(**changes):
        facts = {"title": "A Duck", "description": "", "keywords": ("bird", "a_duck", "water_bird", "pond")}
        return Clipart("animals/duck", svg=tmp_path, png=tmp_path, **(facts | changes))

    assert clipart().keyword_query() == "bird, water bird, pond"
    assert clipart(keywords=("bird", "a_duck", "pond")).keyword_query() is None
    assert clipart(description="A duck, a duck, a duck.").description_query() is None
    assert clipart(description="write to me@example.org about ducks").description_query() is None
    assert clipart(description="It swims in the pond.").description_query() == "It swims in the pond."


def test_reciprocal_rank_fusion_equals_its_definition():
    rng = np.random.default_rng(0)
    generative, dense = rng.integers(-6, 0, (5, 12)).astype(float), rng.integers(0, 6, (5, 12)) / 6
    generative[rng.random((5, 12)) < 0.4] = -np.inf
    fused = Fusion().scores(generative, dense)
    for query in range(5):
        for image in range(12):
            rank = sum(other >= dense[query, image] for other in dense[query])
            expected = 1 / (RRF_CONSTANT + rank)
            if math.isfinite(generative[query, image]):
                expected += 1 / (RRF_CONSTANT + sum(other >= generative[query, image] for other in generative[query]))
            assert fused[query, image] == pytest.approx(expected)


def test_fusion_weights_0_and_1_give_one_ranking_alone():
    generative, dense = np.array([[-0.1, -3.0, -np.inf, -np.inf]]), np.array([[0.1, 0.2, 0.5, 0.4]])
    assert np.argsort(-Fusion(1.0).scores(generative, dense))[0, :2].tolist() == [0, 1]
    assert np.argsort(-Fusion(0.0).scores(generative, dense))[0].tolist() == [2, 3, 1, 0]
    half = Fusion(0.5, temperature=0.1).scores(generative, dense)[0]
    log_prob = dense[0] / 0.1 - np.logaddexp.reduce(dense[0] / 0.1)
    assert half == pytest.approx(0.5 * np.array([-0.1, -3.0, -4.0, -4.0]) + 0.5 * log_prob)
    nothing_recalled = np.full((1, 4), -np.inf)
    assert np.argsort(-Fusion(0.5).scores(nothing_recalled, dense))[0].tolist() == [2, 3, 1, 0]


def test_fusion_chooses_the_better_ranking_over_noise(untrained_index):
    records = untrained_index.records
    queries = [EvaluationQuery(record.captions[0], frozenset([record.image_id])) for record in records]
    rng = np.random.default_rng(0)
    noise, good = rng.normal(size=(2, len(records), len(records)))
    good += 10 * np.eye(len(records))
    by_ranks = evaluation_by_score(Fusion().scores(noise, good), records, queries).figures()
    assert by_ranks["recall@1"] < 1
    for generative, dense, weights in ((noise - 9, good, (0, 0.5)), (good - 20, noise, (0.5, 1))):
        chosen, reached = choose_fusion(generative, dense, records, queries)
        assert reached.figures()["recall@1"] == 1
        assert weights[0] <= chosen.weight <= weights[1]


def kept_by_definition(index, scorer, query, width=10):
    """Return the prefixes that a beam expands, and its results, by plain loops."""
    paths = [index.token_ids(row) for row in range(len(index.records))]

    def children(prefix):
        return sorted({path[len(prefix)] for path in paths if path[: len(prefix)] == prefix != path})

    def best(scores):
        return dict(sorted(scores.items(), key=lambda item: -item[1])[:width])

    beam, finished, expanded = {(): 0.0}, {}, set()
    while beam:
        moved = {}
        for prefix, log_prob in beam.items():
            while len(following := children(prefix)) == 1:  # an only child is not scored
                prefix = (*prefix, *following)
            moved[prefix] = log_prob
        finished = best(finished | {prefix: moved[prefix] for prefix in moved if not children(prefix)})
        bar = min(finished.values()) if len(finished) == width else -np.inf
        beam = {prefix: log_prob for prefix, log_prob in moved.items() if children(prefix) and log_prob > bar}
        expanded |= set(beam)
        grown = {}
        for prefix, log_prob in beam.items():
            logits = scorer.logits(query.prompt(index), prefix)[children(prefix)]
            for token, logit in zip(children(prefix), logits, strict=True):
                grown[(*prefix, token)] = log_prob + logit - np.logaddexp.reduce(logits)
        beam = best(grown)
    return expanded | set(finished)


@pytest.mark.parametrize("seed", range(4))
def test_prefix_survival_equals_the_prefixes_that_a_beam_keeps(untrained_index, seed):
    scorer = FakeScorer(untrained_index.tokenizer.vocab_size, seed=seed, spread=3.0)
    queries = [
        EvaluationQuery(f"{n}", frozenset([record.image_id])) for n, record in enumerate(untrained_index.records)
    ]
    refused = EvaluationQuery(" ", queries[0].image_ids)
    found = prefix_survival(untrained_index, scorer, [refused, *queries], batch=4)
    expected = np.zeros(len(found))
    for query, record in zip(queries, untrained_index.records, strict=True):
        right = untrained_index.token_ids(untrained_index.rows_by_id[record.image_id])
        kept = kept_by_definition(untrained_index, scorer, query)
        for level in range(len(found)):
            expected[level] += right[: level + 1] in {prefix[: level + 1] for prefix in kept}
    assert found == pytest.approx(expected / (len(queries) + 1))
    assert found == pytest.approx(evaluate(untrained_index, scorer, [refused, *queries]).prefix_survival())
    recalled = recall_queries(untrained_index, scorer, [refused, *queries]).evaluation()
    assert found[-1] == pytest.approx(recalled.figures()["recall@10"])
    assert 0 < found[-1] < found[0] < 1


class TfIdfOnly:
    """Peers without downloads. The dense peer is character n-grams, too."""

    def dense(self, records, queries):
        ranked = baseline("tfidf", records, queries).ranked
        ids = [record.image_id for record in records]
        return np.array([[1.0 / (1 + found.index(i)) if i in found else 0.0 for i in ids] for found in ranked])

    def evaluate(self, query_set, records, queries):
        return {"MiniLM": baseline("tfidf", records, queries), "BM25": baseline("bm25", records, queries)}


def test_section_counts_every_test_query_and_states_goals(untrained_index, tmp_path):
    records = untrained_index.records
    rows = [{"query": f"the {r.captions[0]}", "image_id": r.image_id} for r in records]
    write_queries(tmp_path, "captions", rows)
    scorer = FakeScorer(untrained_index.tokenizer.vocab_size)
    query_set = QuerySet("captions", "any", (0.0, 0.5, 1.01))
    section = measure("tiny", untrained_index, scorer, TfIdfOnly(), query_set, tmp_path)
    test = sum(not is_validation(record.image_id) for record in records)
    assert [len(row.queries) for row in section.rows.values()] == [test] * 5
    assert set(section.rows) == {BEAM, EXACT, HYBRID, "MiniLM", "BM25"}
    assert len(section.survival) == max(map(len, untrained_index.identifiers))
    reached = section.rows[BEAM].figures()
    goals = section.goals()
    assert goals["recall@10"] == (reached["recall@10"], 1.01)
    assert goals["hybrid recall@1"] == (section.rows[HYBRID].figures()["recall@1"], 1.1)  # the peer finds all
    low, high = section.ahead(BEAM, "MiniLM")["recall@1"]
    assert -1 <= low <= reached["recall@1"] - 1 <= high <= 0
    without = Section(QuerySet("captions", "any"), "tiny", section.rows)
    assert without.goals()["recall@5"] == (reached["recall@5"], 1.0)


def test_differences_are_paired_by_query(untrained_index):
    records = untrained_index.records
    queries = [EvaluationQuery("?", frozenset([record.image_id])) for record in records]
    some = np.eye(len(records)) * (np.arange(len(records)) % 2)[:, None]
    row = evaluation_by_score(some, records, queries)
    section = Section(QuerySet("x", "any"), "tiny", {BEAM: row, "peer": row})
    assert section.ahead(BEAM, "peer")["recall@1"] == (0.0, 0.0)


def test_index_without_a_corpus_error_lists_the_corpora(untrained_index, tmp_path):
    for name in ("emoji", "emoji-labels", "openclipart"):
        (tmp_path / name).mkdir()
        row = {"file_name": "red-circle.png", "text": ["red circle"]}
        (tmp_path / name / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(CorpusError, match="emoji-labels"):
        corpus_of(untrained_index, tmp_path)
    rows = [{"file_name": r.file_name, "text": list(r.captions)} for r in untrained_index.records]
    (tmp_path / "emoji-labels/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert corpus_of(untrained_index, tmp_path) == "emoji-labels"


def test_growing_index_is_measured_at_every_stage(pictures, tiny_mllm, tmp_path, capsys):
    corpus, new = parted(read_corpus(pictures), hold_out=4, limit=None, seed=0)
    options = TrainOptions(max_steps=2, batch_size=4, lora_rank=2)
    stages = Stages(tmp_path / "work", tiny_mllm)
    trained = stages.trained(corpus, "atomic", options)
    added = stages.added(trained, new)
    updated = stages.updated(added, update_recipe(added, 2, 1.0))
    records = added.records
    assert len(records) - len(trained.records) == len(new) == 4
    queries = [EvaluationQuery("", frozenset([record.image_id]), image=record.path) for record in records]
    query_set = QuerySet("own", "pictures", shows_images=True)
    indexes = {"trained": trained, "added": added, "updated": updated}
    results = measure_growth(query_set, queries, indexes, Neighbours(tiny_mllm, minilm=None))
    assert {f"new images, {stage}, vision neighbour" for stage in ("added", "updated")} <= results.keys()
    assert results["new images, added, vision neighbour"]["recall@1"] == 1.0
    assert results["old images lose, generative"]["recall@5"] == pytest.approx(
        results["old images, trained, generative"]["recall@5"] - results["old images, updated, generative"]["recall@5"]
    )
    assert "old images lose" in capsys.readouterr().out
    assert stages.updated(added, options).version == updated.version  # an existing index is reused
