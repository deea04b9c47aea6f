"""The one place where the benchmarks call this package: one function or class for each measure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from integration.bench.corpus import Corpus, Float32, Int64
from llama_index_genret.search import Hit, Normalise, SearchOptions, search
from llama_index_genret.trie import LeafFilter, LiveTrie, Nodes, Trie, build_trie


def build(corpus: Corpus) -> Trie:
    """Build the trie from sorted token ids."""
    return build_trie(corpus.token_ids)[0]


def nodes_at(trie: Trie, prefixes: Sequence[Sequence[int]]) -> Int64:
    """Return the nodes of the prefixes, all of one length."""
    nodes = np.zeros(len(prefixes), np.int64)
    for token_ids in zip(*prefixes, strict=True):
        nodes = trie.advance(nodes, np.array(token_ids))
    return nodes


def allowed(trie: Trie, nodes: Int64) -> list[Int64]:
    """Return the tokens that may follow each node."""
    children = trie.children(nodes)
    return np.split(children.token_ids, children.offsets[1:-1])


def values(trie: Trie, nodes: Int64, logits: Float32) -> Float32:
    """Perform the gather step: return the logits of all children of all rows, flat."""
    children = trie.children(nodes)
    return children.gather(columns(logits, children.alphabet))


def columns(logits: Float32, alphabet: np.ndarray) -> Float32:
    """Return the columns of some symbols. Those of a whole level are adjacent."""
    if alphabet[-1] - alphabet[0] == len(alphabet) - 1:
        return np.ascontiguousarray(logits[:, alphabet[0] : alphabet[-1] + 1])
    return logits.take(alphabet, axis=1)


def children_allowed(trie: Trie, nodes: Int64, leaf_filter: LeafFilter) -> np.ndarray:
    """Return for all children of all rows, flat, whether an allowed image is below."""
    live = LiveTrie(trie)
    return live.expand(Nodes(nodes)).allowed(leaf_filter)


def allowed_values(trie: Trie, nodes: Int64, logits: Float32, leaf_filter: LeafFilter) -> Float32:
    """Perform the gather step under a filter: return the logits of the children above an allowed image."""
    return values(trie, nodes, logits)[children_allowed(trie, nodes, leaf_filter)]


def nbytes(trie: Trie) -> int:
    """Return the bytes of the trie's arrays."""
    return sum(array.nbytes for array in trie.arrays().values())


class Search:
    """A search that waits for logits. `query` and `node` identify the rows whose logits the step needs."""

    def __init__(
        self, trie: Trie, n_queries: int, width: int, *, over_children: bool, leaf_filter: LeafFilter | None = None
    ) -> None:
        self.trie = trie
        normalise = Normalise.CHILDREN if over_children else Normalise.VOCABULARY
        self.steps = search(
            trie, SearchOptions(k=width, width=width, normalise=normalise, leaf_filter=leaf_filter), n_queries=n_queries
        )
        self.rows = next(self.steps)
        self.hits: list[tuple[Hit, ...]] | None = None

    @property
    def query(self) -> Int64:
        """Return the (n,) query of every row."""
        return self.rows.query

    @property
    def node(self) -> Int64:
        """Return the (n,) node of every row. Prefixes may differ in length."""
        node = np.zeros(len(self.rows), np.int64)
        for column in self.rows.prefixes.T:
            node = np.where(column >= 0, self.trie.advance(node, column), node)
        return node

    @property
    def alphabet(self) -> np.ndarray:
        """Return the tokens whose logits the step needs, one for each column of `step`'s block."""
        return self.rows.alphabet

    def step(self, block: Float32, log_sum: Float32 | None = None) -> None:
        """Perform the measured step, from the (n, alphabet) logits to the next rows, or to `hits`.

        log_sum: (n,) subtracted from each row, for probabilities over the vocabulary.
        """
        scores = self.rows.gather(block if log_sum is None else block - log_sum[:, None])
        try:
            self.rows = self.steps.send(scores)
        except StopIteration as stop:
            self.hits = [ranking.hits for ranking in stop.value]
