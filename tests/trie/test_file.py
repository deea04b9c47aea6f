"""Test that an opened trie equals the saved one, and that damage to its file is an error."""

import json
from pathlib import Path

import pytest
from hypothesis import given

from llama_index_genret.errors import IndexDamaged, IndexVersionError, StoreError
from llama_index_genret.trie import build_trie, open_trie, save_trie, verify_trie
from llama_index_genret.trie._reference import DictTrie
from tests.trie.test_flat import VARIABLE, assert_equal_tries, identifier_sets


@given(identifier_sets)
def test_opened_trie_equals_the_saved_one(tmp_path_factory: pytest.TempPathFactory, identifiers) -> None:
    path = tmp_path_factory.mktemp("trie") / "trie.bin"
    save_trie(build_trie(identifiers)[0], path)
    verify_trie(path)
    assert_equal_tries(open_trie(path), DictTrie(identifiers))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "trie.bin"
    save_trie(build_trie(VARIABLE)[0], path)
    return path


def test_arrays_are_aligned_and_read_only(saved: Path) -> None:
    for trie in (open_trie(saved), build_trie(VARIABLE)[0]):
        for array in trie.arrays().values():
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
    assert all(a.ctypes.data % 64 == 0 for a in open_trie(saved).arrays().values())


def test_open_trie_survives_replacement_of_its_file(saved: Path) -> None:
    before = open_trie(saved)
    save_trie(build_trie([(1, 2)])[0], saved)
    assert_equal_tries(before, DictTrie(VARIABLE))
    assert open_trie(saved).token_ids_of(0) == (1, 2)


def test_failed_save_leaves_only_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_trie(build_trie([(1, 2)])[0], saved)
    assert_equal_tries(open_trie(saved), DictTrie(VARIABLE))
    assert list(saved.parent.iterdir()) == [saved]


def test_every_flipped_byte_is_detected(saved: Path) -> None:
    content = saved.read_bytes()
    for position in range(len(content)):
        for flip in (0x01, 0x80):
            broken = bytearray(content)
            broken[position] ^= flip
            saved.write_bytes(broken)
            with pytest.raises(StoreError, match="trie"):
                verify_trie(saved)


def test_truncated_or_extended_file_does_not_open(saved: Path) -> None:
    content = saved.read_bytes()
    for broken in [*(content[:length] for length in range(len(content))), content + b"\0"]:
        saved.write_bytes(broken)
        with pytest.raises(IndexDamaged, match=r"trie\.bin"):
            open_trie(saved)


def test_missing_file_error_shows_its_path(tmp_path: Path) -> None:
    with pytest.raises(IndexDamaged, match=r"gone\.bin"):
        open_trie(tmp_path / "gone.bin")


def test_future_version_is_reported(saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content.replace(b'{"version": 2', b'{"version": 9'))
    with pytest.raises(IndexVersionError, match=r"trie\.bin has the trie format 9"):
        open_trie(saved)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ([], "list"),
        ({}, "version"),
        (3, "int"),
        ({"version": 2, "payload_bytes": 0, "arrays": {"code": ["O", 1, 0]}}, "code of type O"),
        ({"version": 2, "payload_bytes": 0, "arrays": {"code": ["|u1", 10**30, 0]}}, "large"),
    ],
)
def test_invalid_header_is_damage(saved: Path, header: object, match: str) -> None:
    text = json.dumps(header).encode()
    saved.write_bytes(b"genrTRIE" + len(text).to_bytes(8, "little") + text + bytes(32))
    with pytest.raises(IndexDamaged, match=rf"trie\.bin.*{match}"):
        open_trie(saved)


def test_file_of_another_type_is_reported(saved: Path) -> None:
    saved.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    with pytest.raises(IndexDamaged, match=r"begins with .*PNG"):
        open_trie(saved)
