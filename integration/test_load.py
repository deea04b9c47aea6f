"""Tests of the load test: the server survives half a minute, and each kind of failure is detected."""

import asyncio
import json
import math
import random
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice

import pytest

from integration.bench import load_test
from integration.bench.corpus import Corpus
from integration.bench.load_faults import FAULTS, Target
from integration.bench.load_kills import Outage, Supervisor
from integration.bench.load_reference import GONE, STATES, EditedIndex, Question, Reference, group, metadata
from integration.bench.load_traffic import SHARES
from integration.bench.load_watch import ALLOWED_GROWTH, Watch
from integration.bench.recall_bench import with_symbols
from integration.bench.served import Site, queries
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.store import load_index


@pytest.fixture
def site(tiny_model_dir, tmp_path):
    mllm = with_symbols(load_mllm(str(tiny_model_dir), device="cpu"), 0)
    return Site.prepare(mllm, {"pictures": Corpus.sample(40, 0)}, tmp_path, metadata)


def result(index, text, ranking, exact=True):
    hits = [
        {"image_id": name, "log_prob": log_prob, "metadata": dict(index.records[index.rows_by_id[name]].metadata)}
        for name, log_prob in ranking
    ]
    return {"query": text, "hits": hits, "exact": exact}


def test_reference_accepts_only_right_results(site):
    index, texts = site.indexes["pictures"], list(islice(queries(0), 3))
    reference, question = Reference(site, index, texts), Question(5)
    right = {text: site.ranked("pictures", site.recall_by(site.scorer, "pictures", text))[:5] for text in texts}
    for text, ranking in right.items():
        assert reference.problem(0, text, question, result(index, text, ranking)) == ""
        assert reference.problem(0, text, question, result(index, text, ranking[::-1])) != ""
        assert reference.problem(0, text, question, result(index, text, ranking[:4])) != ""
        assert reference.problem(0, text, question, result(index, "other", ranking)) != ""
        other = [*ranking[:-1], ("image-39", ranking[-1][1])]
        assert reference.problem(0, text, question, result(index, text, other)) != ""
        moved = [(name, log_prob - 0.01) for name, log_prob in ranking]
        assert reference.problem(0, text, question, result(index, text, moved)) != ""
        assert reference.problem(2, text, question, result(index, text, ranking)) != ""
    assert len({str(ranking) for ranking in right.values()}) == len(texts), "all queries rank alike"
    text, filtered = texts[0], replace(question, filters={"color": "red"})
    assert "filter" in reference.problem(0, text, filtered, result(index, text, right[text]))


def test_edits_cycle_through_all_states(site):
    index = site.indexes["pictures"]
    edited = EditedIndex(index)
    for number in range(1, 2 * STATES + 1):
        edited.edit()
        assert (edited.newest.number, edited.newest.state) == (number, number % STATES)
        gone = GONE[edited.newest.state]
        expected = {record.image_id for row, record in enumerate(index.records) if group(row) not in gone}
        assert {record.image_id for record in load_index(index.folder).records} == expected


def test_growth_of_memory_and_files_is_detected_after_warm_up():
    def watched(mib, files=None):
        return Watch(0, mib, files or [100] * len(mib))

    assert watched([100.0] * 300).problems() == []
    assert watched([50.0] * 100 + [100.0] * 200).growth == 0
    growing = watched([100.0 + 0.1 * second for second in range(1200)])
    assert growing.growth > ALLOWED_GROWTH
    assert growing.slope[0] == pytest.approx(6.0, abs=0.1)
    assert "memory" in growing.problems()[0]
    assert "more files" in watched([100.0] * 1200, [second // 20 for second in range(1200)]).problems()[0]
    assert math.isnan(watched([100.0 + second for second in range(60)]).growth)


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind != "reset"])
async def test_a_server_that_cuts_no_client_is_detected(kind):
    """A server that reads every byte, and neither answers nor closes."""

    async def keep(reader, writer):
        with suppress(ConnectionError), closing(writer):
            while await reader.read(2**16):
                pass

    listening = await asyncio.start_server(keep, "127.0.0.1", 0)
    target = Target("127.0.0.1", listening.sockets[0].getsockname()[1], "pictures", 1.0, 2**20)
    assert "1 s" in await FAULTS[kind](target, random.Random(0))
    listening.close()
    await asyncio.sleep(0.05)


def test_outage_excuses_requests_in_flight_but_no_slow_exit():
    outage = Outage("engine", 100.0)
    supervisor = Supervisor(lambda: None, outages=[outage])
    assert supervisor.excuses(99.0, 101.0)
    assert not supervisor.excuses(90.0, 99.0)
    outage.unhealthy_s, outage.ended_s, outage.alone_s, outage.served_s = 103.0, 106.0, 107.0, 150.0
    assert outage.problems() == []
    assert supervisor.excuses(149.0, 160.0)
    assert not supervisor.excuses(152.0, 160.0)
    outage.unhealthy_s = 120.0
    assert "/health was 200 for 20 s" in outage.problems()[0]
    assert len(Outage("engine", 100.0, unhealthy_s=101.0).problems()) == 1  # it never ended


def test_server_survives_faulty_clients(tmp_path, capsys):
    found = tmp_path / "load.json"
    code = load_test.main(["--minutes", "0.5", "--clients", "8", "--faults", "--json", str(found)])
    results = json.loads(found.read_text())["load_test"]["results"]
    assert (code, results["broken"]) == (0, []), capsys.readouterr().out
    assert all(sum(v for k, v in results[kind].items() if k != "latency_ms") for kind in (*SHARES, *FAULTS))
    assert results["versions that answered"] > 2
