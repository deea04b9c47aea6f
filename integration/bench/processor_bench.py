"""Times `TrieLogitsProcessor` against Hugging Face's own constraint over a trie of nested dicts.

    python -m integration.bench.processor_bench [--rows 10 640] [--identifiers 1000000] [--json FILE]

One thread. A round is the steps of one generation: at step t every row has t tokens of a random identifier. The
peers' masks are asserted to be equal before anything is timed.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

from integration.bench.timing import SEED, interleaved, machine, options, report, write
from llama_index_genret.huggingface import TrieLogitsProcessor
from llama_index_genret.trie import build_trie
from tests.test_trie import hierarchical_identifiers

VOCABULARY, PROMPT_LENGTH, END, LEVELS, SYMBOLS = 152_000, 32, 2, 4, 256
OURS, THEIRS = "TrieLogitsProcessor", "PrefixConstrainedLogitsProcessor + dicts"


def dict_trie(identifiers: np.ndarray) -> dict[int, Any]:
    """Nested dicts, the trie of GENRE (arXiv:2010.00904)."""
    root: dict[int, Any] = {}
    for identifier in identifiers.tolist():
        inside = root
        for token_id in identifier:
            inside = inside.setdefault(token_id, {})
    return root


def dict_children(root: dict[int, Any], prompt_length: int, end: int) -> Callable[[int, torch.Tensor], list[int]]:
    """`prefix_allowed_tokens_fn` over nested dicts: walked from the root for every row, as GENRE does."""

    def allowed(_: int, input_ids: torch.Tensor) -> list[int]:
        inside = root
        for token_id in input_ids[prompt_length:].tolist():
            inside = inside.get(token_id, {})
        return list(inside) or [end]

    return allowed


def main() -> None:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 640])
    parser.add_argument("--identifiers", type=int, default=1_000_000)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    print(machine())
    identifiers = hierarchical_identifiers(chosen.identifiers, SEED) + VOCABULARY - LEVELS * SYMBOLS
    identifiers += SYMBOLS * np.arange(LEVELS)
    trie, _ = build_trie(identifiers)
    ours = TrieLogitsProcessor(trie, PROMPT_LENGTH, END)
    theirs = PrefixConstrainedLogitsProcessor(dict_children(dict_trie(identifiers), PROMPT_LENGTH, END), num_beams=1)
    results = {}
    for n_rows in chosen.rows:
        prompts = torch.randint(0, 1_000, (n_rows, PROMPT_LENGTH))
        chosen_ids = np.random.default_rng(SEED).choice(identifiers, n_rows)
        whole = torch.cat([prompts, torch.from_numpy(chosen_ids)], 1)
        scores = torch.randn(n_rows, VOCABULARY)
        times = {}
        for step in range(LEVELS + 1):
            input_ids = whole[:, : PROMPT_LENGTH + step]
            for _ in range(2):
                assert torch.equal(ours(input_ids, scores), theirs(input_ids, scores)), f"step {step}"
            cases = {p: functools.partial(f, input_ids, scores) for p, f in ((OURS, ours), (THEIRS, theirs))}
            times[f"step {step}"] = interleaved(cases, chosen.rounds)
            print(f"{n_rows} rows, {len(identifiers):,} identifiers, vocabulary {VOCABULARY:,}, step {step}:")
            report(times[f"step {step}"], OURS)
        means = {p: float(np.mean([row[p]["median_ms"] for row in times.values()])) for p in (OURS, THEIRS)}
        print(
            f"mean of steps: {means[OURS]:.2f} ms, {means[THEIRS]:.2f} ms: {means[THEIRS] / means[OURS]:.0f} x faster"
        )
        results[f"{n_rows} rows"] = {**times, "ratio": means[THEIRS] / means[OURS]}
    write(chosen.json, results)


if __name__ == "__main__":
    main()
