"""The recall of an index before any training, beside the encoder's nearest images and two text indexes.

    python -m integration.recall.untrained [--corpora FOLDER] [--scheme NAME ...] [--sets NAME,...] [--validation]

An index of each corpus is made with all-MiniLM-L6-v2. The base model is not trained and scores nothing: all recall is
the encoder's. `= encoder` is the share of queries whose ten images have the ten highest cosines, within 1e-6. The last
section has the costs (`integration.bench.encoder_bench`).
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from integration.base_model import Recipe, make_base_model
from integration.base_model import default_folder as default_model_folder
from integration.bench import encoder_bench
from integration.recall.corpora import default_folder, make_corpora
from integration.recall.generative import recall_queries
from integration.recall.peers import minilm_folder
from integration.recall.query_sets import QUERY_SETS, RECALLS
from llama_index_genret.corpus import read_corpus
from llama_index_genret.evaluation.baselines import baseline, evaluation_by_score
from llama_index_genret.evaluation.evaluate import DEPTH, Evaluation
from llama_index_genret.models.encoder import CallableEncoder, load_encoder
from llama_index_genret.models.mllm import Mllm, load_mllm
from llama_index_genret.scorers.blend import Blender
from llama_index_genret.search import Mode
from llama_index_genret.store import Index
from llama_index_genret.store.build import build_index
from llama_index_genret.store.queries import EvaluationQuery, read_queries

SCHEMES = ("structured", "atomic")
TIE = 1e-6


class Remembered:
    """Embeds each text once, since several indexes and searches embed the same ones."""

    def __init__(self) -> None:
        self._encoder = load_encoder(str(minilm_folder()))
        self._known: dict[str, NDArray[np.float32]] = {}

    def encoder(self) -> CallableEncoder:
        """Return the encoder for an index."""
        return CallableEncoder(self.embed, name="all-MiniLM-L6-v2")

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return (n, 384) unit vectors."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known |= zip(missing, self._encoder.embed_captions(missing), strict=True)
        return np.stack([self._known[text] for text in texts]) if texts else np.zeros((0, 384), np.float32)


def measure(index: Index, queries: Sequence[EvaluationQuery], encoder: CallableEncoder, name: str) -> None:
    """Print the rows of one scheme on one query set."""
    assert index.vectors is not None
    scorer = Blender(index, encoder).scorer(None, index.scoring())
    cosines = encoder.embed_queries([query.text for query in queries]) @ np.asarray(index.vectors, np.float32).T
    own = evaluation_by_score(cosines, index.records, queries)
    highest = -np.sort(-cosines, axis=1)[:, :DEPTH]
    modes: tuple[Mode, ...] = ("exact", "beam")
    for mode in modes:
        found = recall_queries(index, scorer, queries, mode=mode)
        keys = [[hit.key for hit in hits] for hits in found.hits]
        same = np.mean(
            [
                len(keys[row]) == DEPTH and np.abs(cosines[row, keys[row]] - highest[row]).max() <= TIE
                for row in range(len(queries))
            ]
        )
        evaluation = found.evaluation()
        ratio = evaluation.figures()["recall@10"] / own.figures()["recall@10"]
        show(f"{name}, {mode}", evaluation, f"= encoder: {same:.4f}   recall@10 / encoder: {ratio:.4f}")


def peers(index: Index, queries: Sequence[EvaluationQuery], encoder: CallableEncoder) -> None:
    """Print the encoder's own nearest images, and the text indexes over the captions."""
    assert index.vectors is not None
    asked = encoder.embed_queries([query.text for query in queries])
    joined = encoder.embed_captions([" ".join(record.captions) for record in index.records])
    own = asked @ np.asarray(index.vectors, np.float32).T
    show("encoder, nearest vectors", evaluation_by_score(own, index.records, queries))
    show("MiniLM, joined captions", evaluation_by_score(asked @ joined.T, index.records, queries))
    for name, title in (("bm25", "BM25"), ("tfidf", "TF-IDF")):
        show(title, baseline(name, index.records, queries))


def show(name: str, evaluation: Evaluation, note: str = "") -> None:
    """Print one row."""
    figures = evaluation.figures()
    print(f"  {name:26} {' / '.join(f'{figures[column]:.3f}' for column in RECALLS)}   {note}", flush=True)


def make_index(corpus: str, corpora: Path, scheme: str, mllm: Mllm, encoder: CallableEncoder, work: Path) -> Index:
    """Return an index of one corpus, and print what its images take on disk."""
    index = build_index(
        read_corpus(corpora / corpus), work / f"{corpus}-{scheme}", mllm, encoder=encoder, scheme=scheme
    )
    n, files = len(index.records), index.manifest.files
    whole = sum(entry.size for entry in files.values())
    print(
        f"{corpus}, {scheme}: {n} images, {files['vectors.npy'].size / n:.0f} B an image of vectors, "
        f"{whole / n:.0f} B with everything else, {index.trie.depth} symbols",
        flush=True,
    )
    return index


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, help="folder of integration.recall.corpora (default: made if needed)")
    parser.add_argument("--scheme", nargs="+", default=list(SCHEMES), help="schemes (default: structured atomic)")
    parser.add_argument("--sets", default=",".join(q.name for q in QUERY_SETS), help="names (default: those of texts)")
    parser.add_argument("--validation", action="store_true", help="the validation queries (default: the test queries)")
    parser.add_argument("--no-cost", action="store_true", help="leave out latency and memory")
    args = parser.parse_args(argv)
    corpora, part = args.corpora or make_corpora(default_folder()), "validation" if args.validation else "test"
    remembered = Remembered()
    encoder = remembered.encoder()
    make_base_model(Recipe(), default_model_folder(Recipe()))
    mllm = load_mllm(str(default_model_folder(Recipe())), device="cpu")
    chosen = [q for q in QUERY_SETS if q.name in args.sets.split(",") and not q.shows_images]
    with tempfile.TemporaryDirectory() as work:
        for corpus in dict.fromkeys(q.corpus for q in chosen):
            of_scheme = {name: make_index(corpus, corpora, name, mllm, encoder, Path(work)) for name in args.scheme}
            first = next(iter(of_scheme.values()))
            for query_set in (q for q in chosen if q.corpus == corpus):
                queries = read_queries(corpora / "queries" / f"{query_set.name}-{part}.jsonl", first.records)
                print(f"\n{query_set.name}, {part}: {len(queries)} queries, recall@1 / 5 / 10", flush=True)
                peers(first, queries, encoder)
                for name, index in of_scheme.items():
                    measure(index, queries, encoder, name)
            print()
    if not args.no_cost:
        encoder_bench.main([])


if __name__ == "__main__":
    main()
