"""The cost of the encoder in a query: the blend against the model alone, and the encoder's own part at larger sizes.

The model has all 30 layers, as that of the recall table, and the 4 x 256 symbols of `recall_bench`. Identifiers are
synthetic, vectors are random.
Asserted before anything is timed: the images of an exact search by the encoder have the highest cosines.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from integration.base_model import Recipe, default_folder, make_base_model
from integration.bench.corpus import FIRST_TOKEN, LEVELS, SYMBOLS, Corpus
from integration.bench.recall_bench import QUERY, WIDTH, with_symbols
from integration.bench.timing import Report, interleaved, options
from integration.recall.peers import minilm_folder
from integration.recall.train import LAYERS
from llama_index_genret.models.encoder import CallableEncoder, Encoder, load_encoder, unit
from llama_index_genret.models.mllm import load_mllm, render_prompts
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.blend import BlendScorer
from llama_index_genret.scorers.encoder import EncoderScorer
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.store.scoring import DEFAULT_MODEL_WEIGHT, DEFAULT_TEMPERATURE
from llama_index_genret.trie import LiveTrie, build_trie

MOST_LATENCY = 1.15
"""Goal: latency of the blend, as a multiple of the model's alone, at the first size."""

MODEL = Recipe(layers=LAYERS)
BLOCK = 100_000
OPTIONS = SearchOptions(k=WIDTH, width=WIDTH)


def random_vectors(n: int, dimension: int, seed: int) -> NDArray[np.float16]:
    """Return (n, d) random unit vectors, as an index stores them."""
    random, vectors = np.random.default_rng(seed), np.empty((n, dimension), np.float16)
    for start in range(0, n, BLOCK):
        rows = vectors[start : start + BLOCK]
        rows[...] = unit(random.standard_normal(rows.shape, dtype=np.float32))
    return vectors


def shuffled(token_ids: NDArray[np.int64], seed: int) -> LiveTrie:
    """Return a trie whose images are in random order."""
    return LiveTrie(build_trie(token_ids)[0], keys=np.random.default_rng(seed).permutation(len(token_ids)))


def encoder_part(report: Report, n: int, seed: int, encoder: Encoder, rounds: int) -> None:
    """Measure an untrained recall of one query, of which the encoder's vector is known."""
    vectors = random_vectors(n, encoder.dimension, seed)
    (query,) = encoder.embed_queries([QUERY])
    known = CallableEncoder(lambda texts: np.tile(query, (len(texts), 1)))
    times = interleaved({"embedding of the query": lambda _: encoder.embed_queries([QUERY])}, batches=1, rounds=rounds)
    for name, token_ids in (("4 symbols", Corpus.sample(n, seed).token_ids), ("1 symbol", np.arange(n)[:, None])):
        trie = shuffled(token_ids, seed)
        scorer = EncoderScorer(known, trie, vectors, temperature=DEFAULT_TEMPERATURE)
        assert_nearest(scorer, trie, vectors, query)
        tracemalloc.start()
        recall(scorer, trie, [Prompt((1,), query=QUERY)], OPTIONS)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        report.value(f"memory of one query beside the vectors, {name}", peak / 2**20, "MiB")
        ours = {name: lambda _, s=scorer, t=trie: recall(s, t, [Prompt((1,), query=QUERY)], OPTIONS)}
        times |= interleaved(ours, batches=1, rounds=rounds)
    report.value("vectors on disk and, mapped, in memory", vectors.nbytes / 2**20, "MiB")
    report.times(f"encoder's part, N={n}", times, ours="4 symbols")


def assert_nearest(
    scorer: EncoderScorer, trie: LiveTrie, vectors: NDArray[np.float16], query: NDArray[np.float32]
) -> None:
    """Compare an exact search with the definition."""
    prompt = Prompt((1,), query=QUERY)
    (ranking,) = recall(scorer, trie, [prompt], SearchOptions(k=WIDTH, mode="exact"))
    cosines = np.concatenate([vectors[s : s + BLOCK].astype(np.float32) @ query for s in range(0, len(vectors), BLOCK)])
    np.testing.assert_allclose(cosines[[hit.key for hit in ranking.hits]], -np.sort(-cosines)[:WIDTH], atol=1e-6)


def blend(report: Report, n: int, seed: int, encoder: Encoder, rounds: int) -> None:
    """Measure a query in process by the blend and by the model alone.

    Every prefix has the same number of children, so that both score the same number of prefixes.
    """
    make_base_model(MODEL, default_folder(MODEL))
    mllm = with_symbols(load_mllm(str(default_folder(MODEL)), device="cpu"), seed)
    first_token = mllm.model.get_input_embeddings().weight.shape[0] - LEVELS * SYMBOLS
    prompt = render_prompts(mllm).for_query(mllm.tokenizer, QUERY)
    trie = shuffled(Corpus.balanced(n, seed).token_ids + first_token - FIRST_TOKEN, seed)
    model, vectors = TransformersScorer(mllm), random_vectors(trie.n_leaves, encoder.dimension, seed)
    both = BlendScorer(
        model, EncoderScorer(encoder, trie, vectors, temperature=DEFAULT_TEMPERATURE), DEFAULT_MODEL_WEIGHT
    )
    times = interleaved(
        {
            "model alone": lambda _: recall(model, trie, [prompt], OPTIONS),
            "blend": lambda _: recall(both, trie, [prompt], OPTIONS),
        },
        batches=1,
        rounds=rounds,
    )
    ratios = report.times(f"query in process, N={n}", times, ours="model alone")
    report.goal("latency of the blend / of the model alone", ratios["blend"], at_most=MOST_LATENCY)


def main(argv: Sequence[str] | None = None) -> Report:
    """Measure the blend at the first size, and the encoder's part at every size."""
    args = options(__doc__ or "", sizes=(10_000, 1_000_000), argv=argv)
    torch.set_num_threads(1)
    report, encoder = Report("encoder_bench", args.seed), load_encoder(str(minilm_folder()))
    report.section(f"recall of one query, {args.sizes[0]:,} images, width {WIDTH}, CPU time of one thread")
    blend(report, args.sizes[0], args.seed, encoder, args.rounds)
    for n in args.sizes:
        report.section(f"the encoder's part, {n:,} images of {encoder.dimension} dimensions, CPU time of one thread")
        encoder_part(report, n, args.seed, encoder, args.rounds)
    report.write(args.json)
    return report


if __name__ == "__main__":
    main()
