"""Pictures redrawn in other styles, and that `memorise` sees them."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from llama_index_genret.images import load_image
from llama_index_genret.training import batches, tower_cache
from llama_index_genret.training.batches import ExampleTensors
from llama_index_genret.training.examples import examples_of
from llama_index_genret.training.redrawing import LARGEST_SIDE, redrawn
from llama_index_genret.training.tower_cache import cached_tower


@pytest.fixture
def circle(pictures):
    return load_image(pictures / "red-circle.png")


def test_the_same_seed_draws_the_same_picture_and_another_seed_another(circle):
    before = circle.tobytes()
    drawn = [redrawn(circle, seed=(1, version)).tobytes() for version in range(20)]
    assert drawn == [redrawn(circle, seed=(1, version)).tobytes() for version in range(20)]
    assert len(set(drawn)) == 20
    assert circle.tobytes() == before


def test_what_is_drawn_stays_in_the_picture_on_its_ground(circle):
    circle = circle.resize((224, 224))
    for version in range(100):
        pixels = np.asarray(redrawn(circle, seed=(version,)), np.int16)
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.min() > 200, version
        drawn = (np.abs(pixels - corners[0]).sum(-1) > 60).mean()
        assert 0.05 < drawn < 0.6, (version, drawn)  # the circle covers a third, seven tenths as wide a sixth


def test_a_photograph_is_redrawn_small_and_in_rgb():
    photo = Image.effect_noise((3000, 1000), 80)
    small = redrawn(photo, seed=(0,))
    assert (small.mode, small.width) == ("RGB", LARGEST_SIDE)
    assert photo.size == (3000, 1000)


def test_every_version_is_memorised_and_only_others_than_the_first_are_redrawn(untrained_index, tiny_mllm):
    index = untrained_index
    examples = examples_of(index, redrawn=2)["memorise"]
    assert Counter(example.row for example in examples) == dict.fromkeys(range(len(index.records)), 3)
    tensors, plain = (
        ExampleTensors(index, tiny_mllm, examples),
        ExampleTensors(index, tiny_mllm, examples_of(index)["memorise"]),
    )
    for i, example in enumerate(examples[:9]):
        same = torch.equal(tensors[i]["pixel_values"], plain[example.row]["pixel_values"])
        assert same == (example.version == 0)
        assert torch.equal(tensors[i]["labels"], plain[example.row]["labels"])


def test_pixels_in_memory_have_a_limit_that_changes_nothing(untrained_index, tiny_mllm, monkeypatch):
    examples = examples_of(untrained_index, redrawn=1)["memorise"]
    kept = ExampleTensors(untrained_index, tiny_mllm, examples)
    expected = [kept[i]["pixel_values"] for i in range(len(examples))]
    monkeypatch.setattr(batches, "CACHED_BYTES", 5 * 64 * 64 * 3)
    tensors = ExampleTensors(untrained_index, tiny_mllm, examples)
    for i in [*range(len(examples)), *range(len(examples))]:
        assert torch.equal(tensors[i]["pixel_values"], expected[i])
        assert sum(image.width * image.height * 3 for image in tensors._images.values()) <= 5 * 64 * 64 * 3


@pytest.mark.parametrize("limit", [2**30, 1])
def test_a_tower_is_asked_once_for_each_picture_as_long_as_memory_lasts(untrained_index, tiny_mllm, monkeypatch, limit):
    monkeypatch.setattr(tower_cache, "CACHED_BYTES", limit)
    tower, asked = tiny_mllm.model.get_encoder(modality="image"), []
    tower.requires_grad_(False)
    original = tower.forward
    monkeypatch.setattr(tower, "forward", lambda pixels, **kwargs: asked.append(1) or original(pixels, **kwargs))
    inputs = ExampleTensors(untrained_index, tiny_mllm, examples_of(untrained_index)["memorise"])
    pixels = torch.cat([inputs[i]["pixel_values"].flatten(0, 1) for i in range(3)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), cached_tower(tiny_mllm.model):
        features = [tower(pixels).last_hidden_state for _ in range(2)]
    assert len(asked) == (3 if limit > 1 else 6)
    assert torch.equal(*features)
    assert features[0].dtype == torch.bfloat16
