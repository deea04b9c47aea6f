"""Tests of identifier spellings on real tokenizers: the base model's byte-level BPE, and Mistral's SentencePiece."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import mistral_common
import pytest
from tokenizers import Tokenizer
from transformers import LlamaTokenizer

from llama_index_genret.identifiers import ImageFacts, get_scheme, spelling_of
from llama_index_genret.models.tokenizer import IndexTokenizer
from tests.identifiers.test_schemes import HOSTILE, random_features

PROMPT = "user\nFind: a dog?\nassistant\n"
SCHEMES = [(scheme, "new") for scheme in ("numeric", "string", "semantic", "structured", "atomic")]


@pytest.fixture(scope="module", params=["base", "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def tokenizer(request, tmp_path_factory):
    if request.param == "base":
        made = subprocess.run(
            [sys.executable, "-m", "integration.base_model"], capture_output=True, text=True, check=True
        )
        return IndexTokenizer.from_file(Path(made.stdout.splitlines()[-1]) / "tokenizer.json")
    folder = tmp_path_factory.mktemp("sentencepiece")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / request.param, folder / "tokenizer.model")
    converted = LlamaTokenizer.from_pretrained(str(folder))
    return IndexTokenizer(Tokenizer.from_str(converted.backend_tokenizer.to_str()))


@pytest.mark.parametrize(("scheme", "alphabet"), [*SCHEMES, ("structured", "existing"), ("atomic", "existing")])
def test_every_identifier_reads_back_after_a_prompt(tokenizer, scheme, alphabet):
    n = 2000
    naming = get_scheme(scheme)
    images = ImageFacts(n, random_features(n), tuple((HOSTILE[i % len(HOSTILE)],) for i in range(n)))
    identifiers = naming.fit(images, seed=0)
    spelling = spelling_of(naming, tokenizer, alphabet)
    spelled = spelling.spell(identifiers)
    spelling.check(identifiers, spelled, [str(i) for i in range(n)], PROMPT)
    assert len(set(spelled)) == n
    assert spelling.unspell(spelled) == identifiers
    if alphabet == "existing":
        assert spelling.tokenizer.fingerprint == tokenizer.fingerprint


def test_thousands_of_words_stay_apart_in_any_sequence(tokenizer):
    ids, rng = [tokenizer.symbol_id(word) for word in tokenizer.words], random.Random(0)
    assert len(ids) > 10_000
    rows = [rng.choices(ids, k=rng.randint(1, 6)) for _ in range(20_000)]
    rows.append(rng.sample(ids, k=len(ids)))
    assert tokenizer.encode_texts(tokenizer.decode_all(rows)) == rows
