"""Qwen-VL models equal plain forward passes in positions, packed patches and untied heads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image

from llama_index_genret.corpus import read_corpus
from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import ModelError
from llama_index_genret.models.features import vision_features
from llama_index_genret.models.mllm import Mllm, load_mllm
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import Normalise, Row, Rows
from llama_index_genret.store import store_adapter
from llama_index_genret.store.build import add_to_index, build_index
from llama_index_genret.store.model_loading import _set_new_rows
from llama_index_genret.store.model_state import stored_new_rows
from llama_index_genret.training.collator import IGNORED, ExampleTensors, collate
from llama_index_genret.training.feature_cache import cached_tower
from llama_index_genret.training.lora import add_lora, fast_symbol_rows
from llama_index_genret.training.recipe import TrainOptions
from llama_index_genret.training.tasks import InterleavedExamples, examples_of
from llama_index_genret.training.trainer import summed_loss
from tests.conftest import draw_pictures
from tests.tiny_qwen import FAMILIES, IMAGE, SIZES, resize_images, tiny_qwen, tiny_qwen_processor
from tests.training.test_recipe import loss_and_gradients

pytestmark = pytest.mark.torch

PREFIXES = [(), (100,), (110,), (100, 130), (110, 140), (110, 150)]
TOKENS = np.arange(100, 160)


@pytest.fixture(scope="module")
def images_of_all_sizes(tmp_path_factory):
    return resize_images(draw_pictures(tmp_path_factory.mktemp("pictures") / "images"))


@pytest.fixture(scope="module", params=FAMILIES)
def qwen(request):
    return Mllm(request.param, tiny_qwen(request.param), tiny_qwen_processor())


@pytest.fixture(scope="module")
def index(qwen, images_of_all_sizes, tmp_path_factory):
    return build_index(read_corpus(images_of_all_sizes), tmp_path_factory.mktemp("index") / "index", qwen)


@pytest.fixture
def fresh(qwen):
    """A new copy of the model, for a test that changes it."""
    return Mllm(qwen.name_or_path, tiny_qwen(qwen.name_or_path), qwen.processor)


def plain_log_probs(mllm, inputs, prefix):
    """Return (vocabulary,) log-probabilities from one forward pass without a cache."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([prefix], dtype=torch.long)], 1)
    inputs = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        text = torch.zeros((1, len(prefix)), dtype=torch.long)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], text], 1)
    with torch.no_grad():
        return mllm.model(**inputs).logits[0, -1].double().log_softmax(-1).numpy()


def assert_scores_equal_plain_passes(mllm, prompts, inputs):
    rows = [Row(query, prefix, TOKENS) for query in range(len(prompts)) for prefix in PREFIXES]
    with TransformersScorer(mllm).session(prompts, Normalise.VOCABULARY) as session:
        for depth in range(3):
            batch = Rows.of([row for row in rows if len(row.prefix) == depth])
            for row, scores in zip(batch, batch.split(session.score(batch)), strict=True):
                expected = plain_log_probs(mllm, inputs[row.query], row.prefix)[row.token_ids]
                np.testing.assert_allclose(scores, expected, atol=2e-4)


def test_images_of_any_size_are_scored_like_forward_passes(qwen, index):
    """The position of the text after an image follows the image's longer side, not its last token."""
    paths = {load_image(record.path).size: record.path for record in index.records}
    prompts = [index.prompts.for_image(index.tokenizer, paths[size]) for size in SIZES]
    inputs = [qwen.process([prompt.text], [load_image(prompt.image)]) for prompt in prompts]
    assert_scores_equal_plain_passes(qwen, prompts, inputs)
    texts = [index.prompts.for_query(index.tokenizer, text) for text in ("red circle", "the blue bar on the table")]
    assert_scores_equal_plain_passes(qwen, texts, [{"input_ids": torch.tensor([p.token_ids])} for p in texts])


def test_an_error_names_the_library_that_a_model_needs(monkeypatch):
    def from_pretrained(_):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match=r"some-folder.*Torchvision"):
        load_mllm("some-folder", device="cpu")


def test_features_of_a_batch_equal_those_of_single_images(qwen, index):
    paths = [record.path for record in index.records]
    alone = np.concatenate([vision_features(qwen, [path]) for path in paths])
    np.testing.assert_allclose(vision_features(qwen, paths), alone, atol=1e-5)
    assert len(np.unique(alone.round(3), axis=0)) == len(paths)


def test_the_loss_of_a_batch_equals_plain_forward_passes(qwen, index):
    """Padding and the other images of a batch do not change positions."""
    examples = InterleavedExamples(examples_of(index), 60, seed=0)
    memorise = [i for i in range(60) if examples[i].task == "memorise"]
    tensors = ExampleTensors(index, qwen, examples)
    items, expected = [tensors[i] for i in memorise], 0.0
    assert len({len(item["input_ids"]) for item in items}) == len(SIZES)
    for i, item in zip(memorise, items, strict=True):
        target = [int(token) for token in item["labels"] if token != IGNORED]
        inputs = qwen.process([index.prompts.memorise], [load_image(index.records[examples[i].row].path)])
        steps = [plain_log_probs(qwen, inputs, target[:n])[token] for n, token in enumerate(target)]
        expected -= sum(steps)
    symbols = torch.from_numpy(tensors.paths.token_ids)
    with torch.no_grad():
        (batch,) = collate(items, pad=0).values()
        assert float(summed_loss(qwen.model, batch, symbols)[0]) == pytest.approx(expected, rel=1e-4)


def test_a_saved_adapter_has_the_trained_loss_with_any_head(fresh, index, tmp_path):
    """The rows of new symbols are trained in the input embeddings and in an untied LM head."""
    examples = InterleavedExamples(examples_of(index), 20, seed=0)
    tensors = ExampleTensors(index, fresh, examples)
    batch = collate([tensors[i] for i in range(20)], pad=0)
    tied = fresh.model.lm_head.weight is fresh.model.get_input_embeddings().weight
    model = add_lora(index, fresh, TrainOptions(lora_rank=2))

    def losses(model):
        symbols = torch.from_numpy(tensors.paths.token_ids)
        return [summed_loss(model, dict(part), symbols)[0] for part in batch.values()]

    sum(losses(model)).backward()
    learned = {name: p for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert sum("trainable_tokens" in name for name in learned) == (1 if tied else 2)
    with torch.no_grad():
        for parameter in learned.values():
            parameter -= 0.01 * parameter.grad.sign()
        expected = losses(model)
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        merged = PeftModel.from_pretrained(tiny_qwen(fresh.name_or_path), tmp_path).merge_and_unload()
        torch.testing.assert_close(losses(merged), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_added_symbols_are_set_in_embeddings_and_head(qwen, fresh, images_of_all_sizes, tmp_path):
    corpus = read_corpus(images_of_all_sizes)
    some = replace(corpus, records=corpus.records[:18])
    index = build_index(some, tmp_path / "index", qwen, scheme="atomic")
    model = add_lora(index, fresh, TrainOptions(lora_rank=2))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    grown = add_to_index(store_adapter(index, tmp_path / "adapter", {}), corpus.records[18:], qwen)
    loaded = tiny_qwen(fresh.name_or_path)
    _set_new_rows(loaded, grown)
    modules = {"embed_tokens": loaded.get_input_embeddings(), "lm_head": loaded.get_output_embeddings()}
    if modules["lm_head"].weight is modules["embed_tokens"].weight:
        del modules["lm_head"]
    new = stored_new_rows(grown)
    assert new.rows.keys() == modules.keys()
    assert new.token_ids.tolist() == [grown.token_ids(row)[0] for row in (18, 19)]
    for name, module in modules.items():
        np.testing.assert_allclose(module.weight.detach().numpy()[new.token_ids], new.rows[name], atol=1e-6)
        assert np.abs(new.rows[name][0] - new.rows[name][1]).max() > 1e-3


def test_cached_features_and_fast_rows_keep_loss_and_gradients(fresh, index):
    model = add_lora(index, fresh, TrainOptions(lora_rank=2))
    examples = InterleavedExamples(examples_of(index), 20, seed=0)
    tensors = ExampleTensors(index, fresh, examples)
    batch = collate([tensors[i] for i in range(20)], pad=0)
    encoded = []
    fresh.model.model.visual.patch_embed.register_forward_hook(lambda *_: encoded.append(1))

    plain_loss, plain = loss_and_gradients(model, batch)
    encoded.clear()
    with cached_tower(fresh.model), fast_symbol_rows(model):
        for _ in range(2):
            fast_loss, fast = loss_and_gradients(model, batch)
            assert fast_loss == pytest.approx(plain_loss, rel=1e-5)
            assert fast.keys() == plain.keys()
            for name, gradient in plain.items():
                torch.testing.assert_close(fast[name], gradient, rtol=1e-3, atol=1e-4)
    images = {examples[i].row for i in range(20) if examples[i].task in ("memorise", "answer")}
    assert len(encoded) == len(images)


def test_the_same_patches_in_another_grid_differ(qwen):
    """One image has black beside white, the other black above white."""
    lying, standing = Image.new("RGB", (32, 16)), Image.new("RGB", (16, 32))
    lying.paste("white", (16, 0, 32, 16))
    standing.paste("white", (0, 16, 16, 32))
    lying, standing = (qwen.process([IMAGE], [image]) for image in (lying, standing))
    assert torch.equal(lying["pixel_values"], standing["pixel_values"])
    qwen.model.requires_grad_(False)
    tower = qwen.model.get_encoder("image")

    def encoded(inputs):
        return tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output

    plain = [encoded(inputs) for inputs in (lying, standing)]
    with cached_tower(qwen.model):
        torch.testing.assert_close([encoded(inputs) for inputs in (lying, standing)], plain)
    assert not torch.allclose(*plain, atol=1e-3)
