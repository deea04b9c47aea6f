"""The sources of an index's vectors are counted from its captions, its vectors and its encoder."""

from pathlib import Path

import numpy as np
import pytest

from llama_index_genret.corpus import Record
from llama_index_genret.models.encoder import CallableEncoder
from llama_index_genret.store.vectors import EncoderEntry, VectorSources

RECORDS = [
    Record(name, Path(f"/{name}.png"), f"{name}.png", "0", captions)
    for name, captions in zip("abcd", ((), "x", (), "y"), strict=True)
]
VECTORS = np.array([[1, 0], [1, 0], [0, 0], [0, 1]], np.float16)


def embed(items):
    return np.ones((len(items), 2))


@pytest.mark.parametrize(
    ("embed_images", "expected"), [(embed, VectorSources(2, 1, 0, 1)), (None, VectorSources(2, 0, 1, 1))]
)
def test_vector_of_a_bare_image_is_the_encoders_or_projected(embed_images, expected):
    entry = EncoderEntry.of(CallableEncoder(embed, embed_images=embed_images))
    assert VectorSources.of(entry, RECORDS, VECTORS) == expected
