"""The prior of an index is computed and stored, and scoring is tuned on validation queries."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from llama_index_genret import FakeScorer, GenerativeImageRetriever
from llama_index_genret.cli import app
from llama_index_genret.errors import IndexDamaged, QueryError, SearchError, StoreError
from llama_index_genret.evaluation.evaluate import evaluate
from llama_index_genret.evaluation.tuning import image_prior, tune
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.rerank import reranking, with_scoring
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.serving.batch import open_batch
from llama_index_genret.store import (
    Scoring,
    ScoringChoice,
    TunedScoring,
    add_images,
    load_index,
    remove_images,
    store_adapter,
    store_tuning,
)
from llama_index_genret.store.queries import EvaluationQuery

pytestmark = pytest.mark.torch


def genret_json(capsys, *arguments):
    """Run a command with --json in this process, so that torch loads once, and return its output."""
    app([*map(str, arguments), "--json"], standalone_mode=False)
    return json.loads(capsys.readouterr().out)


def ranked_by(scoring, index, scorer, prompt, k):
    options = with_scoring(SearchOptions(k=k), index, scoring)
    return recall(scorer, index.trie, [prompt], options, rerank=reranking(index, scoring))


@pytest.fixture
def index(untrained_index, tmp_path):
    """Copy the index, so that a test may write to it."""
    return load_index(shutil.copytree(untrained_index.folder, tmp_path / "index"))


@pytest.fixture
def scorer(index):
    return FakeScorer(index.tokenizer.vocab_size)


def log_probs(index, scorer, prompt):
    """Return the log-probability of every image, by a search that drops none."""
    n = len(index.records)
    (ranking,) = recall(scorer, index.trie, [prompt], SearchOptions(k=n, width=n))
    return {hit.key: hit.log_prob for hit in ranking.hits}


def test_prior_is_the_log_prob_without_a_query(index, trained_index, trained_mllm, monkeypatch):
    """Batches smaller than a level give the same prior."""
    monkeypatch.setattr("llama_index_genret.evaluation.tuning.PREFIX_BATCH", 3)
    for one, by in ((index, FakeScorer(index.tokenizer.vocab_size)), (trained_index, TransformersScorer(trained_mllm))):
        expected = log_probs(one, by, one.prompts.for_no_query(one.tokenizer))
        found = image_prior(one, by)
        np.testing.assert_allclose(found, [expected[row] for row in range(len(one.records))], rtol=1e-4)
        assert np.exp(found.astype(float)).sum() == pytest.approx(1.0, abs=1e-4)


def test_eta_with_the_best_mrr_is_stored_and_used(index, scorer):
    """The queries are for images with a low prior, so subtracting it must help. The stored eta is the best one."""
    prior = image_prior(index, scorer)
    rare = [index.records[row] for row in np.argsort(prior)[:8]]
    queries = [
        EvaluationQuery(f"{record.captions[0]} {n}", frozenset({record.image_id})) for record in rare for n in range(3)
    ]
    table = {}
    for query in queries:  # the query has no effect: every score is the score of the empty query
        prompt = index.prompts.for_query(index.tokenizer, query.text)
        empty = index.prompts.for_no_query(index.tokenizer)
        (row,) = (index.rows_by_id[image_id] for image_id in query.image_ids)
        path = index.token_ids(row)
        for depth in range(len(path)):
            logits = scorer.logits(empty, path[:depth])
            table[prompt.token_ids, path[:depth]] = {t: v + 0.5 * (t == path[depth]) for t, v in enumerate(logits)}
    table_scorer = FakeScorer(scorer.vocab_size, table=table)
    tuning = tune(index, table_scorer, [*queries, EvaluationQuery(" ", frozenset({rare[0].image_id}))])
    tuned, trials, chosen = tuning.index, tuning.trials, tuning.index.scoring()
    best = max(trial.figures["mrr"] for trial in trials)
    assert chosen.eta == min(trial.scoring.eta for trial in trials if trial.figures["mrr"] == best) > 0
    assert best > trials[0].figures["mrr"]
    assert {trial.figures["n"] for trial in trials} == {25}
    assert load_index(index.folder).manifest.tuned == TunedScoring(scoring=chosen, queries=25)
    by_default = evaluate(tuned, table_scorer, queries).ranked
    assert by_default == evaluate(tuned, table_scorer, queries, scoring=ScoringChoice(**vars(chosen))).ranked
    assert by_default != evaluate(tuned, table_scorer, queries, scoring=ScoringChoice(eta=0, rerank=0)).ranked
    np.testing.assert_array_equal(tuned.log_prior, prior)


def test_ties_choose_no_prior_and_no_reranking(index, scorer):
    """Every image is right, so every ranking has the same MRR."""
    queries = [EvaluationQuery("anything", frozenset(index.rows_by_id))]
    tuning = tune(index, scorer, queries, rerank=5)
    assert tuning.index.scoring() == Scoring(rerank_weight=0.0)
    assert len(tuning.trials) > 50
    assert str(tuning.index.scoring()) == "model weight 0.5, temperature 0.05, eta 0, no re-ranking"
    assert str(Scoring(eta=0.5, rerank=5, rerank_weight=0.1)).endswith(
        "eta 0.5, best 5 re-ranked by identifier, weight 0.1"
    )


def test_tuning_trials_match_evaluation(index, scorer):
    queries = [EvaluationQuery(record.captions[0], frozenset({record.image_id})) for record in index.records[:6]]
    tuning = tune(index, scorer, queries, etas=(0.0, 1.0), rerank=10, rerank_weights=(0.0, 0.5))
    tuned, trials = tuning.index, tuning.trials
    for trial in trials:
        scoring = ScoringChoice(**vars(trial.scoring))
        if not trial.scoring.rerank_weight:
            scoring = ScoringChoice(eta=trial.scoring.eta, rerank=0)
        assert evaluate(tuned, scorer, queries, scoring=scoring).figures()["mrr"] == trial.figures["mrr"]
    assert len({trial.figures["mrr"] for trial in trials}) == 4


def test_tuning_without_queries_stores_only_the_prior(index, scorer):
    tuning = tune(index, scorer)
    first = tuning.index
    assert (first.scoring(), tuning.trials, tuning.compared) == (Scoring(), [], {})
    chosen = TunedScoring(scoring=Scoring(eta=0.5), queries=9)
    again = tune(store_tuning(first, first.log_prior, chosen), scorer).index
    assert again.manifest.tuned == chosen


def test_edits_update_the_prior(index, scorer, pictures):
    """An added image has no prior until the next `genret tune`, and the search still finds it.

    The prior of a removed image is dropped.
    """
    tuned = tune(index, scorer).index
    gone, kept = tuned.records[3], tuned.log_prior[4:]
    edited = remove_images(tuned, [gone.image_id])
    np.testing.assert_array_equal(edited.log_prior, [*tuned.log_prior[:3], *kept])
    new = (*edited.identifiers[0][:-1], edited.identifiers[5][-1])
    if new in edited.identifiers:
        new = tuned.identifiers[3]
    edited = add_images(edited, [gone], [new], edited.scheme())
    assert np.isnan(edited.log_prior[-1])
    assert not np.isnan(edited.log_prior[:-1]).any()
    prompt = edited.prompts.for_query(edited.tokenizer, "red circle")
    (ranking,) = ranked_by(Scoring(eta=1.0), edited, scorer, prompt, k=99)
    assert {edited.record_of(hit).image_id for hit in ranking.hits} == set(edited.rows_by_id)
    assert not np.isnan(tune(edited, scorer).index.log_prior).any()


def test_new_weights_drop_the_prior_and_the_tuned_scoring(index, scorer, tmp_path):
    tuned = tune(index, scorer).index
    tuned = store_tuning(tuned, tuned.log_prior, TunedScoring(scoring=Scoring(eta=1.0), queries=1))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "adapter_model.safetensors").write_bytes(b"other")
    again = store_adapter(tuned, tmp_path / "weights", {})
    assert (again.log_prior, again.prior, again.manifest.tuned) == (None, None, None)


def test_prior_of_a_changed_index_is_not_stored(index, scorer):
    prior = image_prior(index, scorer)
    remove_images(index, [index.records[0].image_id])
    with pytest.raises(StoreError, match="changed while"):
        store_tuning(index, prior, TunedScoring(scoring=Scoring(), queries=0))


@pytest.mark.parametrize("bad", [np.zeros(3, np.float32), np.full(20, -np.inf, np.float32)])
def test_invalid_prior_is_not_stored(index, bad):
    with pytest.raises(StoreError, match="log_prior must be"):
        store_tuning(index, bad, TunedScoring(scoring=Scoring(), queries=0))


def test_damaged_prior_error_has_the_file(index, scorer):
    tuned = tune(index, scorer).index
    path = tuned.folder / tuned.manifest.files["prior.npy"].path
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IndexDamaged, match=r"prior\.npy"):
        _ = load_index(index.folder).prior


def test_invalid_scoring_is_refused(index, scorer):
    with pytest.raises(SearchError, match="genret tune"):
        GenerativeImageRetriever(index, scorer, scoring=ScoringChoice(eta=1.0)).retrieve("red circle")
    for nonsense in ({"eta": -1.0}, {"rerank": -1}, {"rerank_weight": float("nan")}, {"rerank_by": "colour"}):
        with pytest.raises(SearchError, match=next(iter(nonsense))):
            GenerativeImageRetriever(index, scorer, scoring=ScoringChoice(**nonsense))


def test_retriever_uses_tuned_scoring_by_default(index, scorer, tmp_path):
    tuned = tune(index, scorer).index
    tuned = store_tuning(
        tuned, tuned.log_prior, TunedScoring(scoring=Scoring(eta=0.7, rerank=8, rerank_weight=0.3), queries=1)
    )
    prompt = tuned.prompts.for_query(tuned.tokenizer, "red circle")
    for choice, scoring in (
        ({}, Scoring(eta=0.7, rerank=8, rerank_weight=0.3)),
        ({"eta": 0.0}, Scoring(rerank=8, rerank_weight=0.3)),
        ({"rerank": 0}, Scoring(eta=0.7)),
        ({"eta": 0.0, "rerank": 0}, Scoring()),
        ({"rerank_weight": 2.0}, Scoring(eta=0.7, rerank=8, rerank_weight=2.0)),
    ):
        retriever = GenerativeImageRetriever(tuned, scorer, similarity_top_k=4, scoring=ScoringChoice(**choice))
        nodes = retriever.retrieve("red circle")
        (ranking,) = ranked_by(scoring, tuned, scorer, prompt, k=4)
        assert [node.node.node_id for node in nodes] == [tuned.record_of(hit).image_id for hit in ranking.hits]
        assert [node.score for node in nodes] == [hit.score for hit in ranking.hits]
        assert all(0 < node.score <= 1 for node in nodes)
        found = [node.node.metadata.get("genret_ranked_by") for node in nodes]
        assert found == [hit.ranked_by for hit in ranking.hits]


def test_tuned_scoring_is_not_used_for_image_queries(index, scorer):
    tuned = tune(index, scorer).index
    tuned = store_tuning(tuned, tuned.log_prior, TunedScoring(scoring=Scoring(eta=0.7, rerank=8), queries=1))
    assert tuned.scoring(image_query=True) == Scoring()
    assert tuned.scoring(ScoringChoice(eta=0.2), image_query=True) == Scoring(eta=0.2)
    from llama_index.core.schema import QueryBundle

    image_query = QueryBundle("", image_path=str(tuned.records[0].path))
    for scoring in (None, ScoringChoice(rerank=5)):
        nodes = GenerativeImageRetriever(tuned, scorer, scoring=scoring).retrieve(image_query)
        assert all("genret_ranked_by" not in node.node.metadata for node in nodes)
    prompt = tuned.prompts.for_image(tuned.tokenizer, tuned.records[0].path)
    with pytest.raises(QueryError, match="text queries"):
        ranked_by(Scoring(rerank=3), tuned, scorer, prompt, k=1)


def test_reranking_by_image_differs_from_by_identifier(trained_index, trained_mllm):
    scorer, prompt = (
        TransformersScorer(trained_mllm),
        trained_index.prompts.for_query(trained_index.tokenizer, "red bus"),
    )
    rankings = {
        by: ranked_by(Scoring(rerank=6, rerank_by=by), trained_index, scorer, prompt, k=3)
        for by in ("identifier", "image")
    }
    by_image, by_identifier = (
        {hit.leaf: hit.ranked_by for hit in rankings[by][0].hits} for by in ("image", "identifier")
    )
    assert len(by_image) == 3
    assert by_image != by_identifier


def test_batch_uses_the_given_scoring(index, scorer, tmp_path):
    tuned = tune(index, scorer).index
    (tmp_path / "queries.jsonl").write_text('{"query": "red circle"}\n{"query": " "}\n')
    for eta in (0.0, 1.0):
        out = tmp_path / f"{eta}.jsonl"
        with open_batch(tuned, tmp_path / "queries.jsonl", out, k=3, scoring=ScoringChoice(eta=eta)) as run:
            assert run.header.scoring.eta == eta
            run.finish(scorer)
        hits = json.loads(out.read_text().splitlines()[0])["hits"]
        assert [("ranked_by" in hit) for hit in hits] == [eta > 0] * 3


def test_tune_and_eval_commands_share_the_scoring(trained_index, tmp_path, capsys):
    folder, queries = shutil.copytree(trained_index.folder, tmp_path / "index"), tmp_path / "queries.jsonl"
    records = trained_index.records
    queries.write_text(
        "".join(json.dumps({"query": r.captions[0], "image_id": r.image_id}) + "\n" for r in records[:5])
    )
    tuned = genret_json(capsys, "tune", folder, queries, "--rerank", 4, "--device", "cpu")
    assert (tuned["n"], len(tuned["trials"])) == (5, 11 * 11)
    assert {"eta", "rerank_weight", "recall@1", "recall@5", "recall@10", "mrr"} <= tuned["trials"][0].keys()
    assert genret_json(capsys, "inspect", folder)["tuned"]["scoring"] == tuned["scoring"]
    fixed = ("--eta", 0.5, "--rerank", 4, "--rerank-weight", 2, "--rerank-by", "identifier", "--device", "cpu")
    only = genret_json(capsys, "tune", folder, queries, *fixed)
    assert only["scoring"] == asdict(Scoring(eta=0.5, rerank=4, rerank_weight=2.0))
    assert len(only["trials"]) == 1
    flags = ("--rerank", 3, "--device", "cpu")
    figures = genret_json(capsys, "eval", folder, queries, *flags)
    assert figures["scoring"] == {**only["scoring"], "rerank": 3}
    found = genret_json(capsys, "query", folder, "red circle", "-k", 2, *flags)
    assert all("ranked_by" in hit for hit in found["hits"])
    genret_json(capsys, "tune", folder, queries, "--eta", 0, "--device", "cpu")
    off = genret_json(capsys, "query", folder, "red circle", "-k", 2, "--rerank", 0, "--device", "cpu")
    assert not any("ranked_by" in hit for hit in off["hits"])
