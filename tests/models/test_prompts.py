"""A query is read whole or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_index_genret.errors import QueryError
from llama_index_genret.models.prompts import MAX_QUERY_TOKENS, PREFIX_BLOCK


def test_a_query_prompt_repeats_the_query_inside_the_chat_markup(untrained_index):
    prompts, tokenizer = untrained_index.prompts, untrained_index.tokenizer
    prompt = tokenizer.decode(prompts.for_query(tokenizer, "  red circle ").token_ids)
    before, after = "<|im_start|>user\nFind: ", "<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.startswith(before)
    assert prompt.endswith(f"\nred circle{after}")
    filling = prompt.removeprefix(before).removesuffix(f"red circle{after}")
    assert ("red circle\n" * 20).endswith(filling)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip))
def test_a_query_prompt_fills_whole_blocks_with_fewest_tokens(untrained_index, text):
    prompts, tokenizer = untrained_index.prompts, untrained_index.tokenizer
    words = tokenizer.encode_text(text.strip())
    alone = prompts.retrieve.fill(tokenizer, words)
    prompt = list(prompts.for_query(tokenizer, text).token_ids)
    assert len(prompt) % PREFIX_BLOCK == 0
    assert 0 <= len(prompt) - len(alone) < PREFIX_BLOCK
    unfilled = prompts.model_copy(update={"block": 1})
    assert list(unfilled.for_query(tokenizer, text).token_ids) == alone
    end = len(words) + len(tokenizer.encode_markup(prompts.retrieve.after))
    assert prompt[-end:] == alone[-end:]


@pytest.mark.parametrize("query", ["", "  \n", "\ud800"])
def test_an_empty_or_invalid_query_is_refused(untrained_index, query):
    with pytest.raises(QueryError):
        untrained_index.prompts.for_query(untrained_index.tokenizer, query)


def test_a_long_query_is_refused_not_truncated(untrained_index):
    prompts, tokenizer = untrained_index.prompts, untrained_index.tokenizer
    word = "Q"
    assert len(tokenizer.encode_text(word * MAX_QUERY_TOKENS)) == MAX_QUERY_TOKENS
    prompts.for_query(tokenizer, word * MAX_QUERY_TOKENS)
    with pytest.raises(QueryError, match=f"{MAX_QUERY_TOKENS + 1} tokens"):
        prompts.for_query(tokenizer, word * (MAX_QUERY_TOKENS + 1))


def test_a_megabyte_query_is_refused_before_tokenization(untrained_index, monkeypatch):
    prompts, tokenizer = untrained_index.prompts, untrained_index.tokenizer
    monkeypatch.setattr(type(tokenizer), "encode_text", lambda *_: pytest.fail("tokenized"))
    with pytest.raises(QueryError, match=f"1000000 characters.*{MAX_QUERY_TOKENS} tokens"):
        prompts.for_query(tokenizer, "x" * 1_000_000)
