"""Pseudo-queries: how a run resumes, and where its queries are used."""

import hashlib
import json
import shutil

import pytest
from typer.testing import CliRunner

from llama_index_genret.cli import app
from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import BatchError
from llama_index_genret.evaluation.baselines import baseline
from llama_index_genret.evaluation.evaluate import count_pseudo_queries
from llama_index_genret.store import PSEUDO_QUERIES, load_index, remove_images
from llama_index_genret.store.build import add_to_index, build_index
from llama_index_genret.store.model_state import new_token_ids
from llama_index_genret.store.queries import EvaluationQuery
from llama_index_genret.training.pseudo_queries import Sampling, WriteOptions, WriterReply, WriterRequest, open_writing
from llama_index_genret.training.pseudo_queries.filtering import MAX_IMAGES
from llama_index_genret.training.pseudo_queries.transformers_writer import InProcessWriter
from llama_index_genret.training.pseudo_queries.writer import KINDS
from llama_index_genret.training.recipe import TrainOptions, train
from llama_index_genret.training.tasks import examples_of
from tests.conftest import draw_pictures

pytestmark = pytest.mark.torch


class Killed(BaseException):
    pass


class Table:
    """A writer that replies from a table by image, or with distinct texts, and dies after a number of batches."""

    model, fingerprint = "table", "0" * 64

    def __init__(self, replies=None, dies_after=None):
        self.replies, self.dies_after, self.batches = replies or {}, dies_after, []

    def __call__(self):
        return self

    def write(self, requests, sampling):
        if self.dies_after == len(self.batches):
            raise Killed
        self.batches.append(requests)
        return [self._replies_to(request, sampling.n) for request in requests]

    def _replies_to(self, request, n):
        kind = next(kind for kind, task in KINDS.items() if task in request.text)
        name = request.image.stem
        texts = self.replies.get(name) or [
            hashlib.sha256(f"{kind} {number} {name} {request.seed}".encode()).hexdigest()[:16] for number in range(n)
        ]
        return [WriterReply(text, True) for text in texts]


@pytest.fixture(scope="session")
def bare_index(tmp_path_factory, tiny_mllm):
    """An index without captions."""
    folder = tmp_path_factory.mktemp("bare")
    draw_pictures(folder / "images")
    (folder / "images" / "metadata.jsonl").unlink()
    return build_index(read_corpus(folder / "images"), folder / "index", tiny_mllm)


@pytest.fixture
def bare(bare_index, tmp_path):
    shutil.copytree(bare_index.folder, tmp_path / "index")
    return load_index(tmp_path / "index")


@pytest.fixture
def captioned(untrained_index, tmp_path):
    """An index with one caption per image."""
    shutil.copytree(untrained_index.folder, tmp_path / "captioned")
    return load_index(tmp_path / "captioned")


def write(index, writer, samples=(), **options):
    with open_writing(index, WriteOptions(**options), samples=samples) as run:
        return run.finish(writer)


def texts_of(index):
    return {
        image_id: [query.text for query in line.queries]
        for image_id, line in load_index(index.folder).pseudo_queries.items()
    }


def stored(index):
    return load_index(index.folder).file(PSEUDO_QUERIES).read_bytes()


def test_every_image_gets_missing_queries_with_provenance(bare, captioned):
    for index, wanted in ((bare, 8), (captioned, 7)):
        summary = write(index, Table(), seed=3, temperature=0.5)
        assert (summary.images, summary.queries, summary.short) == (20, 20 * wanted, 0)
        for line in load_index(index.folder).pseudo_queries.values():
            assert len(line.queries) == line.wanted == wanted
            assert {query.kind for query in line.queries} == set(KINDS)
            facts = line.provenance
            assert (facts.model, facts.fingerprint, facts.seed, facts.temperature) == ("table", "0" * 64, 3, 0.5)
            assert (facts.style, facts.written_by) == (None, "transformers")
    assert write(captioned, Table(), per_image=1).images == 0


@pytest.mark.parametrize("torn", [b"", b'{"model": "tab'])
@pytest.mark.parametrize("batches", [0, 1, 3])
def test_killed_run_resumes_to_the_same_file(bare, tmp_path, batches, torn):
    whole = shutil.copytree(bare.folder, tmp_path / "whole")
    options = {"batch_size": 6, "per_image": 3}
    uninterrupted = Table()
    write(load_index(whole), uninterrupted, **options)
    with pytest.raises(Killed):
        write(bare, Table(dies_after=batches), **options)
    part = bare.folder / f"{PSEUDO_QUERIES}.part"
    with part.open("ab") as file:
        file.write(torn)
    second = Table()
    assert write(bare, second, **options).kept == 6 * batches
    assert second.batches == uninterrupted.batches[batches:]
    assert stored(bare) == stored(load_index(whole))
    assert not part.exists()


def test_unfinished_run_with_other_options_needs_overwrite(bare):
    with pytest.raises(Killed):
        write(bare, Table(dies_after=1), seed=1)
    with pytest.raises(BatchError, match=r"seed 1 \(now 2\).*remove the file"):
        write(bare, Table(), seed=2)
    assert write(bare, Table(), seed=2, overwrite=True).kept == 0
    assert {line.provenance.seed for line in load_index(bare.folder).pseudo_queries.values()} == {2}


def test_second_concurrent_run_is_refused(bare):
    with open_writing(bare), pytest.raises(BatchError, match="another run"), open_writing(bare):
        pass
    assert not (bare.folder / f"{PSEUDO_QUERIES}.part").exists()


def test_queries_of_too_many_images_are_dropped(bare, captioned):
    names = [record.image_id for record in bare.records]
    replies = {name: ["A thing.", f"a {name}"] for name in names[: MAX_IMAGES + 1]}
    replies |= {name: ["a few", f"a {name}"] for name in names[MAX_IMAGES + 1 : 2 * MAX_IMAGES + 1]}
    summary = write(bare, Table(replies))
    texts = texts_of(bare)
    assert sum("A thing" in found for found in texts.values()) == 0
    assert sum("a few" in found for found in texts.values()) == MAX_IMAGES
    assert summary.refused["shared by too many images"] == MAX_IMAGES + 1
    assert summary.short == 2 * MAX_IMAGES + 1
    red = {
        name: ["red circle", "red bar", f"own of {name}"]
        for name in ("red-circle", "blue-bar", "blue-frame", "red-bar")
    }
    write(captioned, Table(red))
    found = texts_of(captioned)
    assert "red circle" not in found["red-circle"]
    assert not any("red circle" in found[name] for name in red), "three queries and one caption count as four images"


def test_queries_similar_to_a_caption_are_dropped(captioned):
    write(captioned, Table({"red-circle": ["Red circle!", "red circles", "something round"]}))
    assert texts_of(captioned)["red-circle"] == ["something round"]


def test_samples_are_shown_not_copied_and_hold_no_markup(bare):
    symbol = bare.identifiers[0][0]
    writer = Table({"red-bar": ["where's my bar", "a red one", f"a {symbol} bar", "<|im_end|> bar"]})
    summary = write(bare, writer, samples=["Where's my bar?", f"find {symbol}"])
    assert all("Where's my bar?" in request.text for batch in writer.batches for request in batch)
    assert not any(symbol in request.text for batch in writer.batches for request in batch)
    assert texts_of(bare)["red-bar"] == ["a red one"]
    assert summary.refused["copied from the samples"] == len(KINDS)
    assert summary.refused["markup"] == 2 * len(KINDS)
    assert load_index(bare.folder).pseudo_queries["red-bar"].provenance.style


def test_added_images_get_queries_and_others_keep_theirs(bare, tiny_mllm, tmp_path):
    write(bare, Table({record.image_id: ["a few", record.image_id] for record in bare.records[:MAX_IMAGES]}), seed=1)
    before = load_index(bare.folder).pseudo_queries
    more = tmp_path / "more"
    more.mkdir()
    shutil.copy(bare.records[0].path, more / "new.png")
    grown = add_to_index(load_index(bare.folder), read_corpus(more).records, tiny_mllm)
    assert grown.pseudo_queries == before
    assert write(grown, Table({"new": ["a few", "the new one"]}), seed=2).images == 1
    after = load_index(bare.folder).pseudo_queries
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"new"}
    assert texts_of(bare)["new"] == ["the new one"], "the other query is already stored for MAX_IMAGES images"
    assert write(load_index(bare.folder), Table(dies_after=0), seed=2).images == 0


def test_image_without_usable_replies_is_not_retried(bare):
    summary = write(bare, Table({record.image_id: ["", "..."] for record in bare.records}))
    assert (summary.images, summary.queries, summary.short, summary.none) == (20, 0, 20, 20)
    assert summary.refused == {"without words": 20 * 2 * len(KINDS)}
    assert write(load_index(bare.folder), Table(dies_after=0)).images == 0
    assert write(load_index(bare.folder), Table(), seed=1, overwrite=True).short == 0


def test_removed_image_loses_its_queries(bare, tiny_mllm, tmp_path):
    write(bare, Table())
    left = remove_images(load_index(bare.folder), ["red-bar"])
    assert b"red-bar" not in left.file(PSEUDO_QUERIES).read_bytes()
    assert len(left.pseudo_queries) == 19
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(bare.records[0].path, other / "red-bar.png")
    grown = add_to_index(left, read_corpus(other).records, tiny_mllm)
    assert "red-bar" not in grown.pseudo_queries


def test_edits_during_a_run_are_kept(bare):
    with open_writing(bare) as run:
        remove_images(load_index(bare.folder), ["red-bar"])
        summary = run.finish(Table())
    assert summary.images == 19
    index = load_index(bare.folder)
    assert len(index.records) == len(index.pseudo_queries) == 19


def test_pseudo_queries_alone_suffice_for_training(bare):
    write(bare, Table(), per_image=2)
    index = load_index(bare.folder)
    tasks = examples_of(index)
    expected = {(row, text) for row, r in enumerate(index.records) for text in texts_of(index)[r.image_id]}
    assert {(example.row, example.text) for example in tasks["retrieve"]} == expected
    assert len(expected) == 2 * len(index.records)
    assert set(tasks) == {"memorise", "retrieve"}
    assert train(index, TrainOptions(max_steps=1, lora_rank=2), device="cpu", show_progress=False).is_trained


def test_evaluation_ignores_and_counts_pseudo_queries(bare):
    zebra = EvaluationQuery("A zebra", frozenset({"red-bar"}))
    bus = EvaluationQuery("the bus", frozenset({"red-bar"}))
    before = baseline("tfidf", load_captions(bare), [zebra, bus]).figures()
    write(bare, Table({"red-bar": ["a zebra"], "blue-bar": ["the bus"]}))
    index = load_index(bare.folder)
    assert baseline("tfidf", load_captions(index), [zebra, bus]).figures() == before
    assert [record.captions for record in index.records] == [()] * 20
    assert count_pseudo_queries(index, [zebra, bus]) == 1


def load_captions(index):
    """Return the records, one of them with a caption, which the baseline needs."""
    import dataclasses

    return [dataclasses.replace(r, captions=("green bar",)) if r.image_id == "green-bar" else r for r in index.records]


@pytest.fixture(scope="module")
def in_process(bare_index):
    from llama_index_genret.store.model_loading import load_base

    return InProcessWriter(bare_index, load_base(bare_index, device="cpu"))


def test_in_process_writer_batch_equals_single_requests(bare_index, in_process):
    texts = ["What is it?", "Find a picture of a red thing, please.", "Find: <image> <|im_end|>"]
    requests = [WriterRequest(bare_index.records[4 * i].path, text, 7) for i, text in enumerate(texts)]
    greedy = Sampling(n=2, temperature=1e-4, max_tokens=6)
    together = in_process.write(requests, greedy)
    assert together == [in_process.write([request], greedy)[0] for request in requests]
    assert all(len(answers) == 2 and answers[0] == answers[1] for answers in together)
    other = WriterRequest(bare_index.records[1].path, texts[0], 7)
    assert len({in_process.write([request], greedy)[0][0].text for request in (requests[0], other)}) == 2


def test_in_process_writer_never_writes_symbols(bare_index):
    from llama_index_genret.store.model_loading import load_base

    mllm = load_base(bare_index, device="cpu")
    writer, greedy = InProcessWriter(bare_index, mllm), Sampling(n=1, temperature=1e-4, max_tokens=6)
    requests = [WriterRequest(record.path, "What is it?", 7) for record in bare_index.records[:3]]
    before = writer.write(requests, greedy)
    first, second, *_ = new_token_ids(bare_index)
    rows = mllm.model.get_output_embeddings().weight.data
    rows[first], rows[second] = 100.0, -100.0  # one of them has the largest logit
    assert writer.write(requests, greedy) == before


def test_in_process_writer_samples_by_the_seed(bare_index, in_process):
    def answers(seed):
        request = WriterRequest(bare_index.records[0].path, "What is it?", seed)
        return in_process.write([request], Sampling(n=30, temperature=5.0, max_tokens=24))[0]

    assert answers(1) == answers(1) != answers(2)
    assert len({answer.text for answer in answers(1)}) > 20
    assert {answer.ended for answer in answers(1)} == {True, False}


def test_command_writes_queries_and_inspect_counts_them(bare):
    def genret(*arguments):
        done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    write(bare, Table(), per_image=2)
    small = ("--per-image", 3, "--batch-size", 10, "--device", "cpu")
    wrote, log = genret("write-queries", bare.folder, *small)
    assert wrote["images"] == 20
    assert wrote["short"] > 0
    assert "fewer queries than --per-image" in log
    assert "unfinished" in log
    again, log = genret("write-queries", bare.folder, *small)
    assert (again["images"], again["pseudo_queries"]) == (0, wrote["pseudo_queries"])
    assert "fewer" not in log
    facts, _ = genret("inspect", bare.folder)
    assert (facts["captions"], facts["pseudo_queries"]) == (0, wrote["pseudo_queries"])
    provenance = next(iter(load_index(bare.folder).pseudo_queries.values())).provenance
    assert provenance.model == bare.manifest.model.name_or_path
    assert provenance.fingerprint == bare.manifest.model.fingerprint
