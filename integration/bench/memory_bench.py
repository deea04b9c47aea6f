"""The cost of an index before the first query: bytes per identifier, building, opening from disk."""

from __future__ import annotations

import gc
import pickle
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from integration.bench import ours
from integration.bench.corpus import Corpus
from integration.bench.peers import DictTrie, MarisaTrie
from integration.bench.timing import Report, Time, interleaved, options, stopwatch
from llama_index_genret.trie import Trie, open_trie, save_trie

MOST_IN_DICTS = 1_000_000


def main(argv: Sequence[str] | None = None) -> Report:
    """Measure every size."""
    args = options(__doc__ or "", sizes=(10_000, 100_000, 1_000_000), argv=argv)
    report = Report("memory_bench", args.seed)
    for n in args.sizes:
        report.section(f"{n:,} identifiers")
        corpus = Corpus.sample(n, args.seed)
        with tempfile.TemporaryDirectory() as folder:
            measure(report, corpus, Path(folder), args.rounds)
    report.write(args.json)
    return report


def measure(report: Report, corpus: Corpus, folder: Path, rounds: int) -> None:
    """Measure one size: build in turns, then sizes, then opening in turns."""
    n = len(corpus)
    corpus.token_ids  # noqa: B018  (made before the clock starts)
    build_times(report, corpus, rounds)

    trie, path = ours.build(corpus), folder / "trie.bin"
    save_trie(trie, path)
    assert_opens_equal(trie, path, corpus)
    report.value(f"ours, memory, N={n}", ours.nbytes(trie) / n, "B per identifier")
    report.value(f"ours, disk, N={n}", path.stat().st_size / n, "B per identifier")
    openers = {"ours": lambda _: open_trie(path)}

    marisa = MarisaTrie()
    marisa.build(corpus)
    marisa_path = str(folder / "marisa.bin")
    marisa.trie.save(marisa_path)
    assert type(marisa.trie)().mmap(marisa_path).keys() is not None
    report.value(f"marisa-trie, disk, N={n}", Path(marisa_path).stat().st_size / n, "B per identifier")
    openers["marisa-trie (mmap)"] = lambda _: type(marisa.trie)().mmap(marisa_path)

    if n <= MOST_IN_DICTS:
        nested = DictTrie()
        nested.build(corpus)
        report.value(f"dict trie, memory, N={n}", dict_bytes(nested.root) / n, "B per identifier")
        pickled = folder / "dict.pickle"
        pickled.write_bytes(pickle.dumps(nested.root, pickle.HIGHEST_PROTOCOL))
        report.value(f"dict trie, disk, N={n}", pickled.stat().st_size / n, "B per identifier")
        # GENRE's way to disk; the file is the one written above
        openers["dict trie (pickle)"] = lambda _: pickle.loads(pickled.read_bytes())
    report.times(f"open, N={n}", interleaved(openers, batches=1, rounds=rounds))


def build_times(report: Report, corpus: Corpus, rounds: int) -> None:
    """Time building from sorted token ids in an array. Each candidate may first convert it."""
    builders = {"ours": lambda: ours.build(corpus), "marisa-trie": lambda: MarisaTrie().build(corpus)}
    if len(corpus) <= MOST_IN_DICTS:
        builders["dict trie (GENRE)"] = lambda: DictTrie().build(corpus)
    seconds: dict[str, list[float]] = {name: [] for name in builders}
    for _ in range(rounds):
        for name, build in builders.items():
            seconds[name].append(stopwatch(build))
            gc.collect()
    report.times(f"build from sorted, N={len(corpus)}", {name: Time.of(times) for name, times in seconds.items()})


def assert_opens_equal(trie: Trie, path: Path, corpus: Corpus) -> None:
    """Check that the opened file answers as the saved trie does, and both as the identifiers do."""
    opened = open_trie(path)
    for depth in range(corpus.codes.shape[1]):
        leaves = corpus.leaves(50, depth)
        nodes = ours.nodes_at(opened, corpus.prefixes(leaves, depth))
        for found in (ours.allowed(opened, nodes), ours.allowed(trie, nodes)):
            assert all(map(np.array_equal, found, corpus.allowed(leaves, depth)))


def dict_bytes(root: dict[int, Any]) -> int:
    """Return the bytes of all nested dicts, without the integers in them, which may be shared."""
    total, waiting = 0, [root]
    while waiting:
        inside = waiting.pop()
        total += sys.getsizeof(inside)
        waiting.extend(inside.values())
    return total


if __name__ == "__main__":
    main()
