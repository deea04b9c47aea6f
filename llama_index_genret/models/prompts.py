"""What the model is asked in each task, and how a query becomes token ids.

Knows the tokenizer; nothing of models. The chat template of the base model is rendered once, when an index is
made (`modeling.render_prompts`), and stored as text before and after the blank: a client then needs no template
engine, and no text of a user is ever parsed as markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from llama_index_genret.errors import QueryError
from llama_index_genret.models.tokenizer import IndexTokenizer

PREFIX_BLOCK = 32
"""Tokens of a block of vLLM's prefix cache: the smallest on a CPU, and a multiple of what is usual on GPUs."""

MAX_QUERY_TOKENS = 256
"""A longer query is refused, not cut."""

MAX_QUERY_CHARACTERS = 32 * MAX_QUERY_TOKENS
"""A longer query is refused unread: to count the tokens of a megabyte takes most of a second of a server's loop."""

RETRIEVE = "Find: {}"
MEMORISE = "Name this image."
DESCRIBE = "Describe {}"
ANSWER = "{}"

LOOK = "What is in the picture?"
"""The question to which the caption of an image without questions of its own is the answer in training."""


@dataclass(frozen=True)
class Prompt:
    """What an identifier is asked with.

    token_ids: of the whole prompt; of an image prompt, before the placeholder is expanded.
    image: the file of an image prompt, or its content.
    text, rest: of an image prompt only: the rendered chat text with the model's placeholder, and the tokens after it.
    words: tokens of the query itself, of a text query only.
    """

    token_ids: tuple[int, ...]
    image: Path | bytes | None = None
    text: str = ""
    rest: tuple[int, ...] = ()
    words: tuple[int, ...] = ()


class Blank(BaseModel):
    """Rendered chat text around the one place that changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    before: str
    after: str

    def fill(self, tokenizer: IndexTokenizer, token_ids: Sequence[int]) -> list[int]:
        """Token ids with just these tokens in the blank."""
        return [*tokenizer.encode_markup(self.before), *token_ids, *tokenizer.encode_markup(self.after)]


class PromptSet(BaseModel):
    """The rendered prompts of the tasks, and of a query that is an image and a text. `end` closes the model's turn.

    block: the prompt of a text query is filled up to a multiple of so many tokens, with the query's own words before
    it. A server that caches prefixes in blocks then computes it once, and one or two tokens for each beam of a step. A
    model that reads words twice understands them better, too (arXiv:2402.15449); other fillings hinder it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    block: int = Field(ge=1)
    retrieve: Blank
    compose: Blank
    memorise: str
    describe: Blank
    answer: Blank
    end: str

    def for_query(self, tokenizer: IndexTokenizer, query: str) -> Prompt:
        """The prompt that retrieves for a text query.

        Raises:
            QueryError: the query is empty, is not valid Unicode, or has more than MAX_QUERY_TOKENS tokens or
                MAX_QUERY_CHARACTERS characters.
        """
        words = query.strip()
        if not words:
            raise QueryError("the query is empty: write what the image shows.")
        _check_length(tokenizer, words)
        return Prompt(tuple(self.query_tokens(tokenizer, words)), words=tuple(tokenizer.encode_text(words)))

    def for_no_query(self, tokenizer: IndexTokenizer) -> Prompt:
        """The prompt of `for_query` without the query: what it makes probable is so whatever is asked."""
        return Prompt(tuple(self.query_tokens(tokenizer, "")))

    def for_identifier(self, tokenizer: IndexTokenizer, token_ids: Sequence[int]) -> Prompt:
        """The prompt that describes the image of an identifier."""
        return Prompt(tuple(self.describe.fill(tokenizer, token_ids)))

    def about_identifier(self, tokenizer: IndexTokenizer, token_ids: Sequence[int], text: str) -> Prompt:
        """The prompt that asks about the image of an identifier, unseen: that of `for_identifier`, then the text.

        Raises:
            QueryError: as of `for_query`, but that the text may be empty.
        """
        _check_length(tokenizer, text)
        return Prompt(tuple(self.describe.fill(tokenizer, [*token_ids, *tokenizer.encode_text(f"\n{text}")])))

    def for_picture(self, tokenizer: IndexTokenizer, image: Path | bytes) -> Prompt:
        """The prompt that describes an image by looking at it."""
        before, after = self.answer.before, tokenizer.encode_markup(self.answer.after)
        rest = (*tokenizer.encode_text(LOOK), *after)
        return Prompt((*tokenizer.encode_markup(before), *rest), image, before, rest)

    def query_tokens(self, tokenizer: IndexTokenizer, text: str) -> list[int]:
        """The token ids of `for_query`, of a text of any length."""
        words = tokenizer.encode_text(text)
        room = -len(self.retrieve.fill(tokenizer, words)) % self.block
        again = [*words, *tokenizer.encode_text("\n")]
        filling = (again * -(-room // len(again)))[-room:] if room else []
        return self.retrieve.fill(tokenizer, [*filling, *words])

    def for_image(self, tokenizer: IndexTokenizer, image: Path | bytes, text: str = "") -> Prompt:
        """The prompt that names an image, or, with a text, the one that is asked for: "the same, but red".

        Raises:
            QueryError: as of `for_query`, but that the text may be empty.
        """
        words = text.strip()
        if not words:
            return Prompt(tuple(tokenizer.encode_markup(self.memorise)), image, self.memorise)
        _check_length(tokenizer, words)
        before = tokenizer.encode_markup(self.compose.before)
        rest = (*tokenizer.encode_text(words), *tokenizer.encode_markup(self.compose.after))
        return Prompt((*before, *rest), image, self.compose.before, rest)

    def about_image(self, tokenizer: IndexTokenizer, image: Path | bytes, text: str) -> Prompt:
        """The prompt that asks the model about an image; what is said to it is not parsed as markup."""
        before = tokenizer.encode_markup(self.answer.before)
        rest = (*tokenizer.encode_text(text), *tokenizer.encode_markup(self.answer.after))
        return Prompt((*before, *rest), image, self.answer.before, rest)


def _check_length(tokenizer: IndexTokenizer, words: str) -> None:
    if len(words) > MAX_QUERY_CHARACTERS:
        raise QueryError(
            f"the query has {len(words)} characters, at most {MAX_QUERY_TOKENS} tokens of {MAX_QUERY_CHARACTERS} "
            "characters together are read. Shorten it: it is refused, not cut."
        )
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise QueryError(f"the query is not valid Unicode at character {error.start}: {error.reason}.") from error
    n_tokens = len(tokenizer.encode_text(words))
    if n_tokens > MAX_QUERY_TOKENS:
        raise QueryError(
            f"the query has {n_tokens} tokens ({len(words)} characters), at most {MAX_QUERY_TOKENS} are read. "
            "Shorten it: it is refused, not cut."
        )
