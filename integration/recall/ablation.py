"""What each part of the recipe gives: the emoji, the same steps, one part changed at a time; validation queries only.

python -m integration.recall.ablation [--steps 400] [--only NAME ...] [--json FILE]
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from integration.bench.timing import Report
from integration.recall.corpora import default_folder
from integration.recall.generative import recall_queries
from integration.recall.train import recipe, trained_index
from llama_index_genret.evaluation import read_queries
from llama_index_genret.modeling import load_trained
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.training.recipe import TrainOptions

QUERIES = ("emoji-keywords", "emoji-openmoji-tags")


def variants(steps: int) -> Mapping[str, tuple[str, int, TrainOptions]]:
    """Scheme, layers of the language model, and options of each, by name."""
    base = recipe(steps, layers=None)
    deep = recipe(steps)
    return {
        "as it is, 12 layers": ("atomic", 12, base),
        "30 layers, of which 8 are trained": ("atomic", 30, deep),
        "rows start at image features": ("atomic", 12, replace(base, symbol_start="images")),
        "rows start as noise": ("atomic", 12, replace(base, symbol_start="noise")),
        "no teacher": ("atomic", 12, replace(base, teacher=None, mix={"retrieve": 1})),
        "teacher's temperature 0.02": ("atomic", 12, replace(base, teacher_temperature=0.02)),
        "teacher's temperature 0.1": ("atomic", 12, replace(base, teacher_temperature=0.1)),
        "LoRA of rank 8": ("atomic", 12, replace(base, lora_rank=8)),
        "structured": ("structured", 12, base),
        "semantic": ("semantic", 12, base),
        "numeric": ("numeric", 12, base),
        "string": ("string", 12, base),
    }


def main() -> None:
    """Train and measure each in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report, queries = Report("ablation", 0), default_folder() / "queries"
    for name, (scheme, layers, options) in variants(args.steps).items():
        if args.only and name not in args.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            index = trained_index("emoji", scheme, options, Path(folder) / "index", layers=layers)
            report.section(f"{name}, {args.steps} steps")
            scorer = TransformersScorer(load_trained(index, device="cpu"))
            for asked in QUERIES:
                wanted = read_queries(queries / f"{asked}-validation.jsonl", index.records)
                figures = recall_queries(index, scorer, wanted).evaluation().figures()
                for figure in ("recall@1", "recall@5", "recall@10", "mrr"):
                    report.value(f"{name}: {asked}, {figure}", figures[figure])
        report.write(args.json)


if __name__ == "__main__":
    main()
