"""An index with an encoder of a few words, and the same index with an adapter whose weights are never loaded."""

import shutil

import numpy as np
import pytest

from llama_index_genret.models.encoder import CallableEncoder
from llama_index_genret.store import load_index, store_adapter

WORDS = ["red", "green", "blue", "yellow", "black", "circle", "square", "bar", "frame"]


def count_words(texts):
    return [[float(word in text.split()) for word in WORDS] + [0.1] for text in texts]


@pytest.fixture(scope="session")
def word_encoder():
    """An encoder that counts colors and shapes, so it finds the image of each caption."""
    return CallableEncoder(count_words, name="words")


@pytest.fixture(scope="session")
def noise_encoder():
    """An encoder of the same dimension, whose vectors of queries say nothing about them."""

    def noise(texts):
        return [np.random.default_rng([*map(ord, text)]).normal(size=len(WORDS) + 1) for text in texts]

    return CallableEncoder(count_words, embed_queries=noise, name="noise")


@pytest.fixture(scope="session")
def encoded_index(pictures, tiny_mllm, word_encoder, tmp_path_factory):
    """An index with vectors and without trained weights."""
    from llama_index_genret.corpus import read_corpus
    from llama_index_genret.store.build import build_index

    folder = tmp_path_factory.mktemp("encoded") / "index"
    return build_index(read_corpus(pictures), folder, tiny_mllm, encoder=word_encoder)


@pytest.fixture
def adapted_index(encoded_index, tmp_path):
    """A copy that counts as trained on all of its images; a FakeScorer stands in for the model."""
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "adapter_model.safetensors").write_bytes(b"none")
    return store_adapter(load_index(shutil.copytree(encoded_index.folder, tmp_path / "index")), weights, {})
