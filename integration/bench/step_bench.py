"""A whole beam step: from the logits (rows, vocabulary) to the next beams. Ours against Hugging Face's own steps.

Theirs: log-softmax over the vocabulary, `PrefixConstrainedLogitsProcessor` over nested dicts, the best of beams x
vocabulary. Ours takes the columns of the level's 256 symbols, as its scorer computes no others of the LM head; over the
vocabulary it takes them out of the whole matrix, and needs one log-sum-exp of every row.
The searches run from the root; steps 2 to 4, where all beams are there, are timed. Both must find the same images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PrefixConstrainedLogitsProcessor

from integration.bench import ours
from integration.bench.corpus import BEAMS, LEVELS, VOCAB, Corpus, Float32, Int64
from integration.bench.peers import DictTrie
from integration.bench.timing import Report, Time, measured, options, stopwatch
from llama_index_genret.trie import Trie

PROMPT = [1] * 32
QUERIES = (1, 64)
Found = list[dict[tuple[int, ...], float]]


@dataclass(frozen=True)
class Model:
    """A scorer whose logits depend on the query and the node alone: rows out of a pool."""

    pool: Float32

    @classmethod
    def random(cls, seed: int) -> Model:
        """Draw 37 rows of random logits."""
        return cls(np.random.default_rng(seed).standard_normal((37, VOCAB), np.float32) * 3)

    def logits(self, query: Int64, node: Int64) -> Float32:
        """Return the (n, VOCAB) logits, a copy."""
        return self.pool[self._rows(query, node)]

    def block(self, query: Int64, node: Int64, alphabet: Int64) -> Float32:
        """Return the (n, alphabet) logits."""
        return self.pool[:, alphabet][self._rows(query, node)]

    def _rows(self, query: Int64, node: Int64) -> Int64:
        return (query * 7919 + node * 104_729) % len(self.pool)


def over_the_vocabulary(search: ours.Search, logits: Float32) -> None:
    """Perform the measured step from the whole matrix."""
    log_sum = torch.logsumexp(torch.from_numpy(logits), -1).numpy()
    search.step(logits.take(search.alphabet, axis=1), log_sum)


def search_ours(trie: Trie, model: Model, n_queries: int, *, over_children: bool) -> tuple[list[float], Found]:
    """Run our search. Returns the seconds of every step, and each query's images with their log-probabilities."""
    search = ours.Search(trie, n_queries, BEAMS, over_children=over_children)
    seconds = []
    while search.hits is None:
        if over_children:
            step = partial(search.step, model.block(search.query, search.node, search.alphabet))
        else:
            step = partial(over_the_vocabulary, search, model.logits(search.query, search.node))
        seconds.append(stopwatch(step))
    return seconds, [{hit.token_ids: hit.log_prob for hit in hits} for hits in search.hits]


def their_step(
    logits: torch.Tensor, scores: torch.Tensor, processed: Callable[[torch.Tensor], torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Perform the measured step.

    Returns scores and flat positions of each query's best, twice the beams as some may end.
    """
    log_probs = torch.log_softmax(logits, -1)
    if processed is not None:
        log_probs = processed(log_probs)
    total = (log_probs + scores.reshape(-1, 1)).reshape(len(scores), -1)
    return tuple(torch.topk(total, 2 * BEAMS))


def search_theirs(
    trie: Trie, nested: DictTrie, model: Model, n_queries: int, *, constrained: bool = True
) -> tuple[list[float], Found]:
    """Run the steps of Hugging Face's beam search. Without the constraint only the time is used."""
    tokens = torch.tensor([PROMPT] * (n_queries * BEAMS))
    scores = torch.full((n_queries, BEAMS), -1e9)
    scores[:, 0] = 0  # the beams of a query start equal, so only one may grow
    processor = PrefixConstrainedLogitsProcessor(lambda _, row: nested.get(row[len(PROMPT) :].tolist()), BEAMS)
    query = np.arange(n_queries).repeat(BEAMS)
    node = np.zeros(len(query), np.int64)
    seconds = []
    for _ in range(LEVELS):
        logits = torch.from_numpy(model.logits(query, node))
        processed = (lambda log_probs, tokens=tokens: processor(tokens, log_probs)) if constrained else None
        took, picked = measured(partial(their_step, logits, scores, processed))
        seconds.append(took)
        scores, flat = (part[:, :BEAMS] for part in picked)
        parent = (torch.arange(n_queries)[:, None] * BEAMS + flat // VOCAB).reshape(-1)
        token = (flat % VOCAB).reshape(-1, 1)
        tokens = torch.cat([tokens[parent], token], 1)
        if constrained:
            node = trie.advance(node[parent.numpy()], token[:, 0].numpy())
    identifiers = tokens[:, len(PROMPT) :].reshape(n_queries, BEAMS, LEVELS).tolist()
    found = [
        dict(zip(map(tuple, rows), log_probs, strict=True))
        for rows, log_probs in zip(identifiers, scores.tolist(), strict=True)
    ]
    return seconds, found


def assert_same_images(mine: Found, theirs: Found) -> None:
    """Compare the images of each query. Where float32 cannot separate two, either may be the last."""
    for query, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert len(a) == len(b) == BEAMS
        assert np.allclose(sorted(a.values()), sorted(b.values()), atol=1e-3), query
        for identifier in a.keys() ^ b.keys():
            log_prob = a.get(identifier, b.get(identifier, 0.0))
            assert abs(log_prob - min(a.values())) < 1e-3, f"query {query}: {identifier} is only in one result"


def main(argv: Sequence[str] | None = None) -> Report:
    """Measure every size, for one query and for 64."""
    args = options(__doc__ or "", sizes=(10_000, 1_000_000), argv=argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch")
    report, model = Report("step_bench", args.seed), Model.random(args.seed)
    for n in args.sizes:
        corpus = Corpus.sample(n, args.seed)
        trie, nested = ours.build(corpus), DictTrie()
        nested.build(corpus)
        for n_queries in QUERIES:
            report.section(f"beam step, {n:,} identifiers, {n_queries} queries x {BEAMS} beams, mean of steps 2-4")
            measure(report, trie, nested, model, n_queries, args.rounds)
    report.write(args.json)
    return report


def measure(report: Report, trie: Trie, nested: DictTrie, model: Model, n_queries: int, rounds: int) -> None:
    """Check that both find the same, then time all in turns, one search a turn."""
    _, mine = search_ours(trie, model, n_queries, over_children=False)
    assert_same_images(mine, search_theirs(trie, nested, model, n_queries)[1])
    candidates: dict[str, Callable[[], list[float]]] = {
        "ours": lambda: search_ours(trie, model, n_queries, over_children=True)[0],
        "ours, over the vocabulary": lambda: search_ours(trie, model, n_queries, over_children=False)[0],
        "Hugging Face, dict trie": lambda: search_theirs(trie, nested, model, n_queries)[0],
        "Hugging Face, no constraint": lambda: search_theirs(trie, nested, model, n_queries, constrained=False)[0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, search in candidates.items():
            repeats = 5 if name == "ours" or n_queries == 1 else 1
            seconds[name].append(float(np.mean([np.mean(search()[1:]) for _ in range(repeats)])))
    times = {name: Time.of(steps) for name, steps in seconds.items()}
    report.times(f"beam step, {n_queries} queries, N={trie.n_leaves}", times)


if __name__ == "__main__":
    main()
