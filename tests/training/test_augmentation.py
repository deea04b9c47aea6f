"""Style augmentation of images, the vision teacher fitted to it, and training on both."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from llama_index_genret.corpus import read_corpus
from llama_index_genret.corpus.images import load_image
from llama_index_genret.models.encoder import load_encoder
from llama_index_genret.store.build import build_index
from llama_index_genret.training import collator, feature_cache
from llama_index_genret.training.augmentation import LARGEST_SIDE, redraw
from llama_index_genret.training.collator import IGNORED, ExampleTensors
from llama_index_genret.training.feature_cache import cached_tower
from llama_index_genret.training.recipe import TrainOptions, train
from llama_index_genret.training.tasks import examples_of
from llama_index_genret.training.vision_teacher import SHRINKAGE, VisionTeacher

pytestmark = pytest.mark.torch


@pytest.fixture
def circle(pictures):
    return load_image(pictures / "red-circle.png")


def test_redraw_is_determined_by_the_seed(circle):
    before = circle.tobytes()
    drawn = [redraw(circle, seed=(1, version)).tobytes() for version in range(20)]
    assert drawn == [redraw(circle, seed=(1, version)).tobytes() for version in range(20)]
    assert len(set(drawn)) == 20
    assert circle.tobytes() == before


def test_redraw_keeps_content_inside_and_background_at_corners(circle):
    circle = circle.resize((224, 224))
    for version in range(100):
        pixels = np.asarray(redraw(circle, seed=(version,)), np.int16)
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.min() > 200, version
        drawn = (np.abs(pixels - corners[0]).sum(-1) > 60).mean()
        assert 0.05 < drawn < 0.6, (version, drawn)  # the circle covers a third, seven tenths as wide a sixth


def test_redraw_returns_a_small_rgb_image():
    photo = Image.effect_noise((3000, 1000), 80)
    small = redraw(photo, seed=(0,))
    assert (small.mode, small.width) == ("RGB", LARGEST_SIDE)
    assert photo.size == (3000, 1000)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 300), (3, 1), (500, 2)])
def test_redraw_accepts_tiny_images(size):
    for version in range(20):
        assert redraw(Image.new("RGB", size, "red"), seed=(0, version)).size == size


def test_all_versions_are_memorised_and_version_0_is_original(untrained_index, tiny_mllm):
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


def test_image_cache_limit_does_not_change_the_pixels(untrained_index, tiny_mllm, monkeypatch):
    examples = examples_of(untrained_index, redrawn=1)["memorise"]
    kept = ExampleTensors(untrained_index, tiny_mllm, examples)
    expected = [kept[i]["pixel_values"] for i in range(len(examples))]
    monkeypatch.setattr(collator, "CACHED_BYTES", 5 * 64 * 64 * 3)
    tensors = ExampleTensors(untrained_index, tiny_mllm, examples)
    for i in [*range(len(examples)), *range(len(examples))]:
        assert torch.equal(tensors[i]["pixel_values"], expected[i])
        assert sum(image.width * image.height * 3 for image in tensors._images.values()) <= 5 * 64 * 64 * 3


@pytest.mark.parametrize("limit", [2**30, 1])
def test_tower_runs_once_per_image_within_the_cache_limit(untrained_index, tiny_mllm, monkeypatch, limit):
    monkeypatch.setattr(feature_cache, "CACHED_BYTES", limit)
    tower, calls = tiny_mllm.model.get_encoder(modality="image"), []
    tower.requires_grad_(False)
    original = tower.forward
    monkeypatch.setattr(tower, "forward", lambda pixels, **kwargs: calls.append(1) or original(pixels, **kwargs))
    inputs = ExampleTensors(untrained_index, tiny_mllm, examples_of(untrained_index)["memorise"])
    pixels = torch.cat([inputs[i]["pixel_values"].flatten(0, 1) for i in range(3)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), cached_tower(tiny_mllm.model):
        features = [tower(pixels).last_hidden_state for _ in range(2)]
    assert len(calls) == (3 if limit > 1 else 6)
    assert torch.equal(*features)
    assert features[0].dtype == torch.bfloat16


def styled(n_images, n_versions, *, seed=0):
    """Return features (n, v, 20): 16 of the object, and 4 of the style, which are ten times as large."""
    draw = np.random.default_rng(seed)
    things = draw.standard_normal((n_images, 1, 16)).repeat(n_versions, 1)
    styles = 10 * draw.standard_normal((n_images, n_versions, 4))
    return np.concatenate([things, styles], -1).astype(np.float32)


def test_vision_teacher_ignores_style_features():
    versions = styled(200, 6)
    features, held_out = versions[:, :5], versions[:, 5]
    teacher = VisionTeacher.fit(features, temperature=0.1)
    found = (teacher.project(held_out) @ teacher.images.T).argmax(1)
    plain = features.mean(1) - features.mean((0, 1))
    nearest = (held_out @ (plain / np.linalg.norm(plain, axis=1, keepdims=True)).T).argmax(1)
    assert (found == np.arange(200)).mean() > 0.9
    assert (nearest == np.arange(200)).mean() < 0.1


def test_vision_teacher_whitens_by_covariance_within_images():
    """Compare with the definition, written as loops."""
    features = styled(30, 4).astype(np.float64)
    within = np.zeros((20, 20))
    for image in features:
        for version in image:
            residual = version - image.mean(0)
            within += np.outer(residual, residual) / (30 * 4)
    within += (SHRINKAGE * np.trace(within) / 20 + 1e-12) * np.eye(20)
    teacher = VisionTeacher.fit(features.astype(np.float32), temperature=0.1)
    a, b = features[3, 1], features[7].mean(0)
    centre = features.mean((0, 1))
    inner = [(x - centre) @ np.linalg.inv(within) @ (y - centre) for x, y in ((a, b), (a, a), (b, b))]
    assert teacher.versions[3, 1] @ teacher.images[7] == pytest.approx(
        inner[0] / np.sqrt(inner[1] * inner[2]), abs=1e-3
    )
    probabilities = teacher.probabilities(3, 1)
    cosines = teacher.images @ teacher.versions[3, 1]
    assert probabilities == pytest.approx(np.exp(cosines / 0.1) / np.exp(cosines / 0.1).sum(), rel=1e-4)


def test_memorise_soft_targets_multiply_to_image_probability(untrained_index, tiny_mllm):
    """The product along a sampled identifier is the probability of its image."""
    n = len(untrained_index.records)
    teacher = VisionTeacher.fit(styled(n, 3), temperature=0.2)
    examples = examples_of(untrained_index, redrawn=2)["memorise"]
    tensors = ExampleTensors(untrained_index, tiny_mllm, examples, vision_teacher=teacher)
    for i, example in enumerate(examples):
        item, probabilities = tensors[i], teacher.probabilities(example.row, example.version)
        row = int(np.random.default_rng((0, i)).choice(n, p=probabilities))
        columns = np.searchsorted(tensors.paths.token_ids, untrained_index.token_ids(row))
        targets = tensors.paths.targets(row, probabilities)
        at = [float(soft[columns[target.depth]]) for soft, target in zip(item["soft"], targets, strict=True)]
        assert np.prod(at) == pytest.approx(probabilities[row], rel=1e-4)
        assert (item["labels"] == IGNORED).all()
        assert "pixel_values" in item


def test_training_with_both_teachers_runs(pictures, tiny_mllm, tmp_path, encoder):
    """Both teachers are used, and the manifest stores the options."""
    index = build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm, encoder=load_encoder(encoder))
    mix = {"retrieve": 2, "memorise": 10, "imitate": 8}
    options = TrainOptions(max_steps=2, redrawn=1, mix=mix, lora_rank=2)
    trained = train(index, options, device="cpu", show_progress=False)
    assert trained.manifest.training["redrawn"] == 1
    assert all(np.isfinite(trained.manifest.training["losses"]))
