"""A dense step: `TrieLogitsProcessor` against Hugging Face's own constraint over a trie of nested dicts.

A round is the steps of one generation: at step t every row has t tokens of a random identifier. It uses one thread.
The two matrices are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from transformers import PrefixConstrainedLogitsProcessor

from integration.bench import ours
from integration.bench.corpus import BEAMS, LEVELS, VOCAB, Corpus
from integration.bench.peers import DictTrie
from integration.bench.timing import Report, interleaved_wall, mean_time, options
from llama_index_genret.search.logits_processor import TrieLogitsProcessor

PROMPT_LENGTH, END = 32, 2
ROWS = (BEAMS, 64 * BEAMS)


def main(argv: Sequence[str] | None = None) -> Report:
    """Measure every size and number of rows."""
    args = options(__doc__ or "", sizes=(1_000_000,), argv=argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    report = Report("processor_bench", args.seed)
    for n in args.sizes:
        report.section(f"dense step, {n:,} identifiers, vocabulary {VOCAB:,}")
        corpus, nested = Corpus.sample(n, args.seed), DictTrie()
        nested.build(corpus)
        mine = TrieLogitsProcessor(ours.build(corpus), PROMPT_LENGTH, END)
        theirs = PrefixConstrainedLogitsProcessor(
            lambda _, row, nested=nested: nested.get(row[PROMPT_LENGTH:].tolist()) or [END], num_beams=1
        )
        for rows in ROWS:
            prompts = torch.randint(0, 1_000, (rows, PROMPT_LENGTH))
            whole = torch.cat([prompts, torch.from_numpy(corpus.token_ids[corpus.leaves(rows, 0)]).long()], 1)
            scores = torch.randn(rows, VOCAB)
            steps = []
            for step in range(LEVELS + 1):
                input_ids = whole[:, : PROMPT_LENGTH + step]
                for _ in range(2):
                    assert torch.equal(mine(input_ids, scores), theirs(input_ids, scores)), f"step {step}"
                steps.append(
                    interleaved_wall(
                        {"ours": partial(mine, input_ids, scores), "Hugging Face": partial(theirs, input_ids, scores)},
                        rounds=args.rounds,
                    )
                )
            times = {name: mean_time([step[name] for step in steps]) for name in steps[0]}
            report.times(f"processor, {rows} rows, N={n}", times)
    report.write(args.json)
    return report


if __name__ == "__main__":
    main()
