"""Convert text to token ids and back, in the same way on a client, in training and on a server.

Depends on the `tokenizers` library; independent of models. Markup and text are encoded separately, so text of a user
never becomes a special token or a symbol of an identifier.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from llama_index_genret.errors import IdentifierError, ModelError

SHORTEST_WORD = 3
"""The least number of letters in a vocabulary word that serves as a symbol."""


class IndexTokenizer:
    """An immutable tokenizer, with the symbols of an index added to its vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        serialized = json.loads(tokenizer.to_str())
        serialized["padding"] = serialized["truncation"] = None
        self._json = json.dumps(serialized, ensure_ascii=False, sort_keys=False)
        self._markup = Tokenizer.from_str(self._json)
        self._text = Tokenizer.from_str(self._json)
        self._text.encode_special_tokens = True

    @classmethod
    def from_file(cls, path: Path) -> IndexTokenizer:
        """Read a `tokenizer.json`.

        Raises:
            ModelError: the file is missing or is not a fast tokenizer.
        """
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises a bare Exception
            raise ModelError(
                f"{path} cannot be read as a fast tokenizer: {error}. Save one with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            ) from error

    def to_json(self) -> str:
        """Return the content of a `tokenizer.json`."""
        return self._json

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines token ids."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of vocabulary entries, including added tokens."""
        return int(self._markup.get_vocab_size(with_added_tokens=True))

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of plain text. The text of a special token is encoded like any other word."""
        return list(self._text.encode(text, add_special_tokens=False).ids)

    def encode_markup(self, text: str) -> list[int]:
        """Return the token ids of trusted text, in which special tokens and symbols are recognised."""
        return list(self._markup.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the ids, including special tokens and symbols."""
        return str(self._markup.decode(list(token_ids), skip_special_tokens=False))

    def symbol_id(self, symbol: str) -> int:
        """Return the id of the one token of `symbol`.

        Raises:
            IdentifierError: the tokenizer encodes it as several tokens, or as none.
        """
        token_id = self._markup.token_to_id(symbol)
        ids = [token_id] if token_id is not None else self.encode_markup(symbol)
        if len(ids) != 1:
            raise IdentifierError(
                f"the symbol {symbol!r} takes {len(ids)} tokens {ids}, but must be one. "
                "Add it to the tokenizer (with_symbols), or choose a scheme whose symbols it has."
            )
        return int(ids[0])

    def pieces(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Return the vocabulary entries of the ids, such as `Ġapple` or `▁apple`. `symbol_id` is the inverse."""
        pieces = [self._markup.id_to_token(token_id) for token_id in token_ids]
        if None in pieces:
            raise IdentifierError(f"the vocabulary of {self.vocab_size} entries has no token {token_ids}.")
        return tuple(map(str, pieces))

    def spell(self, texts: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the pieces of each plain text, in which no special token is recognised."""
        return [self.pieces(ids) for ids in self.encode_texts(texts)]

    def read(self, pieces: Sequence[str]) -> str:
        """Return readable text: symbols unchanged, `<g0_17><g1_5>`; other pieces decoded, `red apple`."""
        if self._added.issuperset(pieces):
            return "".join(pieces)
        return self.decode([self.symbol_id(piece) for piece in pieces]).removeprefix(" ")

    @cached_property
    def _added(self) -> frozenset[str]:
        return frozenset(token.content for token in self._markup.get_added_tokens_decoder().values())

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Pieces that are a whole word after a space. Lower-case ASCII words come first, then the order is by token id.

        Each word has only letters, at least SHORTEST_WORD of them. Encoding the decoded text of any sequence of them
        gives the same tokens, because none merges with a neighbour.
        """
        pieces = ((i, self._markup.id_to_token(i)) for i in range(self.vocab_size))
        ids = [i for i, piece in pieces if piece is not None and piece not in self._added]
        alone = map(str.strip, self.decode_all([[i] for i in ids]))
        twice = self.decode_all([[i, i] for i in ids])
        whole = [
            (i, word, both)
            for i, word, both in zip(ids, alone, twice, strict=True)
            if len(word) >= SHORTEST_WORD and word.isalpha() and both.removeprefix(" ") == f"{word} {word}"
        ]
        encoded = self.encode_texts([both for _, _, both in whole])
        kept = [(i, word) for (i, word, _), back in zip(whole, encoded, strict=True) if back == [i, i]]
        kept.sort(key=lambda entry: (not _is_common(entry[1]), entry[0]))
        return self.pieces([i for i, _ in kept])

    @property
    def common_words(self) -> list[str]:
        """The text of the `words` that have only lower-case ASCII letters."""
        return [
            word
            for word in map(str.strip, self.decode_all([[self.symbol_id(p)] for p in self.words]))
            if _is_common(word)
        ]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts like `encode_text`, but faster."""
        return [list(encoding.ids) for encoding in self._text.encode_batch(list(texts), add_special_tokens=False)]

    def decode_all(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Decode many sequences like `decode`, but faster."""
        return list(self._markup.decode_batch([list(ids) for ids in sequences], skip_special_tokens=False))

    def with_symbols(self, symbols: Sequence[str]) -> IndexTokenizer:
        """Return a tokenizer that also has `symbols`, each as one special token at the end of the vocabulary."""
        grown = Tokenizer.from_str(self._json)
        grown.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in symbols])
        return IndexTokenizer(grown)


def _is_common(word: str) -> bool:
    return word.isascii() and word.islower()
