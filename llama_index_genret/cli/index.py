"""Commands that create an index, add and remove images, and inspect it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.table import Table

from llama_index_genret.cli.models import index_encoder, new_encoder
from llama_index_genret.cli.options import (
    DEFAULT_MODEL,
    BaseModel,
    Device,
    IndexDir,
    Json,
    Model,
    NewEncoder,
    SchemeOptions,
    parse_options,
)
from llama_index_genret.cli.output import bar, console, emit, facts_of, facts_table, log, new_table, visible
from llama_index_genret.identifiers import Alphabet, get_scheme
from llama_index_genret.identifiers.diagnostics import Diagnosis, diagnose
from llama_index_genret.store import check_free, load_index, remove_images


def index(
    images: Annotated[Path, typer.Argument(help="Folder of images, with or without metadata.jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder of the new index.")],
    scheme: Annotated[str, typer.Option(help="structured, semantic, numeric, string, atomic, or a registered one.")] = (
        "structured"
    ),
    scheme_option: SchemeOptions = None,
    encoder: NewEncoder = None,
    alphabet: Annotated[
        str, typer.Option(help="new: add symbols to the vocabulary of the model. existing: use words of it as symbols.")
    ] = "new",
    model: Model = DEFAULT_MODEL,
    skip_broken: Annotated[bool, typer.Option(help="Skip broken images and list them.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing index and its trained weights.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Assign an identifier to every image of a folder. The index recalls at once, by its encoder."""
    from llama_index_genret.corpus import read_corpus
    from llama_index_genret.models.mllm import load_mllm
    from llama_index_genret.store.build import build_index

    check_free(out, overwrite=overwrite)
    options = parse_options("--scheme-option", scheme_option or [])
    if alphabet not in get_args(Alphabet):
        raise typer.BadParameter(f"unknown --alphabet {alphabet!r}; choose from: {', '.join(get_args(Alphabet))}")
    get_scheme(scheme, **options)
    corpus = read_corpus(images, skip_broken=skip_broken, progress=bar("Reading"))
    for skipped in corpus.skipped:
        log.print(visible(f"skipped: {skipped}"), style="yellow")
    mllm = load_mllm(model, device=device)
    built = build_index(
        corpus,
        out,
        mllm,
        encoder=new_encoder(encoder, device),
        scheme=scheme,
        scheme_options=options,
        alphabet=cast(Alphabet, alphabet),
        overwrite=overwrite,
        progress=bar("Encoding"),
    )
    emit(as_json, {**facts_of(built), "skipped": len(corpus.skipped)}, facts_table(built))


def add(
    index_dir: IndexDir,
    images: Annotated[Path, typer.Argument(help="Folder of images. Images that the index already has are skipped.")],
    model: BaseModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Add images without training. The frozen scheme assigns their identifiers.

    Then `genret train --update` trains the model on them.
    """
    from llama_index_genret.corpus import read_corpus
    from llama_index_genret.store.build import add_to_index, needs_features
    from llama_index_genret.store.model_loading import load_base

    loaded = load_index(index_dir)
    known = {(record.image_id, record.sha256) for record in loaded.records}
    corpus = read_corpus(images, progress=bar("Reading"))
    new = [record for record in corpus.records if (record.image_id, record.sha256) not in known]
    mllm = load_base(loaded, device=device, base=model) if new and needs_features(loaded) else None
    encoder = index_encoder(loaded, device) if new else None
    grown = add_to_index(loaded, new, mllm, encoder=encoder, progress=bar("Encoding")) if new else loaded
    other_weights = grown.weights_id != loaded.weights_id
    if other_weights:
        log.print(
            f"the new images have added rows to the weights, which are now {grown.weights_id}. Restart `genret serve`: "
            "a running server does not recall the new images.",
            style="yellow",
        )
    counts = {"added": len(new), "known": len(corpus) - len(new), "other_weights": other_weights}
    emit(as_json, {**facts_of(grown), **counts}, facts_table(grown))


def remove(
    index_dir: IndexDir,
    image_ids: Annotated[
        list[str], typer.Argument(metavar="IMAGE_ID...", help="Ids of the images. Their files are kept.")
    ],
    as_json: Json = False,
) -> None:
    """Remove images permanently. No search finds them any more."""
    left = remove_images(load_index(index_dir), image_ids)
    emit(as_json, {**facts_of(left), "removed": len(set(image_ids))}, facts_table(left))


def inspect(
    index_dir: IndexDir,
    tree: Annotated[Path | None, typer.Option(help="Draw the identifier tree into a PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """Show what an index holds: scheme, sizes, fan-out per level, health."""
    loaded = load_index(index_dir)
    for name in loaded.manifest.files:
        loaded.file(name)
    diagnosis = diagnose(loaded.identifiers, loaded.scheme().codes_per_level())
    if tree:
        from llama_index_genret.identifiers.tree_plot import draw_tree

        text = {s: loaded.tokenizer.read([s]) for identifier in loaded.identifiers for s in identifier}
        identifiers = [tuple(text[symbol] for symbol in identifier) for identifier in loaded.identifiers]
        draw_tree(identifiers, [record.path for record in loaded.records], tree, title=loaded.folder.resolve().name)
        log.print(f"tree: {tree}")
    emit(as_json, {**facts_of(loaded), **diagnosis.to_json()}, facts_table(loaded))
    if not as_json:
        console().print(_levels_table(diagnosis))


def _levels_table(diagnosis: Diagnosis) -> Table:
    table = new_table(
        "level", "images", "nodes", "mean", "max", "seen", "codes", "bits", "of most", title="fan-out and entropy"
    )
    for level, row in enumerate(diagnosis.levels):
        codes = f"{row.codes_used}" + (f" of {row.codes_available}" if row.codes_available else "")
        fan_out = (f"{row.mean_fan_out:.2f}", str(row.max_fan_out), f"{row.random_image_fan_out:.2f}")
        entropy = (f"{row.entropy_bits:.2f}", f"{row.relative_entropy:.0%}")
        table.add_row(str(level), str(row.images), str(row.nodes), *fan_out, codes, *entropy)
    return table
