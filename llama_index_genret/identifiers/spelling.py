"""Writes the identifiers of a scheme in the tokens of one tokenizer, and checks that they decode to the same text.

Depends on schemes and tokenizers; independent of models and the trie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llama_index_genret.errors import IdentifierCollision, IdentifierError
from llama_index_genret.identifiers.base import Identifier, Scheme
from llama_index_genret.models.tokenizer import IndexTokenizer

Alphabet = Literal["new", "existing"]
"""The source of a scheme's new symbols: tokens added to the tokenizer, or existing words of its vocabulary."""


@dataclass(frozen=True, eq=False)
class Spelling:
    """Converts identifiers of a scheme to identifiers of an index and back.

    The symbols of an index are entries of the tokenizer's vocabulary.

    tokenizer: the tokenizer of the index, with all symbols.
    is_text: True if the scheme makes texts, which the tokenizer splits into tokens.
    words: maps each new symbol to its vocabulary entry with the alphabet "existing". Default and with "new": empty.
    """

    tokenizer: IndexTokenizer
    is_text: bool
    words: Mapping[str, str] = field(default_factory=dict)

    def spell(self, identifiers: Sequence[Identifier]) -> list[Identifier]:
        """Return the identifiers as vocabulary entries, each one token."""
        if self.is_text:
            return self.tokenizer.spell(["".join(identifier) for identifier in identifiers])
        return [tuple(self.words.get(symbol, symbol) for symbol in identifier) for identifier in identifiers]

    def unspell(self, spelled: Sequence[Identifier]) -> list[Identifier]:
        """Invert `spell`: return the identifiers as the scheme made them, for its `extend`."""
        if self.is_text:
            return [(self.tokenizer.read(identifier),) for identifier in spelled]
        symbols = {word: symbol for symbol, word in self.words.items()}
        return [tuple(symbols.get(piece, piece) for piece in identifier) for identifier in spelled]

    def check(
        self, identifiers: Sequence[Identifier], spelled: Sequence[Identifier], names: Sequence[str], prompt: str
    ) -> None:
        """Check that each spelled identifier decodes to its text after a prompt, and that all are distinct.

            for row: decode(prompt ids + ids[row]) == decode(prompt ids) + text[row]  (apart from a leading space)
            with the alphabet "existing" also: encode(decode(ids[row])) == ids[row]

        Args:
            identifiers: the input of `spell`.
            spelled: the output of `spell`.
            names: names of the images, for error messages.
            prompt: rendered chat text up to the identifier.
        Raises:
            IdentifierError: an identifier does not decode to its text. The message shows image, identifier and tokens.
            IdentifierCollision: two spelled identifiers are equal.
        """
        self._check_distinct(spelled, names)
        ids = [[self.tokenizer.symbol_id(piece) for piece in identifier] for identifier in spelled]
        context = self.tokenizer.encode_markup(prompt)
        before = self.tokenizer.decode(context)
        together = self.tokenizer.decode_all([[*context, *row] for row in ids])
        for name, text, row, whole in zip(names, self._texts(identifiers, spelled), ids, together, strict=True):
            read = whole[len(before) :].removeprefix(" ") if whole.startswith(before) else whole
            if read != text:
                raise IdentifierError(
                    f"{name!r} has the identifier {text!r}, but its tokens {row} decode to {read!r} after the "
                    "prompt: this tokenizer drops or changes a part of it. "
                    "Choose the scheme 'structured', or another base model."
                )
        if self.words:
            self._check_retokenised(ids, names)

    def _texts(self, identifiers: Sequence[Identifier], spelled: Sequence[Identifier]) -> list[str]:
        """Return the text of each identifier. Spaces separate words of the vocabulary, but not other symbols."""
        if not self.words:
            return ["".join(identifier) for identifier in identifiers]
        words = {piece: self.tokenizer.read([piece]) for piece in {p for identifier in spelled for p in identifier}}
        return [" ".join(words[piece] for piece in identifier) for identifier in spelled]

    def _check_distinct(self, spelled: Sequence[Identifier], names: Sequence[str]) -> None:
        first: dict[Identifier, str] = {}
        for identifier, name in zip(spelled, names, strict=True):
            if identifier in first:
                raise IdentifierCollision(
                    f"{first[identifier]!r} and {name!r} are both spelled {identifier} by this tokenizer, which cannot "
                    "represent their difference. Choose the scheme 'structured', or another base model."
                )
            first[identifier] = name

    def _check_retokenised(self, ids: Sequence[Sequence[int]], names: Sequence[str]) -> None:
        texts = self.tokenizer.decode_all(ids)
        for name, row, text, again in zip(names, ids, texts, self.tokenizer.encode_texts(texts), strict=True):
            if again != row:
                raise IdentifierError(
                    f"{name!r} has the identifier {text!r} of the tokens {row}, but the tokenizer encodes that text as "
                    f"{again}: it merges words of the identifier. Use the alphabet 'new'."
                )


def spelling_of(scheme: Scheme, tokenizer: IndexTokenizer, alphabet: Alphabet) -> Spelling:
    """Return the spelling of the identifiers of `scheme` in the tokens of `tokenizer`.

    Args:
        tokenizer: of the base model, or of an index with this scheme. Missing symbols are added to a copy.
        alphabet: "new": each new symbol becomes a new token at the end of the vocabulary. "existing": each new symbol
            maps to an existing whole word, and nothing is added. A word stays the same when symbols are appended.
    Raises:
        IdentifierError: the alphabet is unknown, or the vocabulary has too few whole words.
    """
    if alphabet not in ("new", "existing"):
        raise IdentifierError(f"alphabet={alphabet!r} must be 'new' or 'existing'.")
    symbols, is_text = scheme.new_symbols(), scheme.writes == "text"
    if not symbols or alphabet == "new":
        return Spelling(tokenizer.with_symbols(symbols) if symbols else tokenizer, is_text)
    if len(symbols) > len(tokenizer.words):
        raise IdentifierError(
            f"the scheme {scheme.name!r} needs {len(symbols)} symbols, but the vocabulary has {len(tokenizer.words)} "
            "whole words of plain letters. Use the alphabet 'new', or fewer codes per level."
        )
    return Spelling(tokenizer, is_text, dict(zip(symbols, tokenizer.words, strict=False)))
