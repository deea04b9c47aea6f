"""The report of an evaluation: its selection of queries, its charts, and its optional dependency."""

import re
import subprocess
import sys

import numpy as np
import pytest

from llama_index_genret import FakeScorer
from llama_index_genret.cli.evaluate import evaluate as evaluate_command
from llama_index_genret.errors import MissingExtra
from llama_index_genret.evaluation.baselines import baseline
from llama_index_genret.evaluation.evaluate import evaluate
from llama_index_genret.evaluation.metrics import expected_calibration_error
from llama_index_genret.evaluation.report import STRIPS, worst_first, write_evaluation_report
from llama_index_genret.store.queries import EvaluationQuery


@pytest.fixture(scope="module")
def evaluation(untrained_index):
    """Evaluate four queries per image. One query is refused."""
    queries = [
        EvaluationQuery(f"{record.captions[0]} {n}", frozenset([record.image_id]), "odd" if n % 2 else "even")
        for record in untrained_index.records
        for n in range(4)
    ]
    queries[7] = EvaluationQuery(" ", queries[7].image_ids, "odd")
    return evaluate(untrained_index, FakeScorer(untrained_index.tokenizer.vocab_size, spread=3.0), queries)


def test_prefix_survival_ends_at_recall_at_10(evaluation):
    figures = evaluation.figures()
    survival = figures["prefix_survival"]
    assert survival[-1] == pytest.approx(figures["recall@10"])
    assert all(np.diff(survival) <= 0)
    assert 0 < survival[-1] < survival[0] < 1
    assert not any(evaluation.kept[7])
    odd = evaluation.of_kind("odd")
    assert odd.prefix_survival()[-1] == pytest.approx(odd.figures()["recall@10"])


def test_calibration_uses_first_hits_without_refused_queries(evaluation):
    scores, right = evaluation.first_hits()
    assert len(scores) == len(evaluation.queries) - 1
    assert np.mean([*right, False]) == pytest.approx(evaluation.figures()["recall@1"])
    assert evaluation.figures()["calibration_error"] == expected_calibration_error(scores, right)


def test_worst_queries_are_the_misses_with_the_highest_score(evaluation):
    order = worst_first(evaluation)
    assert sorted(order) == list(range(len(evaluation.queries)))
    ranks = [
        next(
            (rank for rank, name in enumerate(evaluation.ranked[row]) if name in evaluation.queries[row].image_ids), 99
        )
        for row in order
    ]
    assert ranks == sorted(ranks, reverse=True)
    misses = [row for row, rank in zip(order, ranks, strict=True) if rank == 99]
    assert misses[-1] == 7  # refused: no hits
    sure = [evaluation.hits[row][0].score for row in misses[:-1]]
    assert sure == sorted(sure, reverse=True)


def test_page_has_worst_and_random_queries_and_baselines(untrained_index, evaluation, tmp_path):
    peer = baseline("tfidf", untrained_index.records, evaluation.queries)
    pages = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        path = tmp_path / f"{name}.html"
        write_evaluation_report(path, untrained_index, evaluation, baselines={"tfidf": peer}, seed=seed)
        pages.append(path.read_text())
    page = pages[0]
    assert pages[1] == page != pages[2]
    worst, lot = (re.findall(r'class="query" dir="auto">(.*?)</p>', part) for part in page.split(" at random<")[:2])
    assert worst == [evaluation.queries[row].text for row in worst_first(evaluation)[:STRIPS]]
    assert len(lot) == STRIPS
    assert lot != worst
    assert page.count("<svg ") == 4
    for system in (evaluation, peer):
        figures = system.figures()
        for name in ("recall@1", "recall@10", "mrr", "ndcg@10"):
            low, high = figures["interval"][name]
            assert f"{figures[name]:.3f}<small>{low:.3f}–{high:.3f}</small>" in page
    assert f"{evaluation.figures()['calibration_error']:.3f}" in page


def test_charts_are_inline_and_use_the_page_colors(untrained_index, evaluation, tmp_path):
    path = tmp_path / "report.html"
    write_evaluation_report(path, untrained_index, evaluation)
    charts = re.findall(r"<svg.*?</svg>", path.read_text(), re.DOTALL)
    assert len(charts) == 4
    for chart in charts:
        assert not re.search(r"#[0-9a-f]{6}\b|https?:|<metadata|<style|font-family", chart)
        assert {"var(--ink)", "var(--quiet)", "var(--line)"} & set(re.findall(r"var\(--[\w-]+\)", chart))
        ids, used = re.findall(r' id="(\w+)"', chart), re.findall(r'(?:href="#|url\(#)(\w+)', chart)
        assert set(used) <= set(ids)
    every = [name for chart in charts for name in re.findall(r' id="(\w+)"', chart)]
    assert len(every) == len(set(every))


def test_missing_matplotlib_error_has_the_extra(untrained_index, evaluation, tmp_path):
    path = tmp_path / "report.html"
    write_evaluation_report(path, untrained_index, evaluation, charts=False)
    assert "<svg" not in path.read_text()
    hidden = "import sys; sys.modules['matplotlib'] = None; import llama_index_genret.evaluation.charts"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert "MissingExtra" in done.stderr
    assert "llama-index-genret[eval]" in done.stderr


def test_eval_fails_first_if_charts_cannot_be_drawn(tmp_path, monkeypatch):
    """The command fails even before it opens the index, which is missing, so not after an hour of recalling."""
    for name in ("matplotlib", "llama_index_genret.evaluation.charts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"llama-index-genret\[eval\]"):
        evaluate_command(tmp_path / "no-index", tmp_path / "queries.jsonl", report=tmp_path / "report.html")
