"""An index folder loads whole, or loading raises an error that names the file."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from llama_index_genret import store
from llama_index_genret.errors import (
    FilterError,
    IndexDamaged,
    IndexExists,
    IndexNotFound,
    IndexVersionError,
    ModelMismatch,
)
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.models.tokenizer import IndexTokenizer
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.store import RecordFilters, check_free, load_index
from llama_index_genret.store.manifest import FORMAT_VERSION
from llama_index_genret.store.model_state import check_tokenizer


@pytest.fixture
def copied(untrained_index, tmp_path):
    """A copy that a test may break."""
    shutil.copytree(untrained_index.folder, tmp_path / "index")
    return tmp_path / "index"


def recall_all(index):
    scorer = FakeScorer(index.tokenizer.vocab_size)
    hits = recall(scorer, index.trie, [Prompt((1, 2))], SearchOptions(k=20))[0].hits
    return [(index.record_of(hit).image_id, index.identifier_of(hit), hit.log_prob) for hit in hits]


def test_loaded_index_recalls_like_the_stored_one(untrained_index):
    loaded = load_index(untrained_index.folder)
    assert recall_all(loaded) == recall_all(untrained_index)
    assert len(recall_all(loaded)) == 20
    assert loaded.records == untrained_index.records
    assert loaded.prompts == untrained_index.prompts


def test_index_loads_the_same_in_a_new_process(untrained_index):
    code = f"""
        from pathlib import Path
        from llama_index_genret.store import check_free, load_index
        print(*(record.image_id for record in load_index(Path({str(untrained_index.folder)!r})).records))
    """
    output = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert output.stdout.split() == [record.image_id for record in untrained_index.records]


def test_trie_maps_every_identifier_to_its_record(untrained_index):
    index = untrained_index
    for row, record in enumerate(index.records):
        node = np.array([index.trie.base.walk(index.token_ids(row))])
        assert index.records[int(index.trie.key(index.trie.base.leaf_rank(node))[0])] == record


def test_flipped_byte_in_any_file_is_an_error_with_its_name(copied):
    names = load_index(copied).manifest.files
    assert {"records.jsonl", "trie.bin", "tokenizer.json", "leaf_to_record.npy", "codebooks.safetensors"} == set(names)
    for name, entry in names.items():
        path = copied / entry.path
        original = path.read_bytes()
        path.write_bytes(original[:-2] + bytes([original[-2] ^ 1]) + original[-1:])
        with pytest.raises(IndexDamaged, match=name):
            load_index(copied).file(name)
        path.unlink()
        with pytest.raises(IndexDamaged, match=f"{name} is missing"):
            load_index(copied).file(name)
        path.write_bytes(original)
    load_index(copied)


def test_missing_index_error_contains_the_command_to_create_it(tmp_path):
    with pytest.raises(IndexNotFound, match="genret index"):
        load_index(tmp_path / "nowhere")


@pytest.mark.parametrize("version", [0, 2, FORMAT_VERSION + 1, str(FORMAT_VERSION), None])
def test_another_format_version_is_an_error(copied, version):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "format_version": version}))
    with pytest.raises(IndexVersionError, match=repr(version)):
        load_index(copied)


@pytest.mark.parametrize("content", ["", "{", f'{{"format_version": {FORMAT_VERSION}}}', "\x00"])
def test_broken_manifest_is_an_error_that_names_it(copied, content):
    (copied / "manifest.json").write_text(content)
    with pytest.raises(IndexDamaged, match=r"manifest\.json"):
        load_index(copied)


def test_other_tokenizer_is_an_error_with_its_location(untrained_index):
    other = untrained_index.tokenizer.with_symbols(["<other>"])
    with pytest.raises(ModelMismatch, match="tokenizer of over there"):
        check_tokenizer(untrained_index, other, "over there")
    base = IndexTokenizer.from_file(Path(untrained_index.manifest.model.name_or_path) / "tokenizer.json")
    check_tokenizer(untrained_index, base, "here")


def test_filters_keep_matching_images_and_refuse_unknown_keys(untrained_index):
    allowed = untrained_index.leaf_filter(RecordFilters.equal({"color": "red"}))
    kept = [untrained_index.records[int(row)].metadata["color"] for row in untrained_index.trie.keys]
    assert allowed.n_allowed == 4 == kept.count("red")
    with pytest.raises(FilterError, match=r"'size'.*color"):
        untrained_index.leaf_filter(RecordFilters.equal({"size": "1"}))


def test_only_an_index_is_replaced_and_only_with_overwrite(untrained_index, copied, tmp_path):
    check_free(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty")
    with pytest.raises(IndexExists, match="--overwrite"):
        check_free(copied)
    check_free(copied, overwrite=True)
    (tmp_path / "photos" / "data-2024").mkdir(parents=True)
    with pytest.raises(IndexExists, match="no index"):
        check_free(tmp_path / "photos", overwrite=True)


def test_user_folder_in_the_index_folder_survives_a_write(copied, tmp_path):
    (copied / "data-2024").mkdir()
    (tmp_path / "adapter").mkdir()
    store.store_adapter(load_index(copied), tmp_path / "adapter", {})
    assert (copied / "data-2024").is_dir()


CRASHES = ("write", "_sha256", "sync", "replace", "_remove_unnamed")


@pytest.mark.parametrize("point", CRASHES)
def test_process_killed_during_a_save_leaves_a_whole_index(copied, tmp_path, point):
    """The writing process exits at the given point, without cleanup."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    code = f"""
        import os
        from pathlib import Path
        from llama_index_genret import store

        index = store.load_index(Path({str(copied)!r}))
        points = {{"write": (store.save_weights.shutil, "copytree"), "replace": (Path, "replace")}}
        owner, name = points.get({point!r}, (store.manifest, {point!r}))
        setattr(owner, name, lambda *_, **__: os._exit(9))
        store.open.verify = lambda *_: None
        store.store_adapter(index, Path({str(adapter)!r}), {{"steps": 1}})
    """
    before = recall_all(load_index(copied))
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    after = load_index(copied)
    assert after.is_trained == (point == "_remove_unnamed")
    assert recall_all(after) == before
    trained = store.store_adapter(after, adapter, {"steps": 1})
    assert trained.is_trained
    assert {path.name for path in copied.iterdir()} == {"manifest.json"} | {
        Path(entry.path).parts[0] for entry in trained.manifest.files.values()
    }
