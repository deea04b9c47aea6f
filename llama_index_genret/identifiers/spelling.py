"""How the identifiers of a scheme are written in the tokens of one tokenizer, and that it reads them back.

Knows schemes and tokenizers; nothing of models or of the trie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llama_index_genret.errors import IdentifierCollision, IdentifierError
from llama_index_genret.identifiers.base import Identifier, Scheme
from llama_index_genret.models.tokenizer import IndexTokenizer

Alphabet = Literal["new", "existing"]
"""Where a scheme's new symbols come from: tokens added to the tokenizer, or words that its vocabulary has."""


@dataclass(frozen=True, eq=False)
class Spelling:
    """Identifiers of a scheme <-> identifiers of an index, whose symbols are entries of the tokenizer's vocabulary.

    tokenizer: the one of the index, with all symbols.
    is_text: whether the scheme gives texts, which the tokenizer spells.
    words: the vocabulary entry of every new symbol with the alphabet "existing"; empty with "new".
    """

    tokenizer: IndexTokenizer
    is_text: bool
    words: Mapping[str, str] = field(default_factory=dict)

    def spell(self, identifiers: Sequence[Identifier]) -> list[Identifier]:
        """The identifiers as vocabulary entries, one token each."""
        if self.is_text:
            return self.tokenizer.spell(["".join(identifier) for identifier in identifiers])
        return [tuple(self.words.get(symbol, symbol) for symbol in identifier) for identifier in identifiers]

    def unspell(self, spelled: Sequence[Identifier]) -> list[Identifier]:
        """What `spell` was given: the names that the scheme knows, for its `extend`."""
        if self.is_text:
            return [(self.tokenizer.read(identifier),) for identifier in spelled]
        symbols = {word: symbol for symbol, word in self.words.items()}
        return [tuple(symbols.get(piece, piece) for piece in identifier) for identifier in spelled]

    def check(
        self, identifiers: Sequence[Identifier], spelled: Sequence[Identifier], names: Sequence[str], prompt: str
    ) -> None:
        """Hold that each spelled identifier, generated after a prompt, reads as what it stands for, and no two alike.

            for row: decode(prompt ids + ids[row]) == decode(prompt ids) + text[row]  (a leading space apart)
            with words of the vocabulary also: encode(decode(ids[row])) == ids[row]

        Args:
            identifiers, spelled: what `spell` was given, and what it gave.
            names: of the images, for the error. prompt: rendered chat text as it stands before an identifier.
        Raises:
            IdentifierError: names the image, its identifier and the tokens; IdentifierCollision: two are equal.
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
                    f"{name!r} has the identifier {text!r}, but its tokens {row} read {read!r} after the prompt: this "
                    "tokenizer drops or changes a part of it. Choose the scheme 'structured', or another base model."
                )
        if self.words:
            self._check_retokenised(ids, names)

    def _texts(self, identifiers: Sequence[Identifier], spelled: Sequence[Identifier]) -> list[str]:
        """The text that each identifier stands for: words of the vocabulary stand apart, other symbols together."""
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
                    "write what tells them apart. Choose the scheme 'structured', or another base model."
                )
            first[identifier] = name

    def _check_retokenised(self, ids: Sequence[Sequence[int]], names: Sequence[str]) -> None:
        texts = self.tokenizer.decode_all(ids)
        for name, row, text, again in zip(names, ids, texts, self.tokenizer.encode_texts(texts), strict=True):
            if again != row:
                raise IdentifierError(
                    f"{name!r} has the identifier {text!r} of the tokens {row}, but the tokenizer encodes that text as "
                    f"{again}: its words do not stay apart. Use the alphabet 'new'."
                )


def spelling_of(scheme: Scheme, tokenizer: IndexTokenizer, alphabet: Alphabet) -> Spelling:
    """How `scheme` is written by `tokenizer`.

    Args:
        tokenizer: of the base model, or of an index of that scheme; symbols that it lacks are added.
        alphabet: "new": each new symbol becomes a token of its own at the end of the vocabulary. "existing": each
            stands for a whole word that is there, the same one however many symbols follow; nothing is added.
    Raises:
        IdentifierError: the vocabulary has too few whole words.
    """
    if alphabet not in ("new", "existing"):
        raise IdentifierError(f"alphabet={alphabet!r} must be 'new' or 'existing'.")
    symbols, is_text = scheme.new_symbols(), scheme.writes == "text"
    if not symbols or alphabet == "new":
        return Spelling(tokenizer.with_symbols(symbols) if symbols else tokenizer, is_text)
    if len(symbols) > len(tokenizer.words):
        raise IdentifierError(
            f"the scheme {scheme.name!r} needs {len(symbols)} symbols, but the vocabulary has {len(tokenizer.words)} "
            "whole words of plain letters to take. Use the alphabet 'new', or fewer codes per level."
        )
    return Spelling(tokenizer, is_text, dict(zip(symbols, tokenizer.words, strict=False)))
