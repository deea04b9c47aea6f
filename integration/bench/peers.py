"""The alternatives for "which tokens may follow these prefixes?": one class each, with three methods.

`build(corpus)` makes the structure. `stand(prefixes)` puts a matcher on every prefix if a peer needs one. This is not
timed, although beam search pays a fork and an accept for every beam. `allowed(place)` returns each row's token ids, in
any order. The timed step is `gather`: the logits of those tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from integration.bench.corpus import FIRST_TOKEN, LEVELS, SYMBOLS, VOCAB, Corpus, Float32, Int64, vocabulary

Prefixes = Sequence[Sequence[int]]


class Peer(Protocol):
    """One competitor."""

    name: str
    most_identifiers: int

    def build(self, corpus: Corpus) -> None: ...
    def stand(self, prefixes: Prefixes) -> Any: ...
    def allowed(self, place: Any) -> list[Sequence[int] | Int64]: ...


def gather(peer: Peer, place: Any, logits: Float32) -> list[Float32]:
    """Return the logits of every row's allowed tokens."""
    return [row[token_ids] for row, token_ids in zip(logits, peer.allowed(place), strict=True)]


class DictTrie:
    """Nested dicts, walked from the root for every prefix, as GENRE decodes (arXiv:2010.00904)."""

    name, most_identifiers = "dict trie (GENRE)", 1_000_000

    def __init__(self) -> None:
        self.root: dict[int, Any] = {}

    def build(self, corpus: Corpus) -> None:
        for identifier in corpus.token_ids.tolist():
            inside = self.root
            for token_id in identifier:
                if token_id not in inside:
                    inside[token_id] = {}
                inside = inside[token_id]

    def get(self, prefix: Sequence[int]) -> list[int]:
        """Return the tokens that may follow."""
        inside = self.root
        for token_id in prefix:
            inside = inside.get(token_id, {})
        return list(inside)

    def stand(self, prefixes: Prefixes) -> Prefixes:
        return prefixes

    def allowed(self, place: Prefixes) -> list[Sequence[int] | Int64]:
        return [self.get(prefix) for prefix in place]


class MarisaTrie:
    """A succinct trie that has no query for children: it enumerates the subtree, as GENRE does.

    GENRE caches the answers for the root, and so does this class. A symbol is one byte, its densest form.
    """

    name, most_identifiers = "marisa-trie", 1_000_000

    def build(self, corpus: Corpus) -> None:
        import marisa_trie

        self.trie = marisa_trie.BinaryTrie(map(bytes, corpus.codes))
        self.first = sorted(set(corpus.token_ids[:, 0].tolist()))

    def stand(self, prefixes: Prefixes) -> Prefixes:
        return prefixes

    def get(self, prefix: Sequence[int]) -> list[int]:
        """Return the tokens that may follow."""
        depth = len(prefix)
        if depth == 0:
            return self.first
        key = bytes(token_id - FIRST_TOKEN - SYMBOLS * level for level, token_id in enumerate(prefix))
        base = FIRST_TOKEN + SYMBOLS * depth
        return [base + symbol for symbol in {found[depth] for found in self.trie.keys(key)}]

    def allowed(self, place: Prefixes) -> list[Sequence[int] | Int64]:
        return [self.get(prefix) for prefix in place]


def _rules(corpus: Corpus, token: Callable[[int], str]) -> dict[str, list[str]]:
    """Return the identifiers as grammar rules, factored as a trie: rule name -> alternatives."""
    rules: dict[str, list[str]] = {}
    for identifier in corpus.token_ids.tolist():
        rule = "start"
        for depth, token_id in enumerate(identifier):
            last = depth == LEVELS - 1
            deeper = "n" + "_".join(str(t - FIRST_TOKEN) for t in identifier[: depth + 1])
            alternatives = rules.setdefault(rule, [])
            alternative = token(token_id) if last else f"{token(token_id)} {deeper}"
            if not alternatives or alternatives[-1] != alternative:
                alternatives.append(alternative)
            rule = deeper
    return rules


class _Bitmask(ABC):
    """A grammar engine, which answers with a bit per token. Only the identifiers' 1,024 bits are unpacked."""

    name: str

    def __init__(self) -> None:
        self.mask = np.zeros((1, (VOCAB + 31) // 32), np.int32)
        self.bytes = self.mask.view(np.uint8)[0, FIRST_TOKEN // 8 :]

    @abstractmethod
    def fill(self, matcher: Any) -> None:
        """Write the matcher's mask into `mask`."""

    def allowed(self, place: Any) -> list[Sequence[int] | Int64]:
        rows: list[Sequence[int] | Int64] = []
        for matcher, base in place:
            self.fill(matcher)
            level = self.bytes[(base - FIRST_TOKEN) // 8 : (base - FIRST_TOKEN + SYMBOLS) // 8]
            rows.append(np.flatnonzero(np.unpackbits(level, bitorder="little")) + base)
        return rows


class XGrammar(_Bitmask):
    """xgrammar with one `Token(id)` per symbol: text alternatives would admit spellings out of ordinary tokens."""

    name, most_identifiers = "xgrammar", 100_000

    def build(self, corpus: Corpus) -> None:
        import torch
        import xgrammar

        tokenizer = xgrammar.TokenizerInfo(vocabulary(), xgrammar.VocabType.RAW, vocab_size=VOCAB, stop_token_ids=[0])
        rules = _rules(corpus, lambda token_id: f"Token({token_id})")
        text = "\n".join(f"{'root' if name == 'start' else name} ::= {' | '.join(a)}" for name, a in rules.items())
        compiler = xgrammar.GrammarCompiler(tokenizer, max_threads=1, cache_enabled=False)
        self.grammar = compiler.compile_grammar(text)
        self.matcher = xgrammar.GrammarMatcher
        self.tensor = torch.from_numpy(self.mask)

    def stand(self, prefixes: Prefixes) -> list[tuple[Any, int]]:
        place = []
        for prefix in prefixes:
            matcher = self.matcher(self.grammar)
            assert all(matcher.accept_token(token_id) for token_id in prefix)
            place.append((matcher, FIRST_TOKEN + SYMBOLS * len(prefix)))
        return place

    def fill(self, matcher: Any) -> None:
        matcher.fill_next_token_bitmask(self.tensor, 0)


class LLGuidance(_Bitmask):
    """llguidance with one `<[id]>` per symbol. Its grammars end at 65 thousand symbols."""

    name, most_identifiers = "llguidance", 10_000

    def build(self, corpus: Corpus) -> None:
        import llguidance

        class Tokens:
            def __init__(self) -> None:
                self.eos_token_id, self.bos_token_id, self.special_token_ids = 0, None, [0]
                self.tokens = [text.encode() for text in vocabulary()]

            def __call__(self, text: bytes) -> list[int]:
                return []

        self.tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokens()), slices=[])
        rules = _rules(corpus, lambda token_id: f"<[{token_id}]>")
        text = "\n".join(f"{name}: {' | '.join(alternatives)}" for name, alternatives in rules.items())
        self.root = llguidance.LLMatcher(
            self.tokenizer,
            llguidance.LLMatcher.grammar_from_lark(text),
            limits=llguidance.LLParserLimits(max_grammar_size=10_000_000, initial_lexer_fuel=1 << 40),
        )
        if self.root.is_error():
            raise RuntimeError(self.root.get_error())

    def stand(self, prefixes: Prefixes) -> list[tuple[Any, int]]:
        place = []
        for prefix in prefixes:
            matcher = self.root.deep_copy()
            assert matcher.consume_tokens(list(prefix)), matcher.get_error()
            place.append((matcher, FIRST_TOKEN + SYMBOLS * len(prefix)))
        return place

    def fill(self, matcher: Any) -> None:
        import llguidance.numpy

        llguidance.numpy.fill_next_token_bitmask(matcher, self.mask, 0)


class OutlinesCore:
    """outlines_core's automaton over the identifiers' texts; generously, its vocabulary is their 1,024 tokens alone."""

    name, most_identifiers = "outlines-core", 1_000

    def build(self, corpus: Corpus) -> None:
        import outlines_core

        texts = vocabulary()
        tokens = {text: [FIRST_TOKEN + symbol] for symbol, text in enumerate(texts[FIRST_TOKEN:])}
        regex = "|".join("".join(texts[token_id] for token_id in ids) for ids in corpus.token_ids.tolist())
        self.index = outlines_core.Index(regex, outlines_core.Vocabulary(0, tokens))
        self.guide = outlines_core.Guide

    def stand(self, prefixes: Prefixes) -> list[Any]:
        place = []
        for prefix in prefixes:
            guide = self.guide(self.index)
            for token_id in prefix:
                guide.advance(token_id)
            place.append(guide)
        return place

    def allowed(self, place: list[Any]) -> list[Sequence[int] | Int64]:
        return [guide.get_tokens() for guide in place]


PEERS: tuple[Callable[[], Peer], ...] = (DictTrie, MarisaTrie, XGrammar, LLGuidance, OutlinesCore)
