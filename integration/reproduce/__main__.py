"""GRACE's experiment, from the files of Karpathy's split to one table beside the published figures.

    python -m integration.reproduce --dataset flickr30k --json dataset_flickr30k.json --images flickr30k-images \
        --model Qwen/Qwen2.5-VL-3B-Instruct --schemes all --out out [--clip CHECKPOINT] [--pseudo-queries FILE]

For each scheme and protocol: index -> train -> add -> recall; see `runs`. Killed, the same command goes on. The table
lies in OUT/table.md, its figures in OUT/results.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from integration.reproduce.captioner import write_pseudo_queries
from integration.reproduce.clip_peer import clip_rankings
from integration.reproduce.karpathy import HELD_OUT, Karpathy, checked_files, read_karpathy, records_of
from integration.reproduce.protocols import PROTOCOLS, check_options, plan
from integration.reproduce.pseudo_queries import PseudoQueries, read_pseudo_queries
from integration.reproduce.runs import POOLS, Pool, Run, bar, write_whole
from integration.reproduce.table import Measured, markdown, measured
from llama_index_genret.errors import CorpusError, GenretError
from llama_index_genret.training.recipe import TrainOptions

SCHEMES = ("numeric", "string", "semantic", "structured", "atomic")
STEPS = ("index", "train", "recall")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Errors of this package end it with one line and exit code 1."""
    args = _parser().parse_args(arguments)
    try:
        reproduce(args)
    except GenretError as error:
        sys.exit(f"error: {error}")


def reproduce(args: argparse.Namespace) -> list[Measured]:
    """Run all steps that are not done yet, and write the table. Returns the rows in its order."""
    schemes = _chosen("--schemes", args.schemes, SCHEMES)
    protocols = _chosen("--protocols", args.protocols, PROTOCOLS)
    train_options = _train_options(args.train_option)
    scheme_options = _scheme_options(args.scheme_option)
    dataset = read_karpathy(args.json)
    if dataset.name != args.dataset:
        raise CorpusError(f"{args.json} is the dataset {dataset.name!r}, not {args.dataset!r}.")
    check_options(dataclasses.asdict(train_options), dataset)
    _check_settings(args, train_options, scheme_options)
    device = args.device or _device()
    sha256 = _checked(args.out / "images.jsonl", dataset, args.images)
    pseudo = _pseudo_queries(args, dataset, sha256, device)

    queries = dataset.queries(args.split)
    right = [image_id for _, image_id in queries]
    sizes: dict[Pool, int] = {"split": len(dataset.of_split(args.split)), "full": len(dataset.images)}
    labels: dict[Pool, str] = {"split": args.split, "full": "full"}
    rows: list[Measured] = []
    for protocol in protocols:
        for scheme in schemes:
            planned = plan(
                protocol, scheme, dataset, split=args.split, root=args.images.resolve(), sha256=sha256, pseudo=pseudo
            )
            run = Run(
                args.out / scheme / protocol,
                dataset,
                args.images.resolve(),
                scheme,
                planned,
                args.split,
                args.model,
                scheme_options.get(scheme, {}),
                train_options,
                device,
                args.batch_size,
            )
            if args.until == "recall":
                found = run.recall(queries)
                rows += [measured(scheme, protocol, labels[pool], sizes[pool], found[pool], right) for pool in POOLS]
            else:
                run.build() if args.until == "index" else run.train()
    if args.clip and args.until == "recall":
        found = clip_rankings(
            args.clip,
            dataset,
            args.images,
            queries,
            split=args.split,
            out=args.out / "clip",
            device=device,
        )
        name = f"CLIP {Path(args.clip).name}"
        rows += [measured(name, "zero-shot", labels[pool], sizes[pool], found[pool], right) for pool in POOLS]
    if rows:
        _report(args, dataset, pseudo, train_options, rows)
    return rows


def _pseudo_queries(args: argparse.Namespace, dataset: Karpathy, sha256: dict[str, str], device: str) -> PseudoQueries:
    """Return the pseudo-queries of a file, or those that the model itself writes, or none."""
    path = args.pseudo_queries
    if args.write_queries:
        images = args.images.resolve()
        path = write_pseudo_queries(
            args.out / "captioner",
            dataset,
            records_of(dataset.of_split(args.split), images, sha256, {}),
            per_image=args.write_queries,
            images=images,
            model=args.model,
            device=device,
        )
    return read_pseudo_queries(path, dataset, args.split) if path else PseudoQueries({})


def _report(
    args: argparse.Namespace, dataset: Karpathy, pseudo: PseudoQueries, options: TrainOptions, rows: list[Measured]
) -> None:
    n_images, n_queries = len(dataset.of_split(args.split)), len(dataset.queries(args.split))
    notes = [
        f"Model {args.model}; evaluated split {args.split}; options {json.dumps(dataclasses.asdict(options))}.",
        f"Pseudo-queries: {pseudo.per_image(n_images):.1f} for each {args.split} image, trained on in the transductive "
        f"setting only; {pseudo.dropped} dropped, as they said a held-out caption.",
        f"{dataset.shared_wordings(args.split)} of {n_queries} queries are, word for word, also the caption of a train "
        f"image; {dataset.empty_captions} empty captions of train images were left out.",
    ]
    if dataset.of_split("restval"):
        notes.append(f"The {len(dataset.of_split('restval'))} restval images are trained on; GRACE drops them.")
    table = markdown(dataset.name, rows, notes)
    write_whole(args.out / "results.json", json.dumps([row.to_json() for row in rows], indent=1))
    write_whole(args.out / "table.md", table)
    print(table, end="")


def _checked(path: Path, dataset: Karpathy, images: Path) -> dict[str, str]:
    """Return the sha256 of every image. The files are decoded once, in the first run."""
    if not path.exists():
        found = checked_files(dataset.images, images, progress=bar("Reading images"))
        write_whole(path, "".join(json.dumps(pair) + "\n" for pair in found))
    return dict(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def _check_settings(args: argparse.Namespace, options: TrainOptions, scheme_options: dict[str, Any]) -> None:
    """Check that the folder belongs to this experiment. Its steps would be wrong for another.

    Raises:
        CorpusError: OUT is of another experiment. The message lists the differences.
    """
    settings = {
        "dataset": args.dataset,
        "json": _sha256(args.json),
        "images": str(args.images.resolve()),
        "model": args.model,
        "split": args.split,
        "train_options": json.loads(json.dumps(dataclasses.asdict(options))),
        "scheme_options": scheme_options,
        "write_queries": args.write_queries,
        "pseudo_queries": _sha256(args.pseudo_queries) if args.pseudo_queries else None,
    }
    path = args.out / "settings.json"
    if not path.exists():
        write_whole(path, json.dumps(settings, indent=1))
    earlier = json.loads(path.read_text(encoding="utf-8"))
    differing = [key for key in settings if earlier.get(key) != settings[key]]
    if differing:
        raise CorpusError(f"{args.out} is a run with other {', '.join(differing)} ({path}): choose another --out.")


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error


def _train_options(given: Sequence[str]) -> TrainOptions:
    """Parse name=value, with the value in JSON or a text, for any option of the recipe of this version."""
    known = [field.name for field in dataclasses.fields(TrainOptions)]
    options = dict(_parsed("--train-option", text) for text in given)
    if unknown := sorted(options.keys() - set(known)):
        raise CorpusError(f"--train-option {unknown[0]!r} is not known: choose from {', '.join(known)}.")
    return TrainOptions(**options)


def _scheme_options(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parse SCHEME.name=value."""
    options: dict[str, dict[str, Any]] = {}
    for text in given:
        name, value = _parsed("--scheme-option", text)
        scheme, dot, option = name.partition(".")
        if not dot or scheme not in SCHEMES:
            raise CorpusError(f"--scheme-option {text!r} must read SCHEME.name=value, such as structured.method=rq.")
        options.setdefault(scheme, {})[option] = value
    return options


def _parsed(flag: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise CorpusError(f"{flag} {text!r} must read name=value.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _chosen(flag: str, given: str, known: Sequence[Any]) -> list[Any]:
    chosen = list(known) if given == "all" else given.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise CorpusError(f"{flag} {unknown[0]!r} is not known: choose from {', '.join(known)}, or all.")
    return chosen


def _device() -> str:
    """Return the GPU of this process, if it is one of several started by `accelerate launch`."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else "auto"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m integration.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, choices=("flickr30k", "coco"))
    parser.add_argument("--json", required=True, type=Path, help="Karpathy's file of the dataset")
    parser.add_argument("--images", required=True, type=Path, help="folder of the image files")
    parser.add_argument("--model", required=True, help="local folder or hub id of an image-text-to-text model")
    parser.add_argument("--out", required=True, type=Path, help="folder of this experiment; the same folder resumes it")
    parser.add_argument("--schemes", default="all", help=f"all, or of {','.join(SCHEMES)}")
    parser.add_argument("--protocols", default="all", help=f"all, or of {','.join(PROTOCOLS)}")
    parser.add_argument("--split", default="test", choices=HELD_OUT, help="evaluated split; choose options on val")
    queries = parser.add_mutually_exclusive_group()
    queries.add_argument("--pseudo-queries", type=Path, help='{"file_name": "...", "text": [...]} a line')
    queries.add_argument(
        "--write-queries", type=int, metavar="N", help="queries per image that the model itself writes; GRACE: 5"
    )
    parser.add_argument(
        "--train-option", action="append", default=[], metavar="NAME=VALUE", help="an option of the recipe"
    )
    parser.add_argument("--scheme-option", action="append", default=[], metavar="SCHEME.NAME=VALUE")
    parser.add_argument("--clip", help="local folder or hub id of a CLIP checkpoint to measure in the same run")
    parser.add_argument("--until", default="recall", choices=STEPS, help="stop after this step")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--batch-size", type=int, default=32, help="queries in one search")
    return parser


if __name__ == "__main__":
    main()
