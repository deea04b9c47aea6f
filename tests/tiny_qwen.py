"""Random Qwen2.5-VL and Qwen3-VL models of about 100,000 weights, with the special features of this family.

The features are images of any size in packed patches, positions in three dimensions, a merger inside the vision
tower, and vocabulary rows without a token. The LM head of Qwen2.5-VL is untied, as in its 7 B size. The head of
Qwen3-VL is tied, as in the small sizes.

Depends on Hugging Face classes; independent of the package under test.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from tests.tiny_model import TEXT, WIDTH_OF_WEIGHTS, byte_pairs

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PAD, END, IMAGE, VIDEO = "<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"
VOCABULARY, ROWS = 320, 448
"""The number of tokens, and the number of rows in the model's embeddings."""
PATCH, MERGE = 8, 2
SIZES = ((64, 64), (64, 32), (48, 96))
"""Widths and heights of images. They take 16, 8 and 18 tokens."""

# ChatML with the system message that Qwen2.5-VL adds if there is none.
CHAT_TEMPLATE = r"""
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- '<|vision_start|><|image_pad|><|vision_end|>' if 'image' in part['type'] else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""


class ImageProcessor(Qwen2_5_VLProcessor):  # type: ignore[misc]
    """Qwen's processor without its video part, because only that part needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = IMAGE, VIDEO
        self.image_token_id, self.video_token_id = map(tokenizer.convert_tokens_to_ids, (IMAGE, VIDEO))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def tiny_qwen_processor() -> ImageProcessor:
    """Return a processor with one token per 16 x 16 pixels of an image."""
    tokenizer = Tokenizer(byte_pairs(VOCABULARY, TEXT, SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": 16 * 16, "longest_edge": 96 * 96}
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, chat_template=CHAT_TEMPLATE
    )
    return ImageProcessor(image_processor, fast, chat_template=CHAT_TEMPLATE)


def tiny_qwen(family: str, *, seed: int = 0) -> Any:
    """Return a model in float32 and evaluation mode."""
    ids = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    language = {
        "vocab_size": ROWS,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "initializer_range": WIDTH_OF_WEIGHTS,
        "pad_token_id": ids[PAD],
        "bos_token_id": ids[PAD],
        "eos_token_id": ids[END],
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "out_hidden_size": language["hidden_size"],
        "initializer_range": WIDTH_OF_WEIGHTS,
    }
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    tokens = {
        "image_token_id": ids[IMAGE],
        "video_token_id": ids[VIDEO],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "dtype": "float32",
    }
    if family == "qwen2_5_vl":
        kind = Qwen2_5_VLForConditionalGeneration
        config = Qwen2_5_VLConfig(
            text_config=language | {"rope_parameters": rope | {"mrope_section": [4, 6, 6]}},
            vision_config=vision | {"window_size": 2 * MERGE * PATCH, "fullatt_block_indexes": [1]},
            tie_word_embeddings=False,
            **tokens,
        )
    else:
        kind = Qwen3VLForConditionalGeneration
        sections = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
        config = Qwen3VLConfig(
            text_config=language | {"head_dim": 32, "rope_parameters": rope | sections},
            vision_config=vision | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
            tie_word_embeddings=True,
            **tokens,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    model.generation_config = GenerationConfig(pad_token_id=ids[PAD], eos_token_id=ids[END])
    return model.eval()


def save_tiny_qwen(directory: Path, family: str, *, seed: int = 0) -> Path:
    """Write a model that `AutoModelForImageTextToText` loads. `AutoProcessor` and vLLM also need torchvision."""
    tiny_qwen(family, seed=seed).save_pretrained(directory)
    processor = tiny_qwen_processor()
    processor.image_processor.save_pretrained(directory)
    processor.tokenizer.save_pretrained(directory)
    return directory


def resize_images(folder: Path) -> Path:
    """Resize the images of an imagefolder to the sizes of SIZES in turn."""
    for path, size in zip(sorted(folder.glob("*.png")), itertools.cycle(SIZES), strict=False):
        Image.open(path).resize(size).save(path)
    return folder
