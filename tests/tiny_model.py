"""A random multimodal LLM of 67,000 weights with the architecture and file layout of the base model.

Building it takes a second. Depends on the builder of the base model; independent of the package under test.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from integration.base_model import SPECIAL_TOKENS, build_model, build_processor, save

SIDE, PATCH, SCALE_FACTOR = 32, 8, 2
VOCABULARY = 320
# Weights of this spread make the output depend visibly on text and image.
WIDTH_OF_WEIGHTS = 0.2
TEXT = """What is in the picture? A red apple on a wooden table. Find: a dog that runs on the beach. Name this image.
The user asks, the assistant answers. Describe the yellow bus in front of the house. It is green and small."""


SYLLABLES = [a + b for a, b in product("bdkmrst", "aeo")]
WORDS = [a + b for a, b in product(SYLLABLES, SYLLABLES)]
WORDY_TEXT = " ".join(WORDS * 3 + ["red apple 0 1 2 3 4 5 6 7 8 9"] * 3)


def make_wordy_model(directory: Path) -> Path:
    """Write the tiny model with a vocabulary of a few hundred words."""
    return make_tiny_model(directory, vocabulary=1200, text=WORDY_TEXT)


def make_tiny_model(directory: Path, *, seed: int = 0, vocabulary: int = VOCABULARY, text: str = TEXT) -> Path:
    """Write a model that `AutoProcessor`, `AutoModelForImageTextToText` and vLLM load. An image takes 4 tokens.

    The same seed gives the same weights. The tokenizer, trained on `text`, is the same for all seeds.
    """
    processor = build_processor(
        byte_pairs(vocabulary, text, SPECIAL_TOKENS), side=SIDE, image_tokens=(SIDE // PATCH // SCALE_FACTOR) ** 2
    )
    model = build_model(
        {
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 32,  # the smallest size that vLLM's attention supports on a CPU
            "max_position_embeddings": 2048,
            "initializer_range": WIDTH_OF_WEIGHTS,
        },
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "initializer_range": WIDTH_OF_WEIGHTS,
        },
        scale_factor=SCALE_FACTOR,
        seed=seed,
    )
    save(model, processor, directory)
    return directory


def byte_pairs(vocabulary: int, text: str, special_tokens: Sequence[str]) -> BPE:
    """Return a BPE model with the special tokens, all bytes, and the most frequent pairs of `text`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer.model
