"""The gain of each part of the recipe: the emoji, the same steps, one part changed at a time, validation queries only.

python -m integration.recall.ablation [--steps 60] [--only NAME ...] [--json FILE]
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from integration.bench.timing import Report
from integration.recall.corpora import default_folder
from integration.recall.generative import recall_queries
from integration.recall.train import LAYERS, recipe, trained_index
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.store.model_loading import load_trained
from llama_index_genret.store.queries import read_queries
from llama_index_genret.training.recipe import TrainOptions

TEXTS, PICTURES = ("emoji-keywords", "emoji-openmoji-tags"), ("emoji-images",)
FEW_LAYERS = 12


@dataclass(frozen=True)
class Variant:
    """A recipe, the layers of its language model, and the query sets that measure it."""

    options: TrainOptions
    layers: int = FEW_LAYERS
    query_sets: tuple[str, ...] = TEXTS


def variants(steps: int) -> Mapping[str, Variant]:
    """Return the variants by name: first those for text queries, then those for image queries."""
    base = recipe(steps, layers=None)
    pictures = replace(base, mix={"retrieve": 4, "memorise": 36})
    return {
        "as it is, 12 layers": Variant(base),
        "30 layers, of which 8 are trained": Variant(recipe(steps), layers=LAYERS),
        "no teacher": Variant(replace(base, mix={"retrieve": 1})),
        "teacher's temperature 0.02": Variant(replace(base, teacher_temperature=0.02)),
        "teacher's temperature 0.1": Variant(replace(base, teacher_temperature=0.1)),
        "LoRA of rank 8": Variant(replace(base, lora_rank=8)),
        "pictures as they are": Variant(pictures, query_sets=PICTURES),
        "pictures, and 4 redrawn of each": Variant(replace(pictures, redrawn=4), query_sets=PICTURES),
    }


def main() -> None:
    """Train and measure each in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="*", help="variants to train (default: all)")
    parser.add_argument("--json", type=Path, help="file to add the results to, beside others with as many steps")
    args = parser.parse_args()
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    earlier = known.get("ablation", {}).get("results", {})
    report, queries = Report("ablation", 0), default_folder() / "queries"
    report.results |= earlier if earlier.get("steps") == args.steps else {}
    report.value("steps", args.steps)
    for name, variant in variants(args.steps).items():
        if args.only and name not in args.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            index = trained_index("emoji", "atomic", variant.options, Path(folder) / "index", layers=variant.layers)
            report.section(f"{name}, {args.steps} steps")
            scorer = TransformersScorer(load_trained(index, device="cpu"))
            for query_set in variant.query_sets:
                wanted = read_queries(queries / f"{query_set}-validation.jsonl", index.records)
                figures = recall_queries(index, scorer, wanted).evaluation().figures()
                for figure in ("recall@1", "recall@5", "recall@10", "mrr"):
                    report.value(f"{name}: {query_set}, {figure}", figures[figure])
        report.write(args.json)


if __name__ == "__main__":
    main()
