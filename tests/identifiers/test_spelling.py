"""Test identifiers in the tokens of a tokenizer: distinct, decodable after a prompt, and made of existing words."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.trainers import BpeTrainer, UnigramTrainer

from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import IdentifierCollision, IdentifierError
from llama_index_genret.identifiers import ImageFacts, Spelling, get_scheme, spelling_of
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.models.tokenizer import IndexTokenizer
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.store import load_index
from llama_index_genret.store.build import assign_identifiers, build_index
from llama_index_genret.store.model_loading import load_trained
from llama_index_genret.store.model_state import adapter_folder, new_token_ids
from llama_index_genret.training.collator import ExampleTensors
from llama_index_genret.training.recipe import TrainOptions, train
from llama_index_genret.training.tasks import InterleavedExamples, examples_of
from tests.identifiers.test_schemes import captions, random_features
from tests.tiny_model import WORDY_TEXT, make_wordy_model

pytestmark = pytest.mark.torch

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PROMPT = "<|user|>\nFind: ba be<|end|>\n<|assistant|>\n"
MARKUP = ["<|user|>", "<|assistant|>", "<|end|>"]


def byte_level():
    """Make a tokenizer like that of GPT-2: every byte is a letter, a leading space belongs to its word."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [WORDY_TEXT], BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def sentencepiece(kind):
    """Make a tokenizer like that of Llama or T5: spaces are letters, unknown characters fall back to bytes."""
    is_bpe = kind == "bpe"
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True) if is_bpe else Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    if is_bpe:
        trainer = BpeTrainer(vocab_size=1400, special_tokens=["<unk>", *BYTES], show_progress=False)
    else:
        trainer = UnigramTrainer(
            vocab_size=900, unk_token="<unk>", special_tokens=["<unk>", *BYTES], show_progress=False
        )
    tokenizer.train_from_iterator([WORDY_TEXT], trainer)
    serialized = json.loads(tokenizer.to_str())
    serialized["added_tokens"] = []
    serialized["pre_tokenizer"]["split"] = not is_bpe
    serialized["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(serialized))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    made = {"byte-level": byte_level(), "bpe": sentencepiece("bpe"), "unigram": sentencepiece("unigram")}
    return {name: IndexTokenizer(tokenizer).with_symbols(MARKUP) for name, tokenizer in made.items()}


KINDS = pytest.mark.parametrize("kind", ["byte-level", "bpe", "unigram"])


@KINDS
@given(st.lists(captions(), min_size=1, max_size=20))
def test_identifiers_of_any_captions_differ_and_decode(tokenizers, kind, all_captions):
    scheme, n = get_scheme("semantic"), len(all_captions)
    identifiers = scheme.fit(ImageFacts(n, None, tuple(all_captions)), seed=0)
    spelling = spelling_of(scheme, tokenizers[kind], "new")
    spelled = spelling.spell(identifiers)
    spelling.check(identifiers, spelled, [str(i) for i in range(n)], PROMPT)
    assert len(set(spelled)) == n
    assert spelling.unspell(spelled) == identifiers
    ids = [[spelling.tokenizer.symbol_id(piece) for piece in identifier] for identifier in spelled]
    assert ids == spelling.tokenizer.encode_texts([text for (text,) in identifiers])


@KINDS
@pytest.mark.parametrize("scheme", ["numeric", "string"])
def test_numbers_need_no_new_token(tokenizers, kind, scheme):
    instance = get_scheme(scheme)
    identifiers = instance.fit(ImageFacts(120), seed=0)
    spelling = spelling_of(instance, tokenizers[kind], "existing")
    spelled = spelling.spell(identifiers)
    spelling.check(identifiers, spelled, [str(i) for i in range(120)], PROMPT)
    assert spelling.tokenizer is tokenizers[kind]
    assert [spelling.tokenizer.read(i) for i in spelled] == ["".join(i) for i in identifiers]
    if scheme == "numeric":
        assert {len(i) for i in spelled} == {3}


@KINDS
@pytest.mark.parametrize("alphabet", ["new", "existing"])
@pytest.mark.parametrize("scheme", ["structured", "atomic"])
def test_each_symbol_is_one_new_or_existing_token(tokenizers, kind, alphabet, scheme):
    base, instance = tokenizers[kind], get_scheme(scheme)
    identifiers = instance.fit(ImageFacts(60, random_features(60)), seed=0)
    spelling = spelling_of(instance, base, alphabet)
    spelled = spelling.spell(identifiers)
    spelling.check(identifiers, spelled, [str(i) for i in range(60)], PROMPT)
    assert [len(i) for i in spelled] == [len(i) for i in identifiers]
    assert spelling.unspell(spelled) == identifiers
    added = spelling.tokenizer.vocab_size - base.vocab_size
    assert added == (len(instance.new_symbols()) if alphabet == "new" else 0)
    if alphabet == "existing":
        assert all(len(w) >= 3 and w.isalpha() for i in spelled for w in spelling.tokenizer.read(i).split(" "))


@KINDS
def test_any_sequence_of_words_is_encoded_as_these_words(tokenizers, kind):
    tokenizer, rng = tokenizers[kind], random.Random(0)
    assert len(tokenizer.words) > 100
    ids = [tokenizer.symbol_id(word) for word in tokenizer.words]
    for length in (1, 2, 5, 40):
        for _ in range(100):
            row = rng.choices(ids, k=length)
            assert tokenizer.encode_text(tokenizer.decode(row)) == row


def test_word_that_is_never_encoded_is_not_chosen():
    """Pruned vocabularies have entries without merges, whose text is encoded as other tokens."""
    serialized = json.loads(byte_level().to_str())
    serialized["model"]["vocab"]["Ġzebra"] = len(serialized["model"]["vocab"])
    tokenizer = IndexTokenizer(Tokenizer.from_str(json.dumps(serialized)))
    assert tokenizer.decode([tokenizer.symbol_id("Ġzebra")]) == " zebra"
    assert "Ġzebra" not in tokenizer.words
    assert "Ġred" in tokenizer.words


@KINDS
def test_words_are_distinct_and_stay_when_images_are_added(tokenizers, kind):
    instance = get_scheme("atomic")
    instance.fit(ImageFacts(20), seed=0)
    before = spelling_of(instance, tokenizers[kind], "existing")
    assert len(set(before.words.values())) == len(before.words) == 20
    instance.extend(ImageFacts(5), ())
    after = spelling_of(instance, tokenizers[kind], "existing")
    assert list(after.words.items())[:20] == list(before.words.items())


def test_error_for_too_few_words_shows_both_numbers(tokenizers):
    instance = get_scheme("structured", sizes=500, levels=2)
    instance.fit(ImageFacts(4, random_features(4)), seed=0)
    n_words = len(tokenizers["bpe"].words)
    with pytest.raises(IdentifierError, match=rf"needs 1000 symbols.* has {n_words} whole words"):
        spelling_of(instance, tokenizers["bpe"], "existing")
    with pytest.raises(IdentifierError, match="'new' or 'existing'"):
        spelling_of(instance, tokenizers["bpe"], "borrowed")


def test_caption_that_does_not_decode_is_an_error():
    words = {"<unk>": 0, "Find": 1, ":": 2, "red": 3, "apple": 4}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    scheme = get_scheme("semantic")
    spelling = spelling_of(scheme, IndexTokenizer(tokenizer), "new")

    def check(*captions):
        identifiers = scheme.fit(ImageFacts(len(captions), None, tuple((c,) for c in captions)), seed=0)
        names = [f"{i}.png" for i in range(len(captions))]
        spelling.check(identifiers, spelling.spell(identifiers), names, "Find:")

    check("red apple", "apple red")
    with pytest.raises(IdentifierError, match=r"'1\.png' has the identifier 'green apple'.*\[0, 4\].*structured"):
        check("red apple", "green apple")
    with pytest.raises(IdentifierCollision, match=r"'0\.png' and '1\.png'"):
        check("blue apple", "green apple")


def test_words_that_merge_are_detected(tokenizers):
    """The symbols are no whole words: 'b' followed by 'a' is encoded as one token."""
    tokenizer = tokenizers["byte-level"]
    spelling = Spelling(tokenizer, False, {"<g0_0>": "b", "<g0_1>": "a"})
    assert tokenizer.spell(["ba"]) == [("ba",)]
    with pytest.raises(IdentifierError):
        spelling.check([("<g0_0>", "<g0_1>")], [("b", "a")], ["x.png"], PROMPT)
    with pytest.raises(IdentifierError, match="merges words"):
        spelling._check_retokenised([[tokenizer.symbol_id("b"), tokenizer.symbol_id("a")]], ["x.png"])


@pytest.fixture(scope="module")
def wordy_mllm(tmp_path_factory):
    """Return the tiny model with a vocabulary of a few hundred words."""
    return load_mllm(str(make_wordy_model(tmp_path_factory.mktemp("wordy") / "tiny")), device="cpu")


def test_existing_words_train_a_plain_adapter(pictures, wordy_mllm, tmp_path):
    index = build_index(read_corpus(pictures), tmp_path / "index", wordy_mllm, alphabet="existing")
    assert index.manifest.alphabet == "existing"
    assert index.tokenizer.fingerprint == index.manifest.model.base_tokenizer
    assert new_token_ids(index) == []
    index = train(index, TrainOptions(max_steps=2, lora_rank=2), device="cpu", show_progress=False)
    config = json.loads((adapter_folder(index) / "adapter_config.json").read_text())
    assert not config["trainable_token_indices"]
    assert not config["modules_to_save"]
    scorer = TransformersScorer(load_trained(index, device="cpu"))
    prompt = index.prompts.for_query(index.tokenizer, "red circle")
    (ranking,) = recall(scorer, index.trie, [prompt], SearchOptions(k=20))
    assert len({index.record_of(hit).image_id for hit in ranking.hits}) == 20
    assert all(word.isalpha() for hit in ranking.hits for word in index.identifier_of(hit).split(" "))


@pytest.mark.parametrize("options", [{"alphabet": "existing"}, {"scheme": "semantic"}])
def test_describe_prompt_contains_the_identifier_tokens(pictures, wordy_mllm, tmp_path, options):
    index = build_index(read_corpus(pictures), tmp_path / "index", wordy_mllm, **options)
    describe = {"describe": examples_of(index)["describe"]}
    tensors = ExampleTensors(index, wordy_mllm, InterleavedExamples(describe, 20, seed=0))
    before = index.tokenizer.encode_markup(index.prompts.describe.before)
    for i in range(20):
        ids = list(index.token_ids(InterleavedExamples(describe, 20, seed=0)[i].row))
        assert tensors[i]["input_ids"].tolist()[: len(before) + len(ids)] == before + ids


def test_semantic_index_reads_as_captions(pictures, tiny_mllm, tmp_path):
    index = build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm, scheme="semantic")
    named = {index.tokenizer.read(identifier) for identifier in index.identifiers}
    assert named == {record.captions[0] for record in index.records}
    row = index.rows_by_id[index.records[3].image_id]
    assert list(index.token_ids(row)) == index.tokenizer.encode_text(index.records[row].captions[0])


@pytest.mark.parametrize(("scheme", "alphabet"), [("structured", "new"), ("structured", "existing"), ("atomic", "new")])
def test_added_images_get_new_identifiers(pictures, wordy_mllm, tmp_path, scheme, alphabet):
    index = build_index(read_corpus(pictures), tmp_path / "index", wordy_mllm, scheme=scheme, alphabet=alphabet)
    names = assign_identifiers(load_index(tmp_path / "index"), index.records[:5], wordy_mllm)
    assert not set(names.identifiers) & set(index.identifiers)
    assert len(set(names.identifiers)) == 5
    if scheme == "structured":
        assert [i[:1] for i in names.identifiers] == [i[:1] for i in index.identifiers[:5]]
    grown = names.tokenizer.vocab_size - index.tokenizer.vocab_size
    assert grown == (5 if scheme == "atomic" else 0)
