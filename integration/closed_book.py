"""Measure how much of its images a model knows: closed-book answers beside answers with the image.

    python -m integration.closed_book INDEX [--device cpu] [--model FOLDER] [--server URL] [--limit N] [--json FILE]

INDEX is trained on images with questions of their own, such as those of the demo. With `remember` in the mix their
answers were part of the training, so this measures memory. An answer is right if it has the same words. The last rows
are the figures of a guess that always gives the most frequent answer to a question.
"""

import argparse
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from integration.bench.timing import Report
from llama_index_genret.cli.demo.run import same_answer
from llama_index_genret.evaluation.metrics import bootstrap_interval
from llama_index_genret.scorers.closed_book import ImageMemory
from llama_index_genret.store import Index

WAYS = ("from memory", "seeing", "most frequent answer")


def measured(memory: ImageMemory, limit: int | None = None) -> dict[str, dict[str, list[float]]]:
    """Return, for each way and each question, 1 for every right answer and 0 for every wrong one."""
    index = memory.index
    every = [(record, q) for record in index.records for q in record.questions]
    sample = random.Random(0).sample(every, min(limit or len(every), len(every)))
    usual = usual_answers(index)
    right: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in WAYS}
    for record, q in tqdm(sample, file=sys.stderr, desc="Asking"):
        said = memory.answer_from_memory(record.image_id, q.question)
        answers = (said.from_memory, said.from_image or "", usual[q.question])
        for way, answer in zip(WAYS, answers, strict=True):
            right[way][q.question].append(float(same_answer(answer, q.answer)))
    return {way: dict(of_question) for way, of_question in right.items()}


def usual_answers(index: Index) -> dict[str, str]:
    """Return the most frequent answer to each question."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for record in index.records:
        for q in record.questions:
            answers[q.question][q.answer] += 1
    return {question: count.most_common(1)[0][0] for question, count in answers.items()}


def record(report: Report, right: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Print shares of right answers with 95 % bootstrap intervals, and keep them for the JSON file."""
    for way, of_question in right.items():
        report.section(f"right answers, {way}")
        every = [value for values in of_question.values() for value in values]
        for question, values in {"all questions": every, **of_question}.items():
            low, high = bootstrap_interval(values)
            share = sum(values) / len(values)
            print(f"  {question:40} {share:.3f} [{low:.3f}, {high:.3f}]  n={len(values)}", flush=True)
            report.results[f"{way}: {question}"] = {"right": share, "interval": [low, high], "n": len(values)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("--model", help="the base model, if it has moved")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--server", help="address of a vLLM server with the index, up to /v1")
    parser.add_argument("--limit", type=int, help="number of questions (default: all)")
    parser.add_argument("--json", type=Path, help="file to add the results to")
    options = parser.parse_args(argv)
    if options.server:
        memory = ImageMemory.from_server(options.index, options.server, max_tokens=12)
    else:
        memory = ImageMemory.from_index_dir(options.index, model=options.model, device=options.device, max_tokens=12)
    report = Report("closed book", seed=0)
    record(report, measured(memory, options.limit))
    report.write(options.json)


if __name__ == "__main__":
    main()
