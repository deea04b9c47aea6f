"""Measure answers end to end on the demo's held-out questions: question, recall, answer, by the same weights.

    python -m integration.recall.answers INDEX [--images 1,3] [--server URL] [--model-weight W] [--json FILE]

INDEX is trained on the demo's images (`genret demo`). Every question goes through LlamaIndex's query engine. Columns:

    recalled    the image of the question is recalled first
    1, 3        the answer is right, from so many recalled images
    swapped     with another image in place of the recalled one, the answer is that of the other image

What is held out: the wording of the question, the color of its image, or both. A "what" question has its answer in its
words, so that only its column `swapped` says something.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

from integration.bench.timing import Report
from llama_index_genret.cli.demo.grounding import Grounding, GroundingRates, answer_cases, grounding_rates, read_cases
from llama_index_genret.cli.demo.run import DATA
from llama_index_genret.cli.models import open_endpoint, open_llm, open_scorer
from llama_index_genret.evaluation.metrics import bootstrap_interval
from llama_index_genret.llamaindex.retriever import GenerativeImageRetriever
from llama_index_genret.store import ScoringChoice, load_index

SPLITS = {"wording": "held-out wordings", "image": "held-out images' colors", "both": "both held out"}


def groups_of(results: Sequence[Grounding]) -> dict[str, list[Grounding]]:
    """Return the results of each split, and of each kind of question in a split that has several."""
    groups = {}
    for split, title in SPLITS.items():
        groups[title] = [result for result in results if result.case.split == split]
        kinds = list(dict.fromkeys(result.case.kind for result in groups[title]))
        for kind in kinds if len(kinds) > 1 else ():
            groups[f"{title}: {kind}"] = [result for result in groups[title] if result.case.kind == kind]
    return {title: group for title, group in groups.items() if group}


def table(rates: Mapping[str, GroundingRates]) -> list[str]:
    """Return the lines of the table."""
    images = list(next(iter(rates.values())).right)
    heads = ["n", "recalled", *(f"{n} image{'s' * (n > 1)}" for n in images), "swapped"]
    lines = [" ".join([f"{'':32}", *(f"{head:>9}" for head in heads)])]
    for title, row in rates.items():
        shares = [row.recalled, *(row.right[n] for n in images), row.follows]
        lines.append(" ".join([f"{title:32}", f"{row.n:9}", *(f"{share:9.3f}" for share in shares)]))
    return lines


def recorded(results: Sequence[Grounding]) -> dict[str, object]:
    """Return rates and 95 % intervals as JSON. Questions about one image are drawn together."""
    images = [result.case.record.image_id for result in results]
    values = {"recalled": [r.recalled for r in results], "swapped": [r.follows for r in results]}
    values |= {f"right_{n}": [r.right[n] for r in results] for n in results[0].right}
    intervals = {name: bootstrap_interval(list(map(float, value)), images) for name, value in values.items()}
    return {**asdict(grounding_rates(results)), "intervals": intervals}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("--images", default="1,3", help="numbers of recalled images that the model sees")
    parser.add_argument("--server", help="address of `genret serve` with the index, up to /v1 (default: this process)")
    parser.add_argument("--model", help="the base model, if it has moved")
    parser.add_argument("--model-weight", type=float, help="share of the model in the recall (default: the index's)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=int, help="number of questions of each split (default: all)")
    parser.add_argument("--json", type=Path, help="file to add the results to")
    options = parser.parse_args(argv)
    images = [int(n) for n in options.images.split(",")]
    index, choice = load_index(options.index), ScoringChoice(model_weight=options.model_weight)
    where = options.server, "EMPTY", options.model, options.device
    scorer = open_scorer(index, *where, index.scoring(choice))
    endpoint = open_endpoint(index, scorer) if options.server else None
    retriever = GenerativeImageRetriever(index, scorer, similarity_top_k=max(images), scoring=choice, endpoint=endpoint)
    cases = read_cases(DATA / "grounding.jsonl", index.records)
    chosen = [case for split in SPLITS for case in [c for c in cases if c.split == split][: options.limit]]
    report = Report("answers", seed=0)
    bar = partial(tqdm, desc="Answering", file=sys.stderr)
    results = answer_cases(retriever, open_llm(index, scorer, *where), chosen, images=images, progress=bar)
    groups = groups_of(results)
    report.results.update({title: recorded(group) for title, group in groups.items()})
    print("\n".join(table({title: grounding_rates(group) for title, group in groups.items()})))
    report.write(options.json)


if __name__ == "__main__":
    main()
