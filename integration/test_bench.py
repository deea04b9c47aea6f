"""Tests of the benchmarks at small sizes: they check equality before they time. Only wide margins are asserted."""

import json
from contextlib import nullcontext

import pytest

from integration.bench import (
    exact_bench,
    filter_bench,
    memory_bench,
    processor_bench,
    recall_bench,
    serve_bench,
    step_bench,
    throughput_bench,
    trie_bench,
)
from integration.bench.agreement import disagreement
from integration.bench.corpus import FIRST_TOKEN, LEVELS, SYMBOLS, Corpus
from integration.bench.peers import PEERS
from integration.bench.served import SHAPES, Site, index_name
from llama_index_genret.models.mllm import load_mllm


@pytest.fixture
def results(tmp_path):
    """Run a benchmark and return its results."""

    def run(bench, *arguments):
        path = tmp_path / "results.json"
        bench.main([*arguments, "--rounds", "2", "--json", str(path)])
        (written,) = json.loads(path.read_text()).values()
        assert written["seed"] == 0
        assert {"cpu", "python", "numpy", "torch", "xgrammar"} <= written["machine"].keys()
        return written["results"]

    return run


def test_bench_corpus_is_sorted_distinct_and_children_match():
    corpus = Corpus.sample(3_000, 0)
    identifiers = corpus.token_ids.tolist()
    assert identifiers == sorted(map(list, set(map(tuple, identifiers))))
    assert corpus.token_ids.min() >= FIRST_TOKEN
    assert corpus.token_ids.max() < FIRST_TOKEN + LEVELS * SYMBOLS
    leaves = corpus.leaves(5, 0)
    for depth in range(LEVELS):
        for prefix, allowed in zip(corpus.prefixes(leaves, depth), corpus.allowed(leaves, depth), strict=True):
            assert allowed.tolist() == sorted({ids[depth] for ids in identifiers if ids[:depth] == prefix})


def test_the_gather_step_is_measured_against_every_peer(results):
    found = results(trie_bench, "--sizes", "500,1000")
    for rows in (10, 640):
        times = found[f"gather {rows} rows, N=1000"]["times"]
        assert times.keys() == {"ours", *(peer.name for peer in PEERS)}
        assert all(0 < t["fastest_s"] <= t["median_s"] <= t["slowest_s"] for t in times.values())
    assert found["gather 640 rows, N=1000"]["times_ours"]["xgrammar"] > 3
    assert found["gather 640 rows, N=1000"]["times_ours"]["llguidance"] > 3


def test_a_peer_that_answers_wrongly_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr("integration.bench.peers.DictTrie.get", lambda self, prefix: [FIRST_TOKEN])
    with pytest.raises(AssertionError, match="dict trie"):
        trie_bench.main(["--sizes", "500", "--rounds", "1"])


def test_memory_and_opening_are_measured(results):
    found = results(memory_bench, "--sizes", "100000")
    assert found["ours, memory, N=100000"] < 8
    assert found["ours, disk, N=100000"] < 8
    assert found["dict trie, memory, N=100000"] > 100
    assert found["open, N=100000"]["times_ours"]["dict trie (pickle)"] > 10
    assert found["build from sorted, N=100000"]["times_ours"]["dict trie (GENRE)"] > 3


def test_filter_setup_is_measured_and_beats_rebuilding(results):
    found = results(filter_bench, "--sizes", "10000")
    assert {f"step {share}, {n} queries, N=10000" for share in ("1%", "50%") for n in (1, 64)} <= found.keys()
    assert {f"gather {share}, {n} rows, N=10000" for share in ("1%", "50%") for n in (10, 640)} <= found.keys()
    assert found["set-up 50%, N=10000"]["times_ours"]["dict trie, rebuilt"] > 3


def test_beam_step_equals_hugging_face_and_beats_it(results, monkeypatch):
    monkeypatch.setattr(step_bench, "QUERIES", (1, 8))
    ratios = results(step_bench, "--sizes", "2000")["beam step, 8 queries, N=2000"]["times_ours"]
    assert ratios["Hugging Face, dict trie"] > 3
    assert ratios["Hugging Face, no constraint"] > 3


def test_logits_processor_equals_hugging_face_and_beats_it(results, monkeypatch):
    monkeypatch.setattr(processor_bench, "ROWS", (64,))
    found = results(processor_bench, "--sizes", "2000")
    assert found["processor, 64 rows, N=2000"]["times_ours"]["Hugging Face"] > 3


def test_exact_search_equals_the_definition_and_is_measured(results, monkeypatch):
    monkeypatch.setattr(exact_bench, "TRIES", 50)
    found = results(exact_bench, "--sizes", "2000")
    assert found["equal to scoring every identifier"] == 50
    for spread in exact_bench.SPREADS:
        assert found[f"spread {spread}: prefixes expanded, exact"] >= 1


def test_recall_of_a_real_model_equals_generate(results):
    """The benchmark itself asserts it, with ninety million weights and ten beams."""
    found = results(recall_bench, "--sizes", "2000")
    assert found["largest difference of log-probabilities to generate's"] < recall_bench.TOLERANCE
    assert found["recall, N=2000"]["times_ours"]["generate, 10 beams, dict trie"] > 1


def test_a_balanced_corpus_branches_alike_at_every_level():
    for n, branching in ((1_000, 6), (10_000, 10), (100_000, 18), (1_000_000, 32)):
        corpus = Corpus.balanced(n, 0)
        assert len(corpus) == branching**LEVELS
        assert [len(set(corpus.codes[:, level].tolist())) for level in range(LEVELS)] == [branching] * LEVELS
    assert corpus.codes.tolist() == sorted(corpus.codes.tolist())


@pytest.mark.parametrize(
    ("found", "same"),
    [
        ([("a", -1.0), ("b", -2.0), ("c", -3.0)], True),
        ([("a", -1.0005), ("b", -2.0), ("c", -3.0)], True),
        ([("a", -1.0), ("b", -2.0), ("d", -3.0)], True),  # may tie with c, which was cut off at the end of the list
        ([("b", -1.0), ("a", -2.0), ("c", -3.0)], False),
        ([("a", -1.0), ("d", -2.0), ("c", -3.0)], False),
        ([("a", -1.0), ("b", -2.01), ("c", -3.0)], False),
        ([("a", -1.0), ("a", -2.0), ("c", -3.0)], False),
        ([("a", -1.0), ("b", -2.0)], False),
    ],
)
def test_rankings_are_the_same_up_to_ties(found, same):
    assert (disagreement(found, [("a", -1.0), ("b", -2.0), ("c", -3.0)]) == "") == same


SIZES = (300, 1_000)


@pytest.fixture(scope="module")
def served_site(tiny_model_dir, tmp_path_factory):
    """Start a tiny model and four small indexes on one server, which the served benchmarks share."""
    mllm = recall_bench.with_symbols(load_mllm(str(tiny_model_dir), device="cpu"), 0)
    corpora = {index_name(shape, n): make(n, 0) for shape, make in SHAPES.items() for n in SIZES}
    site = Site.prepare(mllm, corpora, tmp_path_factory.mktemp("served-site"))
    with site.serving() as server:
        yield site, server


@pytest.fixture
def on_served_site(served_site, monkeypatch):
    site, server = served_site
    for bench in (serve_bench, throughput_bench):
        monkeypatch.setattr(bench, "model_with_symbols", lambda seed: site.mllm)
    monkeypatch.setattr(Site, "prepare", lambda *_: site)
    monkeypatch.setattr(Site, "serving", lambda *_: nullcontext(server))
    return site


def test_one_query_is_measured_beside_vllm(results, on_served_site):
    found = results(serve_bench, "--sizes", ",".join(map(str, SIZES)))
    for shape in SHAPES:
        for state in ("cold", "warm"):
            times = found[f"{index_name(shape, SIZES[-1])}, {state}"]["times"]
            assert times.keys() == {"ours", serve_bench.STOCK, serve_bench.BEAMS, serve_bench.GREEDY}
        assert len(found[f"sizes, {shape}"]["times"]) == len(SIZES)


def test_an_endpoint_that_answers_wrongly_stops_the_benchmark(on_served_site, monkeypatch):
    monkeypatch.setattr(serve_bench, "ranked", lambda answer: [("image-0", -1.0)])
    with pytest.raises(AssertionError, match="endpoint"):
        serve_bench.main(["--sizes", ",".join(map(str, SIZES)), "--rounds", "1"])


def test_many_clients_are_measured_beside_grace(results, on_served_site, monkeypatch):
    monkeypatch.setattr(throughput_bench, "CLIENTS", (1, 4))
    monkeypatch.setattr(throughput_bench, "BATCH", 4)
    monkeypatch.setattr(throughput_bench, "FEWEST", 4)
    name = index_name("balanced", SIZES[-1])
    found = results(throughput_bench, "--sizes", str(SIZES[-1]))
    assert found[f"a query at 4 clients, {name}"]["times"].keys() == {
        "ours",
        throughput_bench.BATCHED,
        throughput_bench.ALONE,
    }
    for kind in ("1 clients, cold", "4 clients, cold", "4 clients, warm"):
        assert found[f"{name}, {kind}: latency p50"] <= found[f"{name}, {kind}: latency p95"]
