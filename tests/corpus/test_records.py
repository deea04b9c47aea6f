"""A record survives a round trip through JSON, and a damaged record is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_index_genret.corpus import Question, Record, read_corpus
from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import MetadataError, UnsafePath

# The records of a stored index

texts = st.text(min_size=1).filter(str.strip)

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()

names = st.lists(st.from_regex(r"[a-zé ]{0,9}[a-z]", fullmatch=True), min_size=1, max_size=3).map("/".join)


@given(
    st.builds(
        lambda name, **fields: Record(path=Path("/images").absolute() / name, file_name=name, **fields),
        names,
        image_id=texts,
        sha256=texts,
        captions=st.lists(texts).map(tuple),
        metadata=st.dictionaries(st.text(), scalars),
        questions=st.lists(st.builds(Question, texts, texts)).map(tuple),
    )
)
def test_a_record_survives_json(record):
    again = Record.from_json(json.loads(json.dumps(record.to_json())), Path("/images").absolute())
    assert again == record
    assert [type(v) for v in again.metadata.values()] == [type(v) for v in record.metadata.values()]


def test_stored_records_follow_their_folder(folder):
    stored = json.dumps([record.to_json() for record in read_corpus(folder)])
    moved = folder.rename(folder.parent / "moved")
    records = [Record.from_json(obj, moved) for obj in json.loads(stored)]
    assert records == list(read_corpus(moved))
    assert [load_image(record.path).size for record in records] == [(8, 6), (8, 6)]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"file_name": "../x.png"}, UnsafePath),
        ({"file_name": "/etc/passwd"}, UnsafePath),
        ({"file_name": 7}, MetadataError),
        ({"image_id": ""}, MetadataError),
        ({"sha256": None}, MetadataError),
        ({"captions": [7]}, MetadataError),
        ({"metadata": {"x": []}}, MetadataError),
        ({"metadata": None}, MetadataError),
        ({"questions": [{}]}, MetadataError),
        ({"unknown": 1}, MetadataError),
    ],
)
def test_a_damaged_stored_record_is_an_error(folder, change, error):
    stored = read_corpus(folder).records[0].to_json()
    with pytest.raises(error):
        Record.from_json(stored | change, folder)


@pytest.mark.parametrize("obj", [None, [], {}, "x"])
def test_an_invalid_stored_record_is_an_error(folder, obj):
    with pytest.raises(MetadataError, match="expected an object with the keys"):
        Record.from_json(obj, folder)
