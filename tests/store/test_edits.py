"""Adding and removing images is one atomic write, takes effect at once and changes nothing else."""

import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from llama_index_genret.cli import app
from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import DuplicateImage, IdentifierError, UnknownImage
from llama_index_genret.identifiers import ImageFacts
from llama_index_genret.identifiers.structured import StructuredScheme
from llama_index_genret.models.encoder import embed_by_captions, load_encoder
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.store import RecordFilters, load_index, remove_images
from llama_index_genret.store.build import add_to_index, build_index, needs_features
from llama_index_genret.store.model_state import new_token_ids, stored_new_rows
from tests.conftest import draw_pictures

pytestmark = pytest.mark.torch


@pytest.fixture
def index(untrained_index, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(untrained_index.folder, tmp_path / "index")
    return load_index(tmp_path / "index")


@pytest.fixture(scope="session")
def more_pictures(tmp_path_factory):
    """Create four images in another folder. One of them is a copy of an indexed image."""
    folder = tmp_path_factory.mktemp("more") / "pictures"
    folder.mkdir(parents=True)
    shutil.copy(draw_pictures(tmp_path_factory.mktemp("drawn") / "all") / "red-circle.png", folder / "twin.png")
    for number in range(3):
        Image.new("RGB", (64, 64), (40 * number, 200, 90)).save(folder / f"plain-{number}.png")
    return folder


def recall_all(index, k=50):
    (ranking,) = recall(FakeScorer(index.tokenizer.vocab_size), index.trie, [Prompt((1, 2))], SearchOptions(k=k))
    return {index.record_of(hit).image_id: (index.identifier_of(hit), hit.log_prob) for hit in ranking.hits}


def identifiers_of(index):
    return {record.image_id: identifier for record, identifier in zip(index.records, index.identifiers, strict=True)}


def test_added_images_are_found_and_old_identifiers_stay(index, more_pictures, tiny_mllm):
    before = identifiers_of(index)
    grown = add_to_index(index, read_corpus(more_pictures).records, tiny_mllm)
    assert recall_all(grown).keys() == before.keys() | {"twin", "plain-0", "plain-1", "plain-2"}
    assert {image_id: identifiers_of(grown)[image_id] for image_id in before} == before
    assert recall_all(load_index(index.folder)) == recall_all(grown)
    assert all(record.path.is_file() for record in load_index(index.folder).records)


def test_copy_of_an_image_gets_a_sibling_of_its_codes(index, more_pictures, tiny_mllm):
    identifiers = identifiers_of(add_to_index(index, read_corpus(more_pictures).records, tiny_mllm))
    first, twin = identifiers["red-circle"], identifiers["twin"]
    assert len(twin) == len(first) == 2
    assert twin[:1] == first[:1]
    assert twin != first


def test_known_and_unknown_ids_are_refused_without_a_write(index, tiny_mllm, pictures):
    manifest = (index.folder / "manifest.json").read_bytes()
    with pytest.raises(DuplicateImage, match=r"'red-circle' already \(20 of 20"):
        add_to_index(index, read_corpus(pictures).records, tiny_mllm)
    with pytest.raises(UnknownImage, match=r"'nowhere' \(1 of 2"):
        remove_images(index, ["red-circle", "nowhere"])
    assert (index.folder / "manifest.json").read_bytes() == manifest


def test_removal_redistributes_the_probability(index):
    left = remove_images(index, ["red-circle", "blue-bar"])
    found = recall_all(left)
    assert found.keys() == recall_all(index).keys() - {"red-circle", "blue-bar"}
    assert sum(pow(2.718281828459045, log_prob) for _, log_prob in found.values()) == pytest.approx(1.0)
    assert "red-circle" not in (index.folder / left.manifest.files["records.jsonl"].path).read_text()
    assert recall_all(load_index(index.folder)) == found


def test_series_of_edits_yields_the_expected_images(index, more_pictures, tiny_mllm, pictures):
    """Small edits are stored beside the trie. A large one rewrites it."""
    everything = {record.image_id: record for record in read_corpus(pictures).records}
    trie_file = index.manifest.files["trie.bin"].path
    index = remove_images(index, ["red-circle"])
    assert index.manifest.files["trie.bin"].path == trie_file
    assert "edits.safetensors" in index.manifest.files
    index = add_to_index(index, read_corpus(more_pictures).records, tiny_mllm)
    assert index.manifest.files["trie.bin"].path != trie_file
    assert "edits.safetensors" not in index.manifest.files
    index = remove_images(index, ["twin"])
    index = add_to_index(index, [everything["red-circle"]], tiny_mllm)
    expected = everything.keys() | {"plain-0", "plain-1", "plain-2"}
    assert recall_all(index).keys() == expected == index.rows_by_id.keys()
    allowed = index.leaf_filter(RecordFilters.equal({"color": "red"}))
    (ranking,) = recall(FakeScorer(400), index.trie, [Prompt((1,))], SearchOptions(k=9, leaf_filter=allowed))
    assert {index.record_of(hit).metadata["color"] for hit in ranking.hits} == {"red"}
    assert len(ranking.hits) == 4


def test_index_without_images_finds_nothing_and_grows_again(index, tiny_mllm, more_pictures):
    empty = remove_images(index, list(index.rows_by_id))
    assert recall_all(empty) == {}
    assert empty.leaf_filter(RecordFilters(filters=[])).n_allowed == 0
    grown = add_to_index(empty, read_corpus(more_pictures).records, tiny_mllm)
    assert recall_all(grown).keys() == {"twin", "plain-0", "plain-1", "plain-2"}


@pytest.mark.parametrize("scheme", ["numeric", "string", "semantic"])
def test_schemes_without_features_grow_without_a_model(pictures, more_pictures, tiny_mllm, tmp_path, scheme):
    index = build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm, scheme=scheme)
    before = identifiers_of(index)
    grown = add_to_index(index, read_corpus(more_pictures).records)
    grown = add_to_index(grown, [dataclasses.replace(r, image_id=f"{r.image_id}-b") for r in grown.records[20:]])
    assert len(set(grown.identifiers)) == 28
    assert recall_all(grown).keys() == grown.rows_by_id.keys()
    assert {image_id: identifiers_of(grown)[image_id] for image_id in before} == before


def test_caption_codes_are_frozen_and_need_no_model(pictures, tiny_mllm, encoder, tmp_path):
    """Two images with the same captions get neighbouring codes, even if the images differ."""
    corpus = read_corpus(pictures)
    reader = load_encoder(encoder)
    index = build_index(corpus, tmp_path / "index", tiny_mllm, encoder=reader, scheme_options={"sizes": [8, 8]})
    vectors, _ = embed_by_captions(reader, [record.captions for record in corpus.records])
    codes = StructuredScheme(sizes=[8, 8], source="vectors").fit(ImageFacts(len(vectors), vectors), seed=0)
    assert list(index.identifiers) == codes
    assert not needs_features(index)
    by_id = {record.image_id: record for record in corpus.records}
    red, blue = by_id["red-circle"], by_id["blue-bar"]
    added = dataclasses.replace(red, image_id="new", captions=blue.captions)
    grown = add_to_index(load_index(index.folder), [added])
    identifiers = identifiers_of(grown)
    assert identifiers["new"][:1] == identifiers["blue-bar"][:1] != identifiers["red-circle"][:1]
    assert identifiers["new"] != identifiers["blue-bar"]
    assert recall_all(grown).keys() == {*identifiers_of(index), "new"}
    bare = dataclasses.replace(red, image_id="bare", captions=())
    with pytest.raises(IdentifierError, match="1 of 2 images have no vector, 'bare' the first"):
        add_to_index(grown, [dataclasses.replace(added, image_id="newer"), bare])
    with pytest.raises(IdentifierError, match="vectors of an encoder, and there is none"):
        build_index(corpus, tmp_path / "other", tiny_mllm, scheme_options={"source": "vectors"})


def test_one_symbol_per_image_grows_the_vocabulary(pictures, more_pictures, tiny_mllm, tmp_path):
    index = build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm, scheme="atomic")
    before, symbols = identifiers_of(index), new_token_ids(index)
    grown = add_to_index(index, read_corpus(more_pictures).records)
    assert recall_all(grown).keys() == grown.rows_by_id.keys()
    assert {image_id: identifiers_of(grown)[image_id] for image_id in before} == before
    assert new_token_ids(grown) == [*symbols, *range(symbols[-1] + 1, symbols[-1] + 5)]
    assert stored_new_rows(grown) is None  # training creates the rows


@pytest.mark.parametrize("point", ["write_records", "save_trie", "sync_tree", "replace", "_remove_unnamed"])
def test_process_killed_during_an_edit_leaves_a_whole_index(index, point):
    code = f"""
        import os
        from pathlib import Path
        from llama_index_genret import store

        owners = {{"replace": Path, "write_records": store.edits, "save_trie": store.edits}}
        owner = owners.get({point!r}, store.manifest)
        setattr(owner, {point!r}, lambda *_, **__: os._exit(9))
        index = store.load_index(Path({str(index.folder)!r}))
        store.remove_images(index, [record.image_id for record in index.records[:5]])
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    after = load_index(index.folder)
    assert len(recall_all(after)) == (15 if point == "_remove_unnamed" else 20)
    left = remove_images(after, ["yellow-bar"])
    assert {path.name for path in index.folder.iterdir()} == {"manifest.json"} | {
        Path(entry.path).parts[0] for entry in left.manifest.files.values()
    }


def test_add_and_remove_from_the_command_line(index, more_pictures, capsys):
    def run(*arguments):
        app([*map(str, arguments), "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    assert run("add", index.folder, more_pictures, "--device", "cpu")["added"] == 4
    again = run("add", index.folder, more_pictures, "--device", "cpu")
    assert (again["added"], again["known"], again["images"]) == (0, 4, 24)
    assert run("remove", index.folder, "twin", "plain-0")["images"] == 22
    assert "twin" not in load_index(index.folder).rows_by_id
