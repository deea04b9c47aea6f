"""Commands that make an index, change which images it holds, and show it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.table import Table

from llama_index_genret.cli.options import (
    DEFAULT_MODEL,
    BaseModel,
    Device,
    IndexDir,
    Json,
    Model,
    SchemeOptions,
    parse_options,
)
from llama_index_genret.cli.output import bar, console, emit, facts_of, facts_table, log, new_table, visible
from llama_index_genret.identifiers import Alphabet, get_scheme
from llama_index_genret.identifiers.diagnostics import Diagnosis, diagnose
from llama_index_genret.store import check_free, load_index, remove_images


def index(
    images: Annotated[Path, typer.Argument(help="Folder of images, with metadata.jsonl or without.")],
    out: Annotated[Path, typer.Option(help="Folder of the new index.")],
    scheme: Annotated[str, typer.Option(help="structured, semantic, numeric, string, atomic, or one of your own.")] = (
        "structured"
    ),
    scheme_option: SchemeOptions = None,
    encoder: Annotated[
        str | None, typer.Option(help="Text encoder, by which structured names images by captions, not by looks.")
    ] = None,
    alphabet: Annotated[
        str, typer.Option(help="new: symbols are added to the model. existing: words of its vocabulary stand for them.")
    ] = "new",
    model: Model = DEFAULT_MODEL,
    skip_broken: Annotated[bool, typer.Option(help="Leave broken images out, and list them.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an index that is there, trained weights included.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Name every image of a folder: by its looks to the model's own vision tower, or as the scheme does."""
    from llama_index_genret.corpus import read_corpus
    from llama_index_genret.models.mllm import load_mllm
    from llama_index_genret.store.build import build_index

    check_free(out, overwrite=overwrite)
    options = parse_options("--scheme-option", scheme_option or [])
    if encoder is not None:
        if "encoder" in options:
            raise typer.BadParameter("--encoder and --scheme-option encoder=... say the same: give one of them")
        options["encoder"] = encoder
    if alphabet not in get_args(Alphabet):
        raise typer.BadParameter(f"--alphabet is one of {', '.join(get_args(Alphabet))}, not {alphabet!r}")
    get_scheme(scheme, **options)
    corpus = read_corpus(images, skip_broken=skip_broken, progress=bar("Reading"))
    for skipped in corpus.skipped:
        log.print(visible(f"left out: {skipped}"), style="yellow")
    mllm = load_mllm(model, device=device)
    built = build_index(
        corpus,
        out,
        mllm,
        scheme=scheme,
        scheme_options=options,
        alphabet=cast(Alphabet, alphabet),
        overwrite=overwrite,
        progress=bar("Encoding"),
    )
    emit(as_json, {**facts_of(built), "skipped": len(corpus.skipped)}, facts_table(built))


def add(
    index_dir: IndexDir,
    images: Annotated[Path, typer.Argument(help="Folder of images; those that the index has already are left alone.")],
    model: BaseModel = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Text encoder that places new images by their captions (default: that of the training)."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Add images without training: named by the frozen scheme; `genret train --update` teaches what leads to them."""
    from llama_index_genret.corpus import read_corpus
    from llama_index_genret.store.build import add_to_index, needs_features
    from llama_index_genret.store.model_loading import load_base

    loaded = load_index(index_dir)
    known = {(record.image_id, record.sha256) for record in loaded.records}
    corpus = read_corpus(images, progress=bar("Reading"))
    new = [record for record in corpus.records if (record.image_id, record.sha256) not in known]
    mllm = load_base(loaded, device=device, base=model) if new and needs_features(loaded) else None
    grown = add_to_index(loaded, new, mllm, teacher=teacher, progress=bar("Encoding")) if new else loaded
    other_weights = grown.weights_id != loaded.weights_id
    if other_weights:
        log.print(
            f"the new images have rows of their own: the weights are {grown.weights_id} now. Restart `genret serve`; "
            "a running server goes on without the new images.",
            style="yellow",
        )
    counts = {"added": len(new), "known": len(corpus) - len(new), "other_weights": other_weights}
    emit(as_json, {**facts_of(grown), **counts}, facts_table(grown))


def remove(
    index_dir: IndexDir,
    image_ids: Annotated[list[str], typer.Argument(metavar="IMAGE_ID...", help="Of the images; their files stay.")],
    as_json: Json = False,
) -> None:
    """Remove images at once and for good: no search finds them any more."""
    left = remove_images(load_index(index_dir), image_ids)
    emit(as_json, {**facts_of(left), "removed": len(set(image_ids))}, facts_table(left))


def inspect(
    index_dir: IndexDir,
    tree: Annotated[Path | None, typer.Option(help="Write a picture of the identifier tree, a PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Show what an index holds: scheme, sizes, fan-out per level, health."""
    loaded = load_index(index_dir)
    for name in loaded.manifest.files:
        loaded.file(name)
    diagnosis = diagnose(loaded.identifiers, loaded.scheme().codes_per_level())
    if tree:
        from llama_index_genret.identifiers.tree_plot import draw_tree

        read = {s: loaded.tokenizer.read([s]) for identifier in loaded.identifiers for s in identifier}
        named = [tuple(read[symbol] for symbol in identifier) for identifier in loaded.identifiers]
        draw_tree(named, [record.path for record in loaded.records], tree, title=loaded.folder.resolve().name)
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
