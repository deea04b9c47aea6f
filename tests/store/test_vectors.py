"""The encoder of an index and its vectors: what differs or is broken is an error, and nothing is stored."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import EncoderError, IdentifierError, IndexDamaged
from llama_index_genret.models.encoder import CallableEncoder
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.blend import Blender
from llama_index_genret.search import SearchOptions
from llama_index_genret.store import load_index
from llama_index_genret.store.build import add_to_index, build_index
from llama_index_genret.store.manifest import FORMAT_VERSION, manifest_text
from llama_index_genret.store.model_state import new_token_ids
from llama_index_genret.store.vectors import read_vectors, resolve_encoder, write_vectors
from tests.store.test_added_images import ENCODER, embed

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def corpus(pictures):
    return read_corpus(pictures)


@pytest.fixture(scope="module")
def made(corpus, tiny_mllm, tmp_path_factory):
    return build_index(corpus, tmp_path_factory.mktemp("vectors") / "index", tiny_mllm, encoder=ENCODER)


@pytest.fixture
def index(made, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(made.folder, tmp_path / "index")
    return load_index(tmp_path / "index")


def named(records, prefix, **changes):
    return [replace(record, image_id=f"{prefix}-{record.image_id}", **changes) for record in records]


@pytest.mark.parametrize(
    "other",
    [
        CallableEncoder(lambda texts: embed(texts)[:, :8], name="short"),
        CallableEncoder(lambda texts: embed(texts)[:, ::-1], name="other"),
    ],
    ids=lambda encoder: encoder.name,
)
def test_another_encoder_is_an_error_that_names_both(index, corpus, other):
    before = (index.folder / "manifest.json").read_bytes()
    words = rf"'words' \(24 dimensions\), and '{other.name}' \({other.dimension} dimensions\)"
    with pytest.raises(EncoderError, match=words):
        add_to_index(index, named(corpus.records[:2], "new"), encoder=other)
    with pytest.raises(EncoderError, match=words):
        resolve_encoder(index.manifest.encoder, other)
    assert (index.folder / "manifest.json").read_bytes() == before


def test_an_infinite_caption_vector_stores_nothing(index, corpus, tiny_mllm, tmp_path):
    def broken(texts):
        vectors = embed(texts)
        vectors[[text == "broken" for text in texts]] = np.inf
        return vectors

    encoder, before = CallableEncoder(broken, name="words"), (index.folder / "manifest.json").read_bytes()
    records = named(corpus.records[:2], "new", captions=("broken",))
    with pytest.raises(EncoderError, match="'words' answered NaN or infinity"):
        add_to_index(index, records, encoder=encoder)
    assert (index.folder / "manifest.json").read_bytes() == before
    with pytest.raises(EncoderError, match="NaN or infinity"):
        build_index(replace(corpus, records=records), tmp_path / "new", tiny_mllm, encoder=encoder)
    assert not (tmp_path / "new").exists()
    with pytest.raises(EncoderError, match="image 1 is not finite"):
        write_vectors(tmp_path, np.array([[1.0, 0.0], [np.nan, 0.0]]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.zeros((3, 4), np.float32), "float32"),
        (np.zeros((2, 4), np.float16), r"\(2, 4\)"),
        (np.full((3, 4), np.nan, np.float16), "not finite"),
        (b"no array", "damaged"),
        (b"", "damaged"),
    ],
)
def test_damaged_vectors_are_an_error_that_names_the_file(tmp_path, content, words):
    path = tmp_path / "vectors.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(IndexDamaged, match=rf"vectors\.npy.*{words}"):
        read_vectors(path, 3, 4)


def test_equal_and_zero_vectors_are_recalled_as_images_of_their_own(tiny_mllm, corpus, tmp_path):
    """Twins follow each other, and images without captions come with a cosine of 0."""
    twins = named(corpus.records[:1] * 2, "twin")
    twins[1] = replace(twins[1], image_id="other-twin")
    bare = named(corpus.records[1:3], "bare", captions=())
    whole = replace(corpus, records=[*corpus.records[:5], *twins, *bare])  # too few to project the bare ones
    index = build_index(whole, tmp_path / "index", tiny_mllm, encoder=ENCODER, scheme_options={"source": "features"})
    np.testing.assert_array_equal(index.vectors[-2:], 0)
    scorer = Blender(index, ENCODER).scorer(None, index.scoring())
    prompt = index.prompts.for_query(index.tokenizer, " ".join(corpus.records[0].captions))
    for mode in ("beam", "exact"):
        (ranking,) = recall(scorer, index.trie, [prompt], SearchOptions(k=9, mode=mode))
        found = [index.record_of(hit).image_id for hit in ranking.hits]
        assert len(set(found)) == 9
        assert set(found[:3]) == {corpus.records[0].image_id, twins[0].image_id, "other-twin"}


def older(index, version, scheme_options):
    """Rewrite the manifest of an index as a release of that format wrote it."""
    files = {name: entry for name, entry in index.manifest.files.items() if name != "vectors.npy"}
    changes = {"format_version": version, "encoder": None, "scheme_options": scheme_options, "files": files}
    manifest = index.manifest.model_copy(update=changes)
    (index.folder / "manifest.json").write_text(manifest_text(manifest))
    return load_index(index.folder)


@pytest.fixture
def with_suffixes(corpus, tiny_mllm, tmp_path):
    """An index of format 4, whose vocabulary has suffix symbols."""
    options = {"sizes": 7, "levels": 2, "suffixes": 32}
    index = build_index(corpus, tmp_path / "index", tiny_mllm, scheme_options=options)
    return older(index, 4, {"method": "kmeans", "levels": 2, "sizes": 7})


def test_format_4_is_read_and_grows_by_free_codes(with_suffixes, corpus, tiny_mllm):
    assert len(new_token_ids(with_suffixes)) == 2 * 7 + 32
    grown = add_to_index(with_suffixes, named(corpus.records[:3], "new"), tiny_mllm)
    assert {len(identifier) for identifier in grown.identifiers} == {2}
    assert grown.manifest.format_version == FORMAT_VERSION
    assert grown.vectors is None
    assert new_token_ids(load_index(grown.folder)) == new_token_ids(with_suffixes)


def test_format_4_with_caption_codes_is_read_and_names_the_way_out(index, corpus):
    old = older(index, 4, {"method": "kmeans", "levels": 2, "sizes": 7, "encoder": "some/encoder"})
    assert old.scheme().needs == {"vectors"}
    with pytest.raises(IdentifierError, match="genret index --encoder"):
        add_to_index(old, named(corpus.records[:3], "new"))
