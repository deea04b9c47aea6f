"""The tiny model loads, generates and is reproducible like a real model."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Idefics3ForConditionalGeneration

from integration.base_model import IMAGE_ID
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.torch

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def process_question(processor, color):
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=[[Image.new("RGB", (60, 40), color)]], return_tensors="pt")


def test_auto_classes_load_tied_embeddings_and_an_end_token(model, processor):
    assert isinstance(model, Idefics3ForConditionalGeneration)
    assert model.lm_head.weight is model.model.text_model.embed_tokens.weight
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer)
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert processor.tokenizer.pad_token_id != processor.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Hello\n {{ 1 }} ", "Hello\n {{ 1 }} "),
        ([{"type": "text", "text": " Hello"}], " Hello"),
        ([{"type": "image"}, {"type": "text", "text": "What?"}], "<image>What?"),
        ([{"type": "text", "text": "Look: "}, {"type": "image_url", "image_url": {"url": "data:"}}], "Look: <image>"),
        ([], ""),
    ],
)
def test_a_message_renders_as_its_content_in_order(processor, content, expected):
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    rendered = processor.apply_chat_template(messages, tokenize=False)
    assert rendered == f"<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"


def test_the_generation_prompt_opens_the_assistant_turn(processor):
    rendered = processor.tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\n"


def test_an_unsupported_message_part_is_an_error(processor):
    with pytest.raises(Exception, match="not video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)


def test_an_image_has_as_many_tokens_as_features(model, processor):
    inputs = process_question(processor, "red")
    features = model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"]).pooler_output
    assert (inputs["input_ids"] == IMAGE_ID).sum() == features.shape[1] == 4


def test_the_answer_depends_on_the_image(model, processor):
    red, blue = (
        model.generate(**process_question(processor, color), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        for color in ("red", "blue")
    )
    assert red.shape == (1, process_question(processor, "red")["input_ids"].shape[1] + 5)
    assert not torch.equal(red, blue)


@pytest.mark.parametrize("text", ["Ünïcode 123 🙂\n\t x", "", "<|im_end|>"])
def test_any_text_survives_the_tokenizer(processor, text):
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


def test_the_seed_changes_only_the_weights(folder, tmp_path):
    torch.rand(1)  # the state of the global generator must not matter
    again, other = make_tiny_model(tmp_path / "again", seed=0), make_tiny_model(tmp_path / "other", seed=1)
    for file in folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()
    differing = [file.name for file in folder.iterdir() if (other / file.name).read_bytes() != file.read_bytes()]
    assert differing == ["model.safetensors"]
