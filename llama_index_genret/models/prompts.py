"""The prompts of each task, and their token ids.

Depends on the tokenizer; independent of models. `mllm.render_prompts` renders the chat template of the base model
once, when an index is made. An index stores the text before and after the blank. A client therefore needs no
template engine, and text of a user is never parsed as markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from llama_index_genret.errors import QueryError
from llama_index_genret.models.tokenizer import IndexTokenizer

PREFIX_BLOCK = 32
"""Tokens per block of vLLM's prefix cache: the smallest block on a CPU, and a multiple of the usual size on GPUs."""

MAX_QUERY_TOKENS = 256
"""A longer query is refused, not truncated."""

MAX_QUERY_CHARACTERS = 32 * MAX_QUERY_TOKENS
"""A longer query is refused before tokenization, which blocks a server's loop for most of a second per megabyte."""

RETRIEVE = "Find: {}"
MEMORISE = "Name this image."
DESCRIBE = "Describe {}"
ANSWER = "{}"

CAPTION_QUESTION = "What is in the picture?"
"""The question that a caption answers in training, for an image that has no questions."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of text, or of an image and text.

    token_ids: token ids of the whole prompt. The placeholder of an image is not expanded.
    image: file of the image, or its content. None for a text prompt.
    text: image prompts only: the rendered chat text with the model's image placeholder.
    rest: image prompts only: the token ids after `text`.
    words: text queries only: the token ids of the query itself.
    query: text of the query, empty for an image alone.
    """

    token_ids: tuple[int, ...]
    image: Path | bytes | None = None
    text: str = ""
    rest: tuple[int, ...] = ()
    words: tuple[int, ...] = ()
    query: str = ""


class Blank(BaseModel):
    """Rendered chat text before and after the one place that changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    before: str
    after: str

    def fill(self, tokenizer: IndexTokenizer, token_ids: Sequence[int]) -> list[int]:
        """Return the token ids of the chat text with `token_ids` in the blank."""
        return [*tokenizer.encode_markup(self.before), *token_ids, *tokenizer.encode_markup(self.after)]


class PromptSet(BaseModel):
    """The rendered prompts of all tasks.

    block: the prompt of a text query is filled up to a multiple of this number of tokens. Repetitions of the query,
        placed before it, fill the room. A server that caches prefixes in blocks then computes the prompt once.
        For each beam of a step it computes only one or two tokens. A model also understands text better if it reads
        it twice (arXiv:2402.15449). Other fillings make it worse.
    compose: the prompt for a query of an image and a text.
    end: the text that closes the model's turn.
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
        """Return the prompt that retrieves for a text query.

        Raises:
            QueryError: the query is empty, is not valid Unicode, or has more than MAX_QUERY_TOKENS tokens or
                MAX_QUERY_CHARACTERS characters.
        """
        words = query.strip()
        if not words:
            raise QueryError("the query is empty: write what the image shows.")
        _check_length(tokenizer, words)
        return Prompt(
            tuple(self.query_tokens(tokenizer, words)), words=tuple(tokenizer.encode_text(words)), query=words
        )

    def for_no_query(self, tokenizer: IndexTokenizer) -> Prompt:
        """Return the prompt of `for_query` without a query, which gives the prior of each identifier."""
        return Prompt(tuple(self.query_tokens(tokenizer, "")))

    def for_identifier(self, tokenizer: IndexTokenizer, token_ids: Sequence[int]) -> Prompt:
        """Return the prompt that asks for the caption of an identifier's image."""
        return Prompt(tuple(self.describe.fill(tokenizer, token_ids)))

    def for_caption(self, tokenizer: IndexTokenizer, image: Path | bytes) -> Prompt:
        """Return the prompt that shows an image and asks for its caption."""
        before, after = self.answer.before, tokenizer.encode_markup(self.answer.after)
        rest = (*tokenizer.encode_text(CAPTION_QUESTION), *after)
        return Prompt((*tokenizer.encode_markup(before), *rest), image, before, rest)

    def query_tokens(self, tokenizer: IndexTokenizer, text: str) -> list[int]:
        """Return the token ids of `for_query`, for a text of any length."""
        words = tokenizer.encode_text(text)
        room = -len(self.retrieve.fill(tokenizer, words)) % self.block
        repeated = [*words, *tokenizer.encode_text("\n")]
        filling = (repeated * -(-room // len(repeated)))[-room:] if room else []
        return self.retrieve.fill(tokenizer, [*filling, *words])

    def for_image(self, tokenizer: IndexTokenizer, image: Path | bytes, text: str = "") -> Prompt:
        """Return the prompt that retrieves for an image query.

        Args:
            image: a file, or the content of one.
            text: a change of the image, such as "the same, but red". Default: none, the image itself.
        Raises:
            QueryError: as for `for_query`, except that the text may be empty.
        """
        words = text.strip()
        if not words:
            return Prompt(tuple(tokenizer.encode_markup(self.memorise)), image, self.memorise)
        _check_length(tokenizer, words)
        before = tokenizer.encode_markup(self.compose.before)
        rest = (*tokenizer.encode_text(words), *tokenizer.encode_markup(self.compose.after))
        return Prompt((*before, *rest), image, self.compose.before, rest, query=words)

    def about_image(self, tokenizer: IndexTokenizer, image: Path | bytes, text: str) -> Prompt:
        """Return the prompt that asks a question about an image. The question is not parsed as markup."""
        before = tokenizer.encode_markup(self.answer.before)
        rest = (*tokenizer.encode_text(text), *tokenizer.encode_markup(self.answer.after))
        return Prompt((*before, *rest), image, self.answer.before, rest)


def _check_length(tokenizer: IndexTokenizer, words: str) -> None:
    if len(words) > MAX_QUERY_CHARACTERS:
        raise QueryError(
            f"the query has {len(words)} characters, but at most {MAX_QUERY_CHARACTERS} characters and "
            f"{MAX_QUERY_TOKENS} tokens are read. Shorten it: it is refused, not truncated."
        )
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise QueryError(f"the query is not valid Unicode at character {error.start}: {error.reason}.") from error
    n_tokens = len(tokenizer.encode_text(words))
    if n_tokens > MAX_QUERY_TOKENS:
        raise QueryError(
            f"the query has {n_tokens} tokens ({len(words)} characters), but at most {MAX_QUERY_TOKENS} are read. "
            "Shorten it: it is refused, not truncated."
        )
