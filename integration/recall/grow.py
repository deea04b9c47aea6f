"""The effect of adding images to a trained index and of updating it, on the added and on the old images.

    python -m integration.recall.grow --out WORK [--steps 700] [--part validation]

A seed decides which images are held out. An index of the others is trained. The held-out images are added, and an
update trains on them. Queries for the new and for the old images are measured separately at each stage. The peers are
nearest neighbours over the same images: MiniLM of the captions, or the vision tower for image queries. Old images lose
a little as soon as there are more images at all. The loss of a neighbour shows how much.

WORK keeps an index of each stage. After a kill the same command resumes.
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from integration.base_model import Recipe, make_base_model
from integration.base_model import default_folder as default_model_folder
from integration.recall.corpora import default_folder, make_corpora
from integration.recall.generative import recall_queries
from integration.recall.peers import MiniLm, neighbour_scores
from integration.recall.query_sets import QUERY_SETS, RECALLS, QuerySet
from integration.recall.train import LAYERS, TRAINED_LAYERS, recipe
from integration.weights import minilm_folder
from llama_index_genret.corpus import Corpus, Record, read_corpus
from llama_index_genret.evaluation.baselines import evaluation_by_score
from llama_index_genret.evaluation.evaluate import Evaluation
from llama_index_genret.models.encoder import Encoder, load_encoder
from llama_index_genret.models.features import vision_features
from llama_index_genret.models.mllm import Mllm, load_mllm
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.store import Index, load_index
from llama_index_genret.store.build import add_to_index, build_index
from llama_index_genret.store.model_loading import load_trained
from llama_index_genret.store.model_state import has_update
from llama_index_genret.store.queries import EvaluationQuery, read_queries
from llama_index_genret.training.options import TrainOptions
from llama_index_genret.training.recipe import train
from llama_index_genret.training.schedule import update_options

MOST_LOST = 0.01
"""Goal: the recall@5 that old images may lose by the update, from `trained` to `updated`."""


@dataclass(frozen=True)
class Stages:
    """The index after each step, in a folder of its own below `work`. An existing index is reused."""

    work: Path
    mllm: Mllm
    encoder: Encoder | None = None

    def trained(self, corpus: Corpus, scheme: str, options: TrainOptions) -> Index:
        """Return the index of the images that are not held out."""
        folder = self.work / "trained"
        if not (folder / "manifest.json").is_file():
            build_index(corpus, folder, self.mllm, encoder=self.encoder, scheme=scheme)
        index = load_index(folder)
        return index if index.is_trained else train(index, options, encoder=self.encoder, device="cpu")

    def added(self, trained: Index, records: Sequence[Record]) -> Index:
        """Return the index with the new images, before the update."""
        index = self._copied(trained, "added")
        missing = [record for record in records if record.image_id not in index.rows_by_id]
        return add_to_index(index, missing, self.mllm, encoder=self.encoder) if missing else index

    def updated(self, added: Index, options: TrainOptions) -> Index:
        """Return the index with the new images, after the update."""
        index = self._copied(added, "updated")
        if has_update(index):
            return index
        return train(index, options, update=True, encoder=self.encoder, device="cpu")

    def _copied(self, index: Index, name: str) -> Index:
        folder, unfinished = self.work / name, self.work / f".{name}"
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(index.folder, unfinished)
            unfinished.rename(folder)
        return load_index(folder)


def parted(corpus: Corpus, *, hold_out: int, limit: int | None, seed: int) -> tuple[Corpus, list[Record]]:
    """Return the images to train on, and those to add. `limit`: the number of both together."""
    order = np.random.default_rng(seed).permutation(len(corpus.records))[:limit]
    old, new = ([corpus.records[row] for row in sorted(rows)] for rows in (order[hold_out:], order[:hold_out]))
    return dataclasses.replace(corpus, records=old), new


@dataclass
class Neighbours:
    """The results of vector indexes over the same images."""

    mllm: Mllm
    minilm: MiniLm

    def evaluate(
        self, query_set: QuerySet, records: Sequence[Record], queries: Sequence[EvaluationQuery]
    ) -> dict[str, Evaluation]:
        """Evaluate the peers that support these queries, by name."""
        if query_set.shows_images:
            scores = neighbour_scores(lambda paths: vision_features(self.mllm, paths), records, queries)
            return {"vision neighbour": evaluation_by_score(scores, records, queries)}
        return {"MiniLM": evaluation_by_score(self.minilm.scores(records, queries), records, queries)}


def measure(
    query_set: QuerySet, queries: Sequence[EvaluationQuery], stages: Mapping[str, Index], peers: Neighbours
) -> dict[str, dict[str, Any]]:
    """Print figures by stage, age of the images and system, and the loss of the old images."""
    old_ids = stages["trained"].rows_by_id.keys()
    results: dict[str, dict[str, Any]] = {}
    for age in ("new", "old"):
        own = [query for query in queries if (query.image_ids <= old_ids) == (age == "old")]
        for stage, index in stages.items():
            if not own or (stage == "trained" and age == "new"):
                continue  # an image that is not in the index is never found
            scorer = TransformersScorer(load_trained(index, device="cpu"))
            rows = {"generative": recall_queries(index, scorer, own).evaluation()}
            rows |= peers.evaluate(query_set, index.records, own)
            for name, row in rows.items():
                figures = results[f"{age} images, {stage}, {name}"] = row.figures()
                shown = " ".join(f"{figures[column]:.3f}" for column in RECALLS)
                print(
                    f"{query_set.name}: {len(own):5} queries for {age} images, {stage:8} {name:17} {shown}", flush=True
                )
    for name in {key.rpartition(", ")[2] for key in results if key.startswith("old")}:
        before, after = (results[f"old images, {stage}, {name}"]["recall@5"] for stage in ("trained", "updated"))
        results[f"old images lose, {name}"] = {"recall@5": before - after}
        reached = "" if name != "generative" else f", goal < {MOST_LOST}: {before - after < MOST_LOST}"
        print(f"{query_set.name}: old images lose {before - after:+.4f} recall@5, {name}{reached}", flush=True)
    return results


def update_recipe(added: Index, steps: int | None, rate: float) -> TrainOptions:
    """Return the default options of an update with `rate` times its learning rates. steps: replaces their number."""
    options = update_options(added)
    return dataclasses.replace(
        options,
        max_steps=steps or options.max_steps,
        learning_rate=rate * options.learning_rate,
        symbol_learning_rate=rate * options.symbol_learning_rate,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="WORK")
    parser.add_argument("--corpora", type=Path, help="folder of integration.recall.corpora (default: made if needed)")
    parser.add_argument("--corpus", default="emoji", help="emoji, emoji-labels or openclipart")
    parser.add_argument("--scheme", default="atomic")
    parser.add_argument("--hold-out", type=int, default=200, help="images to add")
    parser.add_argument("--limit", type=int, help="number of images, with the held-out ones (default: all)")
    parser.add_argument("--layers", type=int, default=LAYERS, help="number of language layers, 6 to 30")
    parser.add_argument(
        "--trained-layers", type=int, default=TRAINED_LAYERS, help="number of trained layers, the last of them"
    )
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--update-steps", type=int, help="steps of an update (default: those of genret)")
    parser.add_argument("--update-rate", type=float, default=1.0, help="factor on an update's learning rates")
    parser.add_argument("--part", default="test", choices=("validation", "test"), help="part of the queries")
    parser.add_argument("--sets", help="comma-separated names of query sets (default: all of the corpus)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    given = parser.parse_args(argv)
    corpora = given.corpora or make_corpora(default_folder())
    base = default_model_folder(Recipe(layers=given.layers))
    make_base_model(Recipe(layers=given.layers), base)
    mllm = load_mllm(str(base), device="cpu")

    corpus, new = parted(
        read_corpus(corpora / given.corpus), hold_out=given.hold_out, limit=given.limit, seed=given.seed
    )
    options = recipe(given.steps, seed=given.seed, layers=given.trained_layers)
    stages = Stages(given.out, mllm, load_encoder(str(minilm_folder())))
    trained = stages.trained(corpus, given.scheme, options)
    added = stages.added(trained, new)
    updated = stages.updated(added, update_recipe(added, given.update_steps, given.update_rate))
    indexes, peers = {"trained": trained, "added": added, "updated": updated}, Neighbours(mllm, MiniLm())
    results = {}
    names = given.sets.split(",") if given.sets else [query_set.name for query_set in QUERY_SETS]
    for query_set in QUERY_SETS:
        if query_set.corpus == given.corpus and query_set.name in names:
            path = corpora / "queries" / f"{query_set.name}-{given.part}.jsonl"
            queries = read_queries(path, read_corpus(corpora / given.corpus).records)
            queries = [query for query in queries if query.image_ids <= added.rows_by_id.keys()]
            results[query_set.name] = measure(query_set, queries, indexes, peers)
    if given.json:
        given.json.write_text(json.dumps({**vars(given), "results": results}, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
