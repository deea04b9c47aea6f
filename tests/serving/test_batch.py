"""Batch recall from a file of queries to a file of hits: order, errors, resuming after a kill, and overwriting."""

import io
import json

import pytest

from llama_index_genret import FakeScorer
from llama_index_genret.cli.output import counting_bar
from llama_index_genret.errors import BatchError, CorpusError, FilterError, QueryError
from llama_index_genret.scorers.base import recall
from llama_index_genret.search import SearchOptions
from llama_index_genret.serving.batch import hit_to_json, open_batch
from tests.cli.test_commands import genret

ROWS = [
    {"query": "red circle", "file_name": "red-circle.png", "id": 7},
    {"query": " "},
    *({"query": f"picture {number}"} for number in range(9)),
    {"query": "x" * 5000, "kind": "long"},
    {"query": "naïve 日本\u2028語 👩‍👩‍👧"},
    {"query": "half \ud83d of a pair"},
]
REFUSED = [1, 11, 13]


@pytest.fixture
def scorer(untrained_index):
    return FakeScorer(untrained_index.tokenizer.vocab_size)


@pytest.fixture
def queries(tmp_path):
    path = tmp_path / "queries.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return path


def run(index, scorer, queries, out, batch_size=4, progress=lambda done: None, **options):
    with open_batch(index, queries, out, **options) as batch:
        return batch.finish(scorer, batch_size=batch_size, progress=progress)


def read_results(path):
    return [json.loads(line) for line in path.read_bytes().decode("utf-8").split("\n")[:-1]]


class Killed(BaseException):
    pass


def kill_after(n_results):
    def progress(done):
        if done >= n_results:
            raise Killed

    return progress


def output_files(out):
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith(out.name))


def test_each_line_has_the_hits_of_its_query_alone(untrained_index, scorer, queries, tmp_path):
    index, out = untrained_index, tmp_path / "hits.jsonl"
    summary = run(index, scorer, queries, out, k=3)
    found = read_results(out)
    assert [line["query"] for line in found] == [row["query"] for row in ROWS]
    for place, (row, line) in enumerate(zip(ROWS, found, strict=True)):
        assert row.items() <= line.items()
        assert line.keys() - row.keys() == ({"error"} if place in REFUSED else {"hits", "exact"})
        if place not in REFUSED:
            (ranking,) = recall(
                scorer, index.trie, [index.prompts.for_query(index.tokenizer, row["query"])], SearchOptions(k=3)
            )
            assert line["hits"] == [hit_to_json(index, hit) for hit in ranking.hits]
            assert line["exact"] == ranking.exact
    assert (summary.queries, summary.refused, summary.kept) == (len(ROWS), len(REFUSED), 0)
    assert output_files(out) == ["hits.jsonl"]


def test_refused_query_has_its_error(untrained_index, scorer, queries, tmp_path):
    run(untrained_index, scorer, queries, tmp_path / "hits.jsonl")
    empty, long, half = (read_results(tmp_path / "hits.jsonl")[place]["error"] for place in REFUSED)
    assert "empty" in empty
    assert "at most 256" in long
    assert "not valid Unicode" in half


def test_query_refused_by_the_scorer_keeps_its_batch(untrained_index, scorer, queries, tmp_path):
    longest = len(untrained_index.prompts.for_query(untrained_index.tokenizer, ROWS[12]["query"]).token_ids)

    class Short(FakeScorer):
        def session(self, prompts, normalise):
            if any(len(prompt.token_ids) >= longest for prompt in prompts):
                raise QueryError("longer than this model reads")
            return super().session(prompts, normalise)

    out, whole = tmp_path / "hits.jsonl", tmp_path / "whole.jsonl"
    run(untrained_index, scorer, queries, whole)
    summary = run(untrained_index, Short(scorer.vocab_size), queries, out)
    assert summary.refused == len(REFUSED) + 1
    found, expected = read_results(out), read_results(whole)
    assert found.pop(12)["error"] == "longer than this model reads"
    expected.pop(12)
    assert found == expected


@pytest.mark.parametrize("n_results", range(0, len(ROWS) + 1, 4))
@pytest.mark.parametrize("partial_line", [b"", b'{"query": "pict', b'{"query": "picture", "hits": [], "exact": true}'])
def test_resumed_run_writes_the_file_of_an_uninterrupted_run(
    untrained_index, scorer, queries, tmp_path, n_results, partial_line
):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "hits.jsonl"
    expected = run(untrained_index, scorer, queries, whole)
    with pytest.raises(Killed):
        run(untrained_index, scorer, queries, out, progress=kill_after(n_results))
    part = tmp_path / "hits.jsonl.part"
    assert part.is_file() == (n_results > 0)
    if n_results:
        with part.open("ab") as file:
            file.write(partial_line)
    seen = []
    summary = run(untrained_index, scorer, queries, out, progress=seen.append)
    assert out.read_bytes() == whole.read_bytes()
    assert summary.refused == expected.refused
    assert summary.kept == seen[0] == n_results
    assert seen[-1] == len(ROWS)
    assert output_files(out) == ["hits.jsonl"]


def test_run_resumes_with_another_batch_size(untrained_index, scorer, queries, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "hits.jsonl"
    run(untrained_index, scorer, queries, whole)
    with pytest.raises(Killed):
        run(untrained_index, scorer, queries, out, progress=kill_after(8))
    assert run(untrained_index, scorer, queries, out, batch_size=3).kept == 6
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"k": 2}, r"k 5 \(now 2\)"),
        ({"mode": "exact"}, r"mode 'beam' \(now 'exact'\)"),
        ({"mode": "exact", "max_expansions": 9}, r"max_expansions None \(now 9\)"),
        ({"filters": {"color": "red"}}, r"filters {} \(now {'color': 'red'}\)"),
        ({"scored_by": "server"}, r"scored_by '' \(now 'server'\)"),
    ],
)
def test_unfinished_run_with_other_options_is_refused(untrained_index, scorer, queries, tmp_path, changed, words):
    out, part = tmp_path / "hits.jsonl", tmp_path / "hits.jsonl.part"
    with pytest.raises(Killed):
        run(untrained_index, scorer, queries, out, k=5, progress=kill_after(4))
    before = part.read_bytes()
    with pytest.raises(BatchError, match=f"{words}.*--overwrite"):
        run(untrained_index, scorer, queries, out, **{"k": 5, **changed})
    assert part.read_bytes() == before
    assert run(untrained_index, scorer, queries, out, overwrite=True, **{"k": 5, **changed}).kept == 0
    assert len(read_results(out)) == len(ROWS)


def test_unfinished_run_of_another_file_or_index_is_refused(untrained_index, trained_index, scorer, queries, tmp_path):
    out = tmp_path / "hits.jsonl"
    with pytest.raises(Killed):
        run(untrained_index, scorer, queries, out, progress=kill_after(4))
    with pytest.raises(BatchError, match=f"index '{untrained_index.version}' .now '{trained_index.version}'"):
        run(trained_index, scorer, queries, out)
    queries.write_bytes(queries.read_bytes().replace(b"picture 8", b"picture 9"))
    with pytest.raises(BatchError, match="queries '"):
        run(untrained_index, scorer, queries, out)


def test_partial_file_without_its_header_is_refused(untrained_index, scorer, queries, tmp_path):
    (tmp_path / "hits.jsonl.part").write_text("{}\n")
    with pytest.raises(BatchError, match="its header is missing"):
        run(untrained_index, scorer, queries, tmp_path / "hits.jsonl")


def test_hits_are_replaced_only_with_overwrite_and_at_the_end(untrained_index, scorer, queries, tmp_path):
    out = tmp_path / "hits.jsonl"
    out.write_text("precious")
    with pytest.raises(BatchError, match="--overwrite"):
        run(untrained_index, scorer, queries, out)
    with pytest.raises(Killed):
        run(untrained_index, scorer, queries, out, overwrite=True, progress=kill_after(8))
    assert out.read_text() == "precious"
    assert run(untrained_index, scorer, queries, out, overwrite=True).kept == 8
    assert len(read_results(out)) == len(ROWS)


def test_file_of_queries_is_never_replaced(untrained_index, scorer, queries):
    with pytest.raises(BatchError, match="exists"):
        run(untrained_index, scorer, queries, queries, overwrite=True)


def test_two_runs_cannot_write_the_same_file(untrained_index, scorer, queries, tmp_path):
    out = tmp_path / "hits.jsonl"
    with open_batch(untrained_index, queries, out) as batch:
        with pytest.raises(BatchError, match="another run"), open_batch(untrained_index, queries, out):
            pass
        batch.finish(scorer)
    assert len(read_results(out)) == len(ROWS)


@pytest.mark.parametrize(
    "line", ["{", "[]", '"text"', "{}", '{"query": 1}', '{"query": "x", "hits": []}', '{"query": "x", "error": ""}']
)
def test_invalid_line_is_an_error_with_file_and_line(untrained_index, queries, tmp_path, line):
    """The error is raised before anything is written."""
    queries.write_text('{"query": "a"}\n\n' + line)
    with (
        pytest.raises(CorpusError, match=r"queries\.jsonl, line 3"),
        open_batch(untrained_index, queries, tmp_path / "hits.jsonl"),
    ):
        pass
    assert output_files(tmp_path / "hits.jsonl") == []


def test_invalid_utf_8_is_an_error_with_file_and_line(untrained_index, queries, tmp_path):
    queries.write_bytes(b'{"query": "a"}\n{"query": "\xff"}\n')
    with (
        pytest.raises(CorpusError, match=r"queries\.jsonl, line 2"),
        open_batch(untrained_index, queries, tmp_path / "h"),
    ):
        pass


def test_missing_or_empty_file_is_an_error_with_its_name(untrained_index, queries, tmp_path):
    for path, out, error in [
        (tmp_path / "nowhere.jsonl", tmp_path / "h", CorpusError),
        (tmp_path, tmp_path / "h", CorpusError),
        (queries, tmp_path / "nowhere" / "h", BatchError),
    ]:
        with pytest.raises(error, match=r"nowhere|no regular file"), open_batch(untrained_index, path, out):
            pass
    queries.write_text("\n")
    with pytest.raises(CorpusError, match="no queries"), open_batch(untrained_index, queries, tmp_path / "h"):
        pass


def test_filters_reach_the_search(untrained_index, scorer, queries, tmp_path):
    out = tmp_path / "hits.jsonl"
    run(untrained_index, scorer, queries, out, filters={"color": "red"})
    found = [line for line in read_results(out) if "hits" in line]
    assert {hit["file_name"].split("-")[0] for line in found for hit in line["hits"]} == {"red"}
    with pytest.raises(FilterError), open_batch(untrained_index, queries, tmp_path / "h", filters={"size": "1"}):
        pass


@pytest.mark.parametrize(("mode", "max_expansions"), [("beam", None), ("exact", None), ("exact", 9)])
def test_mode_reaches_the_search(untrained_index, scorer, queries, tmp_path, monkeypatch, mode, max_expansions):
    """The options are recorded, because beam and exact search find the same hits among twenty images."""
    modes = []

    def recording_recall(scorer, trie, prompts, options, **more):
        modes.append((options.mode, options.max_expansions))
        return recall(scorer, trie, prompts, options, **more)

    monkeypatch.setattr("llama_index_genret.serving.batch.recall", recording_recall)
    out = tmp_path / "hits.jsonl"
    run(untrained_index, scorer, queries, out, mode=mode, max_expansions=max_expansions)
    assert set(modes) == {(mode, max_expansions)}


def test_command_line_writes_hits_and_does_not_overwrite(trained_index, queries, tmp_path):
    out = tmp_path / "hits.jsonl"
    arguments = ("batch", trained_index.folder, queries, "--out", out, "-k", 3, "--device", "cpu")
    done = genret(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["queries"], summary["refused"], summary["kept"]) == (len(ROWS), len(REFUSED), 0)
    assert "3 queries were refused" in done.stderr
    first = read_results(out)[0]
    alone = json.loads(genret("query", trained_index.folder, "red circle", "-k", 3, "--device", "cpu", "--json").stdout)
    assert [hit["image_id"] for hit in first["hits"]] == [hit["image_id"] for hit in alone["hits"]]
    again = genret(*arguments)
    assert again.returncode == 1
    assert "--overwrite" in again.stderr
    assert genret(*arguments, "--offline").returncode == genret(*arguments, "--vllm-option", "a=1").returncode == 2


def test_progress_bar_counts_queries_on_a_terminal(untrained_index, scorer, queries, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with counting_bar("Recalling", len(ROWS)) as progress:
        run(untrained_index, scorer, queries, tmp_path / "hits.jsonl", progress=progress)
    assert f"{len(ROWS)}/{len(ROWS)}" in terminal.getvalue()
