"""Recall with a real model in this process against `generate` of Hugging Face: one query, two threads.

The model is that of `integration.base_model` (91 million weights) with 4 x 256 level symbols of random rows; the
identifiers are synthetic. Asserted before anything is timed: the ten best identifiers of constrained beams and
their log-probabilities are those of `recall` with `Normalise.VOCABULARY`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from integration.base_model import Recipe, default_folder, make_base_model
from integration.bench.corpus import FIRST_TOKEN, LEVELS, SYMBOLS, Corpus
from integration.bench.peers import DictTrie
from integration.bench.timing import Report, interleaved_wall, options
from llama_index_genret.models.mllm import Mllm, load_mllm, render_prompts
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import Hit, Normalise, SearchOptions
from llama_index_genret.search.logits_processor import TrieLogitsProcessor
from llama_index_genret.trie import build_trie

QUERY, WIDTH, THREADS, TOLERANCE = "a dog that runs on the beach", 10, 2, 1e-3
OURS = "ours"
Constraint = Callable[[int, torch.Tensor], list[int]]


def model_with_symbols(seed: int) -> Mllm:
    """Return the base model with its vocabulary extended by the level symbols, which are the last rows."""
    recipe = Recipe()
    make_base_model(recipe, default_folder(recipe))
    return with_symbols(load_mllm(str(default_folder(recipe)), device="cpu"), seed)


def with_symbols(mllm: Mllm, seed: int) -> Mllm:
    """Extend the model in place, and return it."""
    symbols = [f"<g{level}_{code}>" for level in range(LEVELS) for code in range(SYMBOLS)]
    mllm.processor.tokenizer.add_tokens(symbols)
    torch.manual_seed(seed)
    mllm.model.resize_token_embeddings(len(mllm.processor.tokenizer), mean_resizing=False)
    return mllm


@dataclass(frozen=True)
class Peer:
    """Run `generate` over prompts that are padded on the left."""

    mllm: Mllm
    prompts: Sequence[Prompt]

    @property
    def length(self) -> int:
        """Return the number of columns of the padded prompts."""
        return max(len(prompt.token_ids) for prompt in self.prompts)

    def generate(self, **chosen: Any) -> Any:
        """Generate exactly LEVELS new tokens."""
        padding = [self.length - len(prompt.token_ids) for prompt in self.prompts]
        rows = [[0] * n + list(prompt.token_ids) for n, prompt in zip(padding, self.prompts, strict=True)]
        mask = [[0] * n + [1] * (self.length - n) for n in padding]
        return self.mllm.model.generate(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            max_new_tokens=LEVELS,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            **chosen,
        )

    def greedy(self) -> Any:
        """Generate any tokens: the least cost of an answer of this length."""
        return self.generate(min_new_tokens=LEVELS)

    def beams(self, **chosen: Any) -> Any:
        """Generate as many identifiers as recall returns, by beams of the same width.

        With `output_scores`, also their scores.
        """
        return self.generate(num_beams=WIDTH, num_return_sequences=WIDTH, length_penalty=0.0, **chosen)


def assert_same(hits: tuple[Hit, ...], output: Any, prompt: Prompt) -> float:
    """Check that the identifiers and their order are equal. Returns the largest difference of two log-probabilities."""
    found = [tuple(sequence[len(prompt.token_ids) :].tolist()) for sequence in output.sequences]
    assert [hit.token_ids for hit in hits] == found, "other identifiers"
    difference = float(np.abs(np.array([hit.log_prob for hit in hits]) - output.sequences_scores.numpy()).max())
    assert difference < TOLERANCE, f"log-probabilities differ by {difference}"
    return difference


def dict_trie_constraint(corpus: Corpus, first_token: int, start: int) -> Constraint:
    """Return GRACE's `prefix_allowed_tokens_fn`: nested dicts, walked from the root for every beam.

    first_token: the id in this vocabulary of the symbol that the corpus has at FIRST_TOKEN. start: of the answers.
    """
    shift, nested = first_token - FIRST_TOKEN, DictTrie()
    nested.build(corpus)
    return lambda _, row: [token + shift for token in nested.get((row[start:] - shift).tolist())]


def main(argv: Sequence[str] | None = None) -> Report:
    """Check that all candidates find the same, then time them."""
    args = options(__doc__ or "", sizes=(100_000,), argv=argv)
    torch.set_num_threads(THREADS)
    report, mllm = Report("recall_bench", args.seed), model_with_symbols(args.seed)
    vocabulary = mllm.model.get_input_embeddings().weight.shape[0]
    report.value("weights", sum(weight.numel() for weight in mllm.model.parameters()))
    prompt = render_prompts(mllm).for_query(mllm.tokenizer, QUERY)
    report.value("tokens of the prompt", len(prompt.token_ids))
    for n in args.sizes:
        report.section(f"recall of one query, {n:,} identifiers, width {WIDTH}, wall clock, {THREADS} threads")
        measure(report, mllm, prompt, Corpus.sample(n, args.seed), vocabulary - LEVELS * SYMBOLS, args.rounds)
    report.write(args.json)
    return report


def measure(report: Report, mllm: Mllm, prompt: Prompt, corpus: Corpus, first_token: int, rounds: int) -> None:
    """Measure one size. first_token: see `dict_trie_constraint`."""
    trie, _ = build_trie(corpus.token_ids + first_token - FIRST_TOKEN)
    scorer, peer, start = TransformersScorer(mllm), Peer(mllm, [prompt]), len(prompt.token_ids)
    children = dict_trie_constraint(corpus, first_token, start)

    def found(normalise: Normalise) -> tuple[Hit, ...]:
        return recall(scorer, trie, [prompt], SearchOptions(k=WIDTH, width=WIDTH, normalise=normalise))[0].hits

    def with_processor() -> Any:
        return peer.beams(logits_processor=[TrieLogitsProcessor(trie, start, 0)], output_scores=True)

    def with_dict_trie() -> Any:
        return peer.beams(prefix_allowed_tokens_fn=children, output_scores=True)

    difference = assert_same(found(Normalise.VOCABULARY), with_dict_trie(), prompt)
    assert_same(found(Normalise.VOCABULARY), with_processor(), prompt)
    report.value("largest difference of log-probabilities to generate's", difference)
    times = interleaved_wall(
        {
            OURS: lambda: found(Normalise.CHILDREN),
            "ours, over the vocabulary": lambda: found(Normalise.VOCABULARY),
            "generate, greedy, unconstrained": peer.greedy,
            f"generate, {WIDTH} beams, dict trie": with_dict_trie,
            f"generate, {WIDTH} beams, our processor": with_processor,
        },
        rounds=rounds,
    )
    report.times(f"recall, N={trie.n_leaves}", times)


if __name__ == "__main__":
    main()
