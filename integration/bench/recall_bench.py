"""Times recall with a real model in this process against `generate` of Hugging Face, one query, two threads.

    python -m integration.bench.recall_bench [--layers 12] [--identifiers 100000] [--json FILE]

The model is that of `integration.base_model` (91 million weights) with 4 x 256 level symbols of random rows; the
identifiers are synthetic. Asserted before anything is timed: the ten best identifiers of constrained beams and
their log-probabilities are those of `recall` with `Normalise.VOCABULARY`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from integration.base_model import Recipe, default_folder, make_base_model
from integration.bench.processor_bench import LEVELS, SYMBOLS, dict_children, dict_trie
from integration.bench.timing import SEED, interleaved, machine, options, report, write
from llama_index_genret.huggingface import TrieLogitsProcessor
from llama_index_genret.modeling import Mllm, load_mllm, render_prompts
from llama_index_genret.prompts import Prompt
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import Hit, Normalise
from llama_index_genret.trie import build_trie
from tests.test_trie import hierarchical_identifiers

QUERY, WIDTH, THREADS, TOLERANCE = "a dog that runs on the beach", 10, 2, 1e-3
OURS = "recall, children"


def model_with_symbols(layers: int) -> Mllm:
    """The base model, its vocabulary widened by the level symbols; they are the last rows."""
    recipe = Recipe(layers=layers)
    make_base_model(recipe, default_folder(recipe))
    mllm = load_mllm(str(default_folder(recipe)), device="cpu")
    symbols = [f"<g{level}_{code}>" for level in range(LEVELS) for code in range(SYMBOLS)]
    mllm.processor.tokenizer.add_tokens(symbols)
    torch.manual_seed(SEED)
    mllm.model.resize_token_embeddings(len(mllm.processor.tokenizer), mean_resizing=False)
    return mllm


@dataclass(frozen=True)
class Peer:
    """`generate` over one prompt."""

    mllm: Mllm
    prompt: Prompt

    def generate(self, **chosen: Any) -> Any:
        """LEVELS new tokens, neither more nor fewer."""
        input_ids = torch.tensor([self.prompt.token_ids])
        return self.mllm.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=LEVELS,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            **chosen,
        )

    def greedy(self) -> Any:
        """Any tokens: what an answer of this length costs at least."""
        return self.generate(min_new_tokens=LEVELS)

    def beams(self, **constraint: Any) -> Any:
        """As many identifiers as recall gives, by beams of the same width."""
        return self.generate(
            num_beams=WIDTH, num_return_sequences=WIDTH, length_penalty=0.0, output_scores=True, **constraint
        )


def assert_same(hits: list[Hit], output: Any, prompt: Prompt) -> float:
    """The same identifiers in the same order. Returns the largest difference of two log-probabilities."""
    found = [tuple(sequence[len(prompt.token_ids) :].tolist()) for sequence in output.sequences]
    assert [hit.token_ids for hit in hits] == found, "other identifiers"
    difference = float(np.abs(np.array([hit.log_prob for hit in hits]) - output.sequences_scores.numpy()).max())
    assert difference < TOLERANCE, f"log-probabilities differ by {difference}"
    return difference


def main() -> None:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, default=Recipe.layers, help="language layers of the base model")
    parser.add_argument("--identifiers", type=int, default=100_000)
    chosen = parser.parse_args()
    torch.set_num_threads(THREADS)
    mllm = model_with_symbols(chosen.layers)
    vocabulary = mllm.model.get_input_embeddings().weight.shape[0]
    identifiers = hierarchical_identifiers(chosen.identifiers, SEED) + vocabulary - LEVELS * SYMBOLS
    identifiers += SYMBOLS * np.arange(LEVELS)
    trie, _ = build_trie(identifiers)
    prompt = render_prompts(mllm).for_query(mllm.tokenizer, QUERY)
    weights = sum(weight.numel() for weight in mllm.model.parameters())
    print(machine())
    print(f"{weights:,} weights, vocabulary {vocabulary:,}, {trie.n_leaves:,} identifiers")
    print(f"prompt of {len(prompt.token_ids)} tokens, width {WIDTH}")

    scorer, peer, start = TransformersScorer(mllm), Peer(mllm, prompt), len(prompt.token_ids)
    children = dict_children(dict_trie(identifiers), start, 0)

    def ours(normalise: Normalise) -> list[Hit]:
        return recall(scorer, trie, [prompt], k=WIDTH, width=WIDTH, normalise=normalise)[0]

    def with_processor() -> Any:
        return peer.beams(logits_processor=[TrieLogitsProcessor(trie, start, 0)])

    difference = assert_same(ours(Normalise.VOCABULARY), peer.beams(prefix_allowed_tokens_fn=children), prompt)
    assert_same(ours(Normalise.VOCABULARY), with_processor(), prompt)
    print(f"same identifiers, log-probabilities within {difference:.1e}")
    cases = {
        OURS: lambda: ours(Normalise.CHILDREN),
        "recall, vocabulary": lambda: ours(Normalise.VOCABULARY),
        "generate, greedy, unconstrained": peer.greedy,
        f"generate, {WIDTH} beams, dicts": lambda: peer.beams(prefix_allowed_tokens_fn=children),
        f"generate, {WIDTH} beams, TrieLogitsProcessor": with_processor,
    }
    times = interleaved(cases, chosen.rounds)
    report(times, OURS)
    write(chosen.json, {"weights": weights, "identifiers": trie.n_leaves, "difference": difference, "times": times})


if __name__ == "__main__":
    main()
