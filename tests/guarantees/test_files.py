"""The files of an index: concurrent writers and readers, full and read-only disks, and no pickle.

`integration/faults` tests kills and power cuts at every point.
"""

import ast
import json
import os
import resource
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import llama_index_genret
from llama_index_genret import store
from llama_index_genret.errors import BatchError, IndexBusy, IndexChanged, IndexDamaged, IndexExists, NotWritten
from llama_index_genret.files import new_folder, only_writer, remove_unheld, writing
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.serving.batch import open_batch
from llama_index_genret.serving.export import export_checkpoint
from llama_index_genret.store import Scoring, TunedScoring, load_index, remove_images, store_tuning
from llama_index_genret.store.manifest import FORMAT_VERSION, check_free, manifest_text
from llama_index_genret.store.model_state import adapter_folder

pytestmark = pytest.mark.torch

PACKAGE = Path(llama_index_genret.__file__).parent


@pytest.fixture
def folder(untrained_index, tmp_path):
    shutil.copytree(untrained_index.folder, tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path / "adapter"


def recalled_ids(index):
    scorer = FakeScorer(index.tokenizer.vocab_size)
    return sorted(
        index.record_of(h).image_id for h in recall(scorer, index.trie, [Prompt((1, 2))], SearchOptions(k=30))[0].hits
    )


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def prior_of(index):
    return np.zeros(len(index.records), np.float32)


@contextmanager
def files_of_at_most(n_bytes):
    """Limit the size of written files, to simulate a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_second_of_two_writers_is_refused(folder):
    first, second = load_index(folder), load_index(folder)
    remove_images(first, ["red-circle"])
    for write in (
        lambda: remove_images(second, ["blue-bar"]),
        lambda: store.add_images(second, [], [], second.scheme()),
        lambda: store_tuning(second, prior_of(second), TunedScoring(scoring=Scoring(), queries=0)),
        lambda: store.store_pseudo_queries(second, []),
    ):
        with pytest.raises(IndexChanged, match=f"{folder} was changed"):
            write()
    assert recalled_ids(load_index(folder)) == sorted(set(second.rows_by_id) - {"red-circle"})
    remove_images(load_index(folder), ["blue-bar"])
    assert recalled_ids(load_index(folder)) == sorted(set(second.rows_by_id) - {"red-circle", "blue-bar"})


def test_edits_during_training_are_kept(folder, adapter):
    trained = load_index(folder)
    remove_images(load_index(folder), ["red-circle"])
    stored = store.store_adapter(trained, adapter, {})
    assert stored.is_trained
    assert recalled_ids(stored) == sorted(set(trained.rows_by_id) - {"red-circle"})


def test_concurrent_writer_waits_and_is_then_refused(folder, monkeypatch):
    monkeypatch.setattr(store.manifest, "LOCK_WAIT_S", 0.1)
    with (
        only_writer(folder / store.manifest.LOCK, busy=""),
        pytest.raises(IndexBusy, match=f"another process is writing {folder}"),
    ):
        remove_images(load_index(folder), ["red-circle"])
    left = remove_images(load_index(folder), ["red-circle"])  # a removed lock, or that of a killed process, is free
    (folder / store.manifest.LOCK).touch()
    remove_images(left, ["blue-bar"])
    assert "write.lock" not in names(folder)


def test_folder_is_free_after_a_killed_first_write(folder, tmp_path):
    left = tmp_path / "left"
    shutil.copytree(folder, left)
    (left / "manifest.json").rename(left / "manifest.json.0123456789ab")
    (left / "write.lock").touch()
    check_free(left)
    (left / "holiday.png").touch()
    with pytest.raises(IndexExists, match="no index"):
        check_free(left)


@pytest.mark.parametrize("field", ["prompts", "folders", "scheme_options", "model", "checksum"])
def test_changed_manifest_fails_its_checksum(folder, field):
    manifest = json.loads((folder / "manifest.json").read_text())
    text = json.dumps(manifest[field])
    letter = next(letter for letter in reversed(text) if letter.isalnum())
    place = text.rindex(letter)
    flipped = text[:place] + chr(ord(letter) ^ 1) + text[place + 1 :]
    (folder / "manifest.json").write_text(json.dumps({**manifest, field: json.loads(flipped)}))
    with pytest.raises(IndexDamaged, match=r"manifest\.json is damaged: it differs from its own checksum"):
        load_index(folder)


def test_version_3_without_a_checksum_is_read_and_upgraded(folder):
    index = load_index(folder)
    raw = json.loads(manifest_text(index.manifest.model_copy(update={"format_version": 3})))
    del raw["checksum"]
    (folder / "manifest.json").write_text(json.dumps(raw))
    assert recalled_ids(load_index(folder)) == recalled_ids(index)
    remove_images(load_index(folder), ["red-circle"])
    assert json.loads((folder / "manifest.json").read_text())["format_version"] == FORMAT_VERSION == 5
    (folder / "manifest.json").write_text(json.dumps({**raw, "format_version": FORMAT_VERSION}))
    with pytest.raises(IndexDamaged, match="checksum"):
        load_index(folder)


def test_version_4_with_an_encoder_of_the_scheme_is_read(folder):
    """Version 4 has no vectors, and names the encoder of caption codes among the options of the scheme."""
    index = load_index(folder)
    options = {**index.manifest.scheme_options, "encoder": "sentence-transformers/all-MiniLM-L6-v2"}
    del options["source"]
    changed = {"format_version": 4, "scheme_options": options}
    (folder / "manifest.json").write_text(manifest_text(index.manifest.model_copy(update=changed)))
    read = load_index(folder)
    assert (read.scheme().options()["source"], read.manifest.encoder) == ("vectors", None)
    assert recalled_ids(read) == recalled_ids(index)
    remove_images(read, ["red-circle"])
    assert json.loads((folder / "manifest.json").read_text())["format_version"] == FORMAT_VERSION
    assert load_index(folder).scheme().options()["source"] == "vectors"


@pytest.mark.parametrize("n_bytes", [0, 100, 1000, 3000])
def test_full_disk_leaves_the_index_unchanged(folder, adapter, n_bytes):
    index, before = load_index(folder), names(folder)
    for write in (
        lambda: remove_images(index, ["red-circle"]),
        lambda: store_tuning(index, np.zeros(20, np.float32), TunedScoring(scoring=Scoring(), queries=0)),
        lambda: store.store_adapter(index, adapter, {"losses": [1.0] * 500}),
    ):
        with (
            files_of_at_most(n_bytes if write.__code__.co_names[0] == "remove_images" else min(n_bytes, 100)),
            pytest.raises(NotWritten, match=f"{folder} could not be written.*Free space"),
        ):
            write()
        assert names(folder) == before
        assert recalled_ids(load_index(folder)) == recalled_ids(index)
    remove_images(index, ["red-circle"])


def test_new_index_on_a_full_disk_leaves_no_folder(untrained_index, tmp_path):
    index, new = untrained_index, tmp_path / "above" / "new"
    parts = {"images": tmp_path, "records": index.records, "identifiers": index.identifiers, "scheme": index.scheme()}
    parts |= {"tokenizer": index.tokenizer, "model": index.manifest.model, "prompts": index.prompts}
    with files_of_at_most(500), pytest.raises(NotWritten, match=str(new)):
        store.create_index(new, **parts)
    assert not new.exists()
    assert recalled_ids(store.create_index(new, **parts)) == recalled_ids(index)


def test_export_on_a_full_disk_leaves_nothing(untrained_index, tiny_mllm, tmp_path):
    with files_of_at_most(10_000), pytest.raises(NotWritten, match="Free space"):
        export_checkpoint(untrained_index, tmp_path / "out", mllm=tiny_mllm)
    assert names(tmp_path) == []


def test_full_disk_error_of_tokenizers_is_converted(untrained_index, tmp_path):
    tokenizer = Tokenizer.from_str(untrained_index.tokenizer.to_json())
    with pytest.raises(NotWritten, match=f"{tmp_path} could not be written: No space left"), writing(tmp_path):
        tokenizer.save("/dev/full")
    with pytest.raises(Exception, match="no such thing") as raised, writing(tmp_path):
        raise Exception("no such thing")
    assert not isinstance(raised.value, NotWritten)


def test_batch_resumes_after_a_full_disk(untrained_index, tmp_path):
    queries, out = tmp_path / "queries.jsonl", tmp_path / "hits.jsonl"
    queries.write_text("".join(json.dumps({"query": f"picture {number}"}) + "\n" for number in range(12)))
    scorer = FakeScorer(untrained_index.tokenizer.vocab_size)

    def run():
        with open_batch(untrained_index, queries, out) as batch:
            return batch.finish(scorer, batch_size=2)

    with files_of_at_most(12_000), pytest.raises(BatchError, match=r"hits\.jsonl\.part could not be written.*resumes"):
        run()
    assert not out.exists()
    assert 0 < run().kept < 12
    assert len(out.read_text().splitlines()) == 12


@pytest.mark.skipif(sys.platform != "linux", reason="forks a child that becomes another user")
def test_read_only_index_is_read_and_not_written(untrained_index):
    """The child has no write permission. Root would have it."""
    from integration.faults.syscalls import wait_for_child

    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        folder = Path(root) / "index"
        shutil.copytree(untrained_index.folder, folder)
        folder.chmod(0o555)

        def work():
            if os.getuid() == 0:
                os.setuid(65534)
            index = load_index(folder)
            assert len(recalled_ids(index)) == 20
            with pytest.raises(NotWritten, match=f"{folder} could not be written.*make it writable"):
                remove_images(index, ["red-circle"])

        status, output = wait_for_child(work)
        folder.chmod(0o755)
        assert status == 0, output


def test_reader_keeps_its_version_and_reports_missing_files(folder, tmp_path, adapter):
    store.store_adapter(load_index(folder), adapter, {})
    reader = load_index(folder)
    before = recalled_ids(reader)
    store.store_adapter(load_index(folder), adapter, {"again": 1})
    with pytest.raises(IndexChanged, match=r"'adapter/.*' of that version is gone: load it again"):
        adapter_folder(reader)
    remove_images(load_index(folder), ["red-circle", "red-bar", "red-frame"])  # writes another trie
    shutil.move(folder, tmp_path / "elsewhere")
    assert recalled_ids(reader) == before
    (tmp_path / "elsewhere" / load_index(tmp_path / "elsewhere").manifest.files["trie.bin"].path).unlink()
    with pytest.raises(IndexDamaged, match=r"trie\.bin is missing"):
        load_index(tmp_path / "elsewhere")


def test_load_during_a_write_returns_the_new_version(folder, monkeypatch):
    """The writer removes the files of the version that the reader started with."""
    writer, verify, seen = remove_images(load_index(folder), ["blue-bar"]), store.open.verify, []

    def verify_after_a_write(path, entry):
        seen.append(path)
        if len(seen) == 1:
            remove_images(writer, ["red-circle"])
        verify(path, entry)

    monkeypatch.setattr(store.open, "verify", verify_after_a_write)
    assert len(recalled_ids(load_index(folder))) == 18
    assert not seen[0].exists()


def test_edit_through_a_link_keeps_the_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    remove_images(load_index(tmp_path / "link"), ["red-circle"])
    assert (tmp_path / "link").is_symlink()
    assert len(recalled_ids(load_index(folder))) == 19


def test_export_through_a_link_to_another_file_system(untrained_index, tiny_mllm, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as there:
        (Path(there) / "real").mkdir()
        (tmp_path / "out").symlink_to(Path(there) / "real")
        export_checkpoint(untrained_index, tmp_path / "out", mllm=tiny_mllm)
        assert (tmp_path / "out").is_symlink()
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names(Path(there) / "real"))
        assert [path.name for path in Path(there).iterdir()] == ["real"]


def test_leftovers_of_killed_exports_are_removed(tmp_path):
    (tmp_path / ".out.0123456789ab.part").mkdir()
    with new_folder(tmp_path / "out") as first:
        assert names(tmp_path) == [first.name]
        with new_folder(tmp_path / "out") as second:
            assert {first.name, second.name} == set(names(tmp_path))
            remove_unheld(first)
            (second / "file").touch()
        with pytest.raises(NotWritten, match="not empty"), new_folder(tmp_path / "out") as third:
            (third / "file").touch()
        (tmp_path / "out" / "file").unlink()
    assert names(tmp_path) == ["out"]


def sources():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def imported_modules(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


RISKS = {"trust_remote_code", "allow_pickle"}


def executable_loads(tree):
    """Yield calls that may execute the content of a file, with their arguments."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name not in ("load", "eval", "exec", "memmap") and not RISKS & {word.arg for word in node.keywords}:
            continue
        function, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if function in ("torch.load", "eval", "exec", "np.memmap", "numpy.load"):
            yield function
        if function == "np.load" and keywords.get("allow_pickle") != "False":
            yield function
        if RISKS & keywords.keys() and "False" not in keywords.values():
            yield f"{function} {keywords}"


def test_package_loads_no_pickle_and_no_remote_code():
    trees = sources()
    assert len(trees) > 80
    forbidden = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "torch.load"}
    for path, tree in trees.items():
        assert not forbidden & set(imported_modules(tree)), path
        assert list(executable_loads(tree)) == [], path


@pytest.mark.parametrize(
    "code",
    ["torch.load(p)", "np.load(p)", "np.load(p, allow_pickle=True)", "f(m, trust_remote_code=True)", "eval(text)"],
)
def test_executable_loads_finds_unsafe_calls(code):
    assert list(executable_loads(ast.parse(code)))
