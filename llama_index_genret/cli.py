"""`genret`: a thin shell over the library. The only module that prints or reads the environment.

Results go to stdout, as tables or, with `--json`, as one machine-readable object; logs and bars go to stderr.
Exit code 0, 1 (failed: one line on stderr) or 2 (usage).
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table

from llama_index_genret.errors import FilterError, GenretError
from llama_index_genret.identifiers import Alphabet, get_scheme
from llama_index_genret.identifiers.diagnostics import Diagnosis, diagnose
from llama_index_genret.store import Index, ScoringChoice, check_free, drop_update, load_index, remove_images

app = typer.Typer(
    help="A multimodal LLM that has memorised your images.", no_args_is_help=True, pretty_exceptions_enable=False
)
log = Console(stderr=True)

TUNED_FIGURES = ("recall@1", "recall@5", "recall@10", "mrr")

DEFAULT_MODEL = "HuggingFaceTB/SmolVLM-256M-Instruct"

VLLM_ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for results
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an engine process of its own outlives this one when it is killed
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # a fork would inherit the threads of torch
}

IndexDir = Annotated[Path, typer.Argument(metavar="INDEX", help="Folder of the index.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Server = Annotated[str | None, typer.Option(help="Address of a vLLM server that serves the index: http://HOST:PORT/v1")]
ApiKey = Annotated[str, typer.Option(envvar="GENRET_API_KEY", help="Of the server.", show_default=False)]
BaseModel = Annotated[str | None, typer.Option("--model", help="The base model, if it has moved.")]
Model = Annotated[str, typer.Option("--model", help="Local folder or hub id of an image-text-to-text model.")]
Filters = Annotated[list[str] | None, typer.Option("--filter", help="key=value; repeat for several, all must hold.")]
SchemeOptions = Annotated[
    list[str] | None,
    typer.Option(help="key=value of the scheme, the value in JSON: levels=3, sizes=[32,16], method=rq."),
]
Offline = Annotated[bool, typer.Option("--offline", help="With vllm.LLM in this process.")]
VllmOption = Annotated[
    list[str] | None,
    typer.Option(help="key=value of vllm.LLM, the value in JSON: tensor_parallel_size=2, max_model_len=4096."),
]
Eta = Annotated[
    float | None,
    typer.Option(help="How much of the images' prior is taken off; as tuned if not given.", show_default=False, min=0),
]
Reranked = Annotated[
    int | None,
    typer.Option(
        help="Best hits ranked anew by log p(query | image); as tuned if not given.", show_default=False, min=0
    ),
]
RerankWeight = Annotated[float | None, typer.Option(help="Of that log p.", show_default=False, min=0)]
RerankedBy = Annotated[
    str | None,
    typer.Option(help="What the model is given of an image: its identifier, or the image.", show_default=False),
]
TopK = Annotated[int, typer.Option("-k", min=1, help="Images wanted.")]


def _bar(label: str) -> Any:
    def progress(items: Iterable[Any]) -> Iterator[Any]:
        yield from track(items, description=label, console=log, transient=True)

    return progress


@contextmanager
def _counting_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that is told how many are done."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=log) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


def _emit(as_json: bool, value: dict[str, Any], table: Table) -> None:
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
    else:
        Console().print(table)


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@app.command()
def index(
    images: Annotated[Path, typer.Argument(help="Folder of images, with metadata.jsonl or without.")],
    out: Annotated[Path, typer.Option(help="Folder of the new index.")],
    scheme: Annotated[str, typer.Option(help="structured, semantic, numeric, string, atomic, or one of your own.")] = (
        "structured"
    ),
    scheme_option: SchemeOptions = None,
    alphabet: Annotated[
        str, typer.Option(help="new: symbols are added to the model. existing: words of its vocabulary stand for them.")
    ] = "new",
    model: Model = DEFAULT_MODEL,
    skip_broken: Annotated[bool, typer.Option(help="Leave broken images out, and list them.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an index that is there, trained weights included.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Name every image of a folder, with the model's own vision tower."""
    from llama_index_genret.corpus import read_corpus
    from llama_index_genret.indexing import build_index
    from llama_index_genret.modeling import load_mllm

    check_free(out, overwrite=overwrite)
    options = _parse_options("--scheme-option", scheme_option or [])
    if alphabet not in get_args(Alphabet):
        raise typer.BadParameter(f"--alphabet is one of {', '.join(get_args(Alphabet))}, not {alphabet!r}")
    get_scheme(scheme, **options)
    corpus = read_corpus(images, skip_broken=skip_broken, progress=_bar("Reading"))
    for skipped in corpus.skipped:
        log.print(f"left out: {skipped}", style="yellow", markup=False)
    mllm = load_mllm(model, device=device)
    built = build_index(
        corpus,
        out,
        mllm,
        scheme=scheme,
        scheme_options=options,
        alphabet=cast(Alphabet, alphabet),
        overwrite=overwrite,
        progress=_bar("Encoding"),
    )
    _emit(as_json, {**_facts(built), "skipped": len(corpus.skipped)}, _facts_table(built))


@app.command()
def write_queries(
    index_dir: IndexDir,
    per_image: Annotated[int, typer.Option(min=1, help="Queries that an image should have, its captions counted.")] = 8,
    style: Annotated[
        Path | None, typer.Option(help="Queries of users, whose style is taken: one a line, or QUERIES.jsonl.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.05, max=2.0)] = 0.8,
    seed: int = 0,
    server: Annotated[
        str | None, typer.Option(help="Address of a vLLM server of the base model: http://HOST:PORT/v1")
    ] = None,
    offline: Offline = False,
    vllm_option: VllmOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that the model looks at together.")] = 8,
    overwrite: Annotated[bool, typer.Option(help="Write for all images anew.")] = False,
    api_key: ApiKey = "EMPTY",
    model: Annotated[
        str | None, typer.Option("--model", help="The base model, if it has moved; with --server, its served name.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Let the base model write queries of images with few captions, to train on. Killed, the same command goes on.

    Images that have theirs are left alone. What is written is no caption: `genret eval` compares without it.
    """
    from llama_index_genret.pseudo_queries import WriteOptions, open_writing, read_samples

    if offline and (server or device != "auto"):
        raise typer.BadParameter("--offline takes no --server or --device: vLLM runs where it was built for")
    if vllm_option and not offline:
        raise typer.BadParameter("--vllm-option is for --offline; a server has its own flags")
    vllm_options = _parse_options("--vllm-option", vllm_option or [])
    loaded, samples = load_index(index_dir), read_samples(style) if style else ()

    def writer() -> Any:
        if server:
            from llama_index_genret.pseudo_queries.server import ServerWriter

            return ServerWriter(server, model=model, api_key=api_key)
        if offline:
            _prepare_vllm()
            from llama_index_genret.pseudo_queries.offline import OfflineWriter

            return OfflineWriter.load(loaded, base=model, **vllm_options)
        from llama_index_genret.modeling import load_base
        from llama_index_genret.pseudo_queries.in_process import InProcessWriter

        return InProcessWriter(loaded, load_base(loaded, device=device, base=model))

    kind = "vllm.LLM" if offline else "server" if server else f"transformers on {device}"
    options = WriteOptions(
        per_image=per_image, temperature=temperature, seed=seed, batch_size=batch_size, overwrite=overwrite
    )
    with (
        open_writing(loaded, options, samples=samples, written_by=kind) as run,
        _counting_bar("Writing", len(run.records)) as progress,
    ):
        summary = run.finish(writer, progress=progress)
    if summary.short:
        log.print(_shortfall(summary), style="yellow")
    figures = {**dataclasses.asdict(summary), "pseudo_queries": _n_pseudo_queries(load_index(index_dir))}
    table = _table(*figures)
    table.add_row(*map(str, figures.values()))
    _emit(as_json, figures, table)


@app.command()
def train(
    index_dir: IndexDir,
    update: Annotated[
        bool,
        typer.Option("--update", help="Learn the images added since, in an adapter on top; old ones are replayed."),
    ] = False,
    drop: Annotated[
        bool, typer.Option("--drop-update", help="Go back to the weights before the update; trains nothing.")
    ] = False,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the captions, in an update over those of the new images.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples a step, over all processes.")] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Parts in which a step is computed.")] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Less memory: compute activations again.")] = False,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the LoRA matrices; 0.002 suits 0.1 B parameters, less suits larger models.")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1)] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Train only so many of the last layers.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Text encoder to imitate on any query: a folder or hub id of sentence-transformers."),
    ] = None,
    imitate: Annotated[
        Path | None, typer.Option(help="More queries to imitate it on, one a line.", exists=True, dir_okay=False)
    ] = None,
    symbol_start: Annotated[str | None, typer.Option(help="Where new symbols start: images, teacher or noise.")] = None,
    mix: Annotated[str | None, typer.Option(help="Examples of each task, as retrieve=8,memorise=3,answer=8.")] = None,
    seed: int = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Teach the model the index's identifiers. Killed, the same command goes on from its last checkpoint.

    Several processes, as many GPUs: accelerate launch --num_processes 4 -m llama_index_genret.cli train INDEX
    """
    if epochs is not None and max_steps is not None:
        raise typer.BadParameter("give --epochs or --max-steps, not both")
    given: dict[str, Any] = {"epochs": epochs, "max_steps": max_steps, "batch_size": batch_size}
    given |= {"accumulate": accumulate, "recompute": recompute or None}
    given |= {"learning_rate": learning_rate, "lora_rank": lora_rank, "layers": layers}
    given |= {"teacher": teacher, "symbol_start": symbol_start, "mix": mix, "imitated": imitate}
    given = {name: value for name, value in given.items() if value is not None}
    if drop and (update or given):
        raise typer.BadParameter("--drop-update trains nothing: give it alone")
    if drop:
        trained = drop_update(load_index(index_dir))
    else:
        trained = _trained(load_index(index_dir), given | {"seed": seed}, update=update, device=device)
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        _emit(as_json, _facts(trained), _facts_table(trained))


def _trained(loaded: Index, given: dict[str, Any], *, update: bool, device: str) -> Index:
    from llama_index_genret.training.examples import read_mix
    from llama_index_genret.training.options import UPDATE_OPTIONS, TrainOptions
    from llama_index_genret.training.recipe import train

    if "mix" in given:
        given["mix"] = read_mix(given["mix"])
    if "imitated" in given:
        given["imitated"] = tuple(given["imitated"].read_text(encoding="utf-8").splitlines())
    options = dataclasses.replace(UPDATE_OPTIONS if update else TrainOptions(), **given)
    return train(loaded, options, update=update, device=device)


@app.command()
def add(
    index_dir: IndexDir,
    images: Annotated[Path, typer.Argument(help="Folder of images; those that the index has already are left alone.")],
    model: BaseModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Add images without training: named by the frozen scheme, they can be found at once."""
    from llama_index_genret.corpus import read_corpus
    from llama_index_genret.indexing import add_to_index, needs_features
    from llama_index_genret.modeling import load_base

    loaded = load_index(index_dir)
    known = {(record.image_id, record.sha256) for record in loaded.records}
    corpus = read_corpus(images, progress=_bar("Reading"))
    new = [record for record in corpus.records if (record.image_id, record.sha256) not in known]
    mllm = load_base(loaded, device=device, base=model) if new and needs_features(loaded) else None
    grown = add_to_index(loaded, new, mllm, progress=_bar("Encoding")) if new else loaded
    other_weights = grown.weights_id != loaded.weights_id
    if other_weights:
        log.print(
            f"the new images have rows of their own: the weights are {grown.weights_id} now. Restart `genret serve`; "
            "a running server goes on without the new images.",
            style="yellow",
            markup=False,
        )
    counts = {"added": len(new), "known": len(corpus) - len(new), "other_weights": other_weights}
    _emit(as_json, {**_facts(grown), **counts}, _facts_table(grown))


@app.command()
def remove(
    index_dir: IndexDir,
    image_ids: Annotated[list[str], typer.Argument(metavar="IMAGE_ID...", help="Of the images; their files stay.")],
    as_json: Json = False,
) -> None:
    """Remove images at once and for good: no search finds them any more."""
    left = remove_images(load_index(index_dir), image_ids)
    _emit(as_json, {**_facts(left), "removed": len(set(image_ids))}, _facts_table(left))


@app.command()
def query(
    index_dir: IndexDir,
    text: Annotated[str, typer.Argument(help="What the image shows, or how it differs from --image.")] = "",
    image: Annotated[Path | None, typer.Option(help="A picture to recall, alone or with a text.")] = None,
    k: TopK = 5,
    filters: Filters = None,
    exact: Annotated[bool, typer.Option(help="Search until the best are certain, instead of with a beam.")] = False,
    eta: Eta = None,
    rerank: Reranked = None,
    rerank_weight: RerankWeight = None,
    rerank_by: RerankedBy = None,
    server: Server = None,
    api_key: ApiKey = "EMPTY",
    model: BaseModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Recall images for a text, for a picture, or for both."""
    from llama_index_genret.endpoint.client import Query
    from llama_index_genret.scorers.base import recall
    from llama_index_genret.scorers.ranked import ranking_options

    loaded = load_index(index_dir)
    conditions = loaded.text_filter(_parse_filters(filters)) if filters else None
    prompts, tokenizer = loaded.prompts, loaded.tokenizer
    prompt = prompts.for_image(tokenizer, image, text) if image else prompts.for_query(tokenizer, text)
    scoring = loaded.scoring(_choice(eta, rerank, rerank_weight, rerank_by), pictured=image is not None)
    scorer, budget = _scorer(loaded, server, api_key, model, device), None if exact else 0
    endpoint = _endpoint(loaded, scorer) if server else None
    ranking = endpoint.recall(Query(text, prompt, k, None, budget, conditions, scoring)) if endpoint else None
    if ranking is None:
        allowed = loaded.leaf_filter(conditions) if conditions else None
        options = ranking_options(loaded, scoring)
        (ranking,) = recall(scorer, loaded.trie, [prompt], k=k, allowed=allowed, budget=budget, **options)
    table = _table("image", "caption", "score", "log p", "identifier", title=text)
    rows = []
    for hit in ranking.hits:
        record = loaded.record_of(hit)
        rows.append(loaded.hit_to_json(hit))
        caption = record.captions[0] if record.captions else ""
        table.add_row(record.file_name, caption, f"{hit.score:.4f}", f"{hit.log_prob:.3f}", loaded.identifier_of(hit))
    certificate = {"exact": ranking.exact, "nodes_expanded": ranking.nodes_expanded}
    _emit(as_json, {"query": text, "hits": rows, **certificate, "scoring": dataclasses.asdict(scoring)}, table)


@app.command()
def ask(
    index_dir: IndexDir,
    question: Annotated[str, typer.Argument(help="A question about your images.")],
    k: TopK = 3,
    server: Server = None,
    api_key: ApiKey = "EMPTY",
    model: BaseModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Recall images, let the same model look at them, and answer; the sources are named."""
    from llama_index_genret.llms import InProcessLLM, genret_llm
    from llama_index_genret.query_engine import image_query_engine
    from llama_index_genret.retriever import GenerativeImageRetriever

    loaded = load_index(index_dir)
    scorer = _scorer(loaded, server, api_key, model, device)
    if server:
        llm: Any = genret_llm(server, model=scorer.served_model(), api_key=api_key)
    else:
        llm = InProcessLLM(scorer.mllm)
    endpoint = _endpoint(loaded, scorer) if server else None
    retriever = GenerativeImageRetriever(loaded, scorer, similarity_top_k=k, endpoint=endpoint)
    engine = image_query_engine(retriever, llm)
    response = engine.query(question)
    sources = [node.node.metadata["image_id"] for node in response.source_nodes]
    table = _table("answer", "sources", title=question)
    table.add_row(str(response), "\n".join(sources))
    hits = []
    for node in response.source_nodes:
        facts = node.node.metadata
        names = {
            "image_id": facts["image_id"],
            "file_name": loaded.records[loaded.rows_by_id[facts["image_id"]]].file_name,
        }
        scores = {"score": node.score or 0.0, "log_prob": facts["genret_log_prob"]}
        hits.append({**names, **scores, "identifier": facts["genret_identifier"]})
    _emit(as_json, {"query": question, "hits": hits, "answer": str(response), "sources": sources}, table)


@app.command(name="eval")
def evaluate_command(
    index_dir: IndexDir,
    queries: Annotated[Path, typer.Argument(metavar="QUERIES.jsonl")],
    server: Server = None,
    baselines: Annotated[str, typer.Option(help="Comma-separated, of: bm25, tfidf.")] = "",
    report: Annotated[Path | None, typer.Option(help="Write one HTML page with the pictures.")] = None,
    eta: Eta = None,
    rerank: Reranked = None,
    rerank_weight: RerankWeight = None,
    rerank_by: RerankedBy = None,
    api_key: ApiKey = "EMPTY",
    model: BaseModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure recall on held-out queries."""
    from llama_index_genret.evaluation import (
        baseline,
        evaluate,
        n_written_by_a_model,
        read_queries,
        write_evaluation_report,
    )

    loaded = load_index(index_dir)
    wanted = read_queries(queries, loaded.records)
    peers = {name: baseline(name, loaded.records, wanted) for name in filter(None, baselines.split(","))}
    seen = n_written_by_a_model(loaded, wanted)
    if seen:
        log.print(f"{seen} of the queries are pseudo-queries of the index, and not held out", style="yellow")
    written = {"pseudo_queries": _n_pseudo_queries(loaded), "queries_among_them": seen}
    scoring = loaded.scoring(_choice(eta, rerank, rerank_weight, rerank_by))
    scorer = _scorer(loaded, server, api_key, model, device)
    evaluation = evaluate(loaded, scorer, wanted, progress=_bar("Recalling"), scoring=scoring)
    figures = {**evaluation.figures(), "scoring": dataclasses.asdict(scoring)}
    table = _table("", "recall@1", "recall@5", "recall@10", "mrr", "ndcg@10", title=f"{figures['n']} queries")
    for name, row in {"generative": figures, **{n: p.figures() for n, p in peers.items()}}.items():
        bounds = {column: " [{:.3f}, {:.3f}]".format(*interval) for column, interval in row["interval"].items()}
        columns = ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10")
        table.add_row(name, *(f"{row[column]:.3f}{bounds.get(column, '')}" for column in columns))
    if report:
        write_evaluation_report(report, loaded, evaluation)
        log.print(f"report: {report}", markup=False)
    _emit(as_json, {**figures, **written, "baselines": {name: peer.figures() for name, peer in peers.items()}}, table)


@app.command()
def tune(
    index_dir: IndexDir,
    queries: Annotated[Path | None, typer.Argument(metavar="VALIDATION.jsonl", help="As of `genret eval`.")] = None,
    rerank: Annotated[
        int, typer.Option(min=0, help="Try to rank so many of the best anew, by log p(query | image).")
    ] = 0,
    rerank_by: RerankedBy = None,
    server: Server = None,
    api_key: ApiKey = "EMPTY",
    model: BaseModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compute the prior of the images, and choose on held-out queries how much of it is taken off their scores."""
    from llama_index_genret.evaluation import read_queries
    from llama_index_genret.tuning import tune

    loaded = load_index(index_dir)
    by = loaded.scoring(_choice(rerank_by=rerank_by)).rerank_by
    wanted = read_queries(queries, loaded.records) if queries else []
    scorer = _scorer(loaded, server, api_key, model, device)
    tuned, trials = tune(loaded, scorer, wanted, rerank=rerank, rerank_by=by, progress=_bar("Tuning"))
    chosen = tuned.scoring()
    table = _table("eta", "rerank weight", *TUNED_FIGURES, title=f"{len(wanted)} queries; chosen: {chosen}")
    best_last = sorted(trials, key=lambda trial: (trial.figures["mrr"], -trial.scoring.rerank_weight))
    best = {trial.scoring.eta: trial for trial in best_last}
    for trial in (best[eta] for eta in sorted(best)):
        weights = (f"{trial.scoring.eta:g}", f"{trial.scoring.rerank_weight:g}" if rerank else "")
        table.add_row(*weights, *(f"{trial.figures[name]:.3f}" for name in TUNED_FIGURES))
    value = {"index": str(tuned.folder), "n": len(wanted), "scoring": dataclasses.asdict(chosen)}
    _emit(as_json, {**value, "trials": [trial.to_json() for trial in trials]}, table)


@app.command()
def batch(
    index_dir: IndexDir,
    queries: Annotated[Path, typer.Argument(metavar="QUERIES.jsonl", help='{"query": "..."} a line, and any keys.')],
    out: Annotated[Path, typer.Option(metavar="HITS.jsonl", help="One line for each query, in their order.")],
    k: TopK = 10,
    exact: Annotated[bool, typer.Option(help="Search until the best are certain, instead of with a beam.")] = False,
    filters: Filters = None,
    eta: Eta = None,
    rerank: Reranked = None,
    rerank_weight: RerankWeight = None,
    rerank_by: RerankedBy = None,
    server: Server = None,
    offline: Offline = False,
    vllm_option: VllmOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries in one search.")] = 32,
    overwrite: Annotated[bool, typer.Option(help="Replace HITS.jsonl, or an unfinished run of other options.")] = False,
    api_key: ApiKey = "EMPTY",
    model: BaseModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Recall images for a whole file of queries. Killed, the same command goes on where it stopped."""
    from llama_index_genret.batch import open_batch

    if offline and (server or model or device != "auto"):
        raise typer.BadParameter("--offline takes no --server, --model or --device: vLLM runs where it was built for")
    if vllm_option and not offline:
        raise typer.BadParameter("--vllm-option is for --offline; a server has its own flags")
    vllm_options = _parse_options("--vllm-option", vllm_option or [])
    loaded, wanted = load_index(index_dir), _parse_filters(filters or [])
    kind = "vllm.LLM" if offline else "server" if server else f"transformers on {device}"
    began = time.monotonic()
    asked: dict[str, Any] = {"k": k, "exact": exact, "filters": wanted, "scored_by": kind}
    asked["scoring"] = loaded.scoring(_choice(eta, rerank, rerank_weight, rerank_by))
    with open_batch(loaded, queries, out, overwrite=overwrite, **asked) as run:
        scorer = _offline_scorer(loaded, vllm_options) if offline else _scorer(loaded, server, api_key, model, device)
        with _counting_bar("Recalling", run.total) as progress:
            summary = run.finish(scorer, batch_size=batch_size, progress=progress)
    if summary.refused:
        log.print(f"{summary.refused} queries were refused: their lines have an error instead of hits", style="yellow")
    figures = {**dataclasses.asdict(summary), "out": str(out), "seconds": round(time.monotonic() - began, 1)}
    table = _table(*figures)
    table.add_row(*map(str, figures.values()))
    _emit(as_json, figures, table)


@app.command()
def export(
    index_dir: IndexDir,
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Write the trained model, merged, as a checkpoint that plain vLLM serves."""
    from llama_index_genret.export import export_checkpoint

    written = export_checkpoint(load_index(index_dir), out, dtype=dtype)
    table = _table("checkpoint", "serve with")
    table.add_row(str(written), f"vllm serve {written} --max-logprobs -1")
    _emit(as_json, {"checkpoint": str(written)}, table)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    index_dir: IndexDir,
    also: Annotated[list[Path] | None, typer.Option(help="Another index, on the same model; may be repeated.")] = None,
    adapters: Annotated[
        bool,
        typer.Option(
            "--adapters", help="Recall by LoRA adapters, answer by the base model; for `--alphabet existing`."
        ),
    ] = False,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: Annotated[str, typer.Option(help="Of the merged weights: float32 or bfloat16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Serve indexes and their model with vLLM. What stands after `--` goes to vLLM as it is."""
    from llama_index_genret.serving import serve_command, serve_environment

    indexes = [load_index(folder) for folder in (index_dir, *(also or ()))]
    os.environ.update(serve_environment(indexes))
    command = serve_command(indexes, host=host, port=port, dtype=dtype, adapters=adapters, vllm_flags=context.args)
    if as_json:
        print(json.dumps({"api_base": f"http://{host}:{port}/v1", "command": command}), flush=True)
    log.print(" ".join(command), style="dim", markup=False)
    os.execv(command[0], command)


@app.command()
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
        from llama_index_genret.identifiers.tree_picture import draw_tree

        read = {s: loaded.tokenizer.read([s]) for identifier in loaded.identifiers for s in identifier}
        named = [tuple(read[symbol] for symbol in identifier) for identifier in loaded.identifiers]
        draw_tree(named, [record.path for record in loaded.records], tree, title=loaded.folder.resolve().name)
        log.print(f"tree: {tree}", markup=False)
    _emit(as_json, {**_facts(loaded), **diagnosis.to_json()}, _facts_table(loaded))
    if not as_json:
        Console().print(_levels_table(diagnosis))


@app.command()
def demo(
    model: Model = DEFAULT_MODEL,
    vllm: Annotated[bool, typer.Option("--vllm", help="Recall and answer through a vLLM server.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the index and report.html.")] = Path("demo-out"),
    as_json: Json = False,
) -> None:
    """The whole path on the images in the package: index, train, recall, grounded answer, report."""
    from llama_index_genret.demo import figure_rows, run_demo

    result = run_demo(model, out, vllm=vllm, progress=_bar("Encoding"), say=lambda text: log.print(text, markup=False))
    evaluation = result.evaluation
    shown = _table("kind", "query", "recalled images, best first", "")
    for kind in ("caption", "phrasing", "tag"):
        part = evaluation.of_kind(kind)
        for wanted, ranked in list(zip(part.queries, part.ranked, strict=True))[:: max(1, len(part.queries) // 6)][:6]:
            shown.add_row(kind, wanted.text, ", ".join(ranked[:3]), "✓" if ranked[0] in wanted.image_ids else "")
    figures = _table("figure", "value", "note")
    for row in figure_rows(result.figures):
        figures.add_row(*row)
    answer = dataclasses.asdict(result.answer)
    if not as_json:
        Console().print(shown)
        Console().print(f"[bold]{result.answer.question}[/bold]  {result.answer.answer}  ← {answer['sources']}")
    _emit(as_json, {**dataclasses.asdict(result.figures), "answer": answer, "report": str(result.report)}, figures)
    log.print(f"report: {result.report}", markup=False)


def _scorer(loaded: Index, server: str | None, api_key: str, model: str | None, device: str) -> Any:
    """A `VllmScorer` where a server is named, else a `TransformersScorer`."""
    if server:
        from llama_index_genret.scorers.vllm import VllmScorer

        return VllmScorer(server, api_key=api_key, weights_id=loaded.weights_id)
    from llama_index_genret.modeling import load_trained
    from llama_index_genret.scorers.transformers import TransformersScorer

    return TransformersScorer(load_trained(loaded, device=device, base=model))


def _offline_scorer(loaded: Index, options: dict[str, Any]) -> Any:
    """A `VllmOfflineScorer` of the index's trained weights."""
    _prepare_vllm()
    from llama_index_genret.scorers.vllm_offline import VllmOfflineScorer
    from llama_index_genret.serving import served_checkpoint

    return VllmOfflineScorer.load(served_checkpoint(loaded), **options)


def _prepare_vllm() -> None:
    """Ask for a vLLM that suits a command line, unless the environment says otherwise."""
    for variable, value in VLLM_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)


def _shortfall(summary: Any) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary.refused.items())
    return (
        f"{summary.short} of {summary.images} images got fewer queries than asked for, {summary.none} of them none. "
        f"Refused of what the model said: {reasons or 'nothing'}. A larger or trained model writes better ones; "
        "--seed N --overwrite writes others."
    )


def _choice(
    eta: float | None = None,
    rerank: int | None = None,
    rerank_weight: float | None = None,
    rerank_by: str | None = None,
) -> ScoringChoice:
    return ScoringChoice(eta, rerank, rerank_weight, cast(Any, rerank_by))


def _endpoint(loaded: Index, scorer: Any) -> Any:
    """One request instead of one a step, where the server has the endpoint."""
    from llama_index_genret.endpoint.client import RecallClient

    return RecallClient(loaded, scorer.server)


def _parse_filters(filters: list[str]) -> dict[str, str]:
    wanted = {}
    for text in filters:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise FilterError(f"the filter {text!r} must read key=value.")
        wanted[key] = value
    return wanted


def _parse_options(flag: str, options: list[str]) -> dict[str, Any]:
    """`levels=3`, `sizes=[32,16]`; what is no JSON is a text, as in `method=rq`."""
    parsed: dict[str, Any] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not key.isidentifier() or not equals:
            raise typer.BadParameter(f"{flag} {text!r} must read key=value")
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = value
    return parsed


def _levels_table(diagnosis: Diagnosis) -> Table:
    table = _table(
        "level", "images", "nodes", "mean", "max", "seen", "codes", "bits", "of most", title="fan-out and entropy"
    )
    for level, row in enumerate(diagnosis.levels):
        codes = f"{row.codes_used}" + (f" of {row.codes_available}" if row.codes_available else "")
        fan_out = (f"{row.mean_fan_out:.2f}", str(row.max_fan_out), f"{row.random_image_fan_out:.2f}")
        entropy = (f"{row.entropy_bits:.2f}", f"{row.relative_entropy:.0%}")
        table.add_row(str(level), str(row.images), str(row.nodes), *fan_out, codes, *entropy)
    return table


def _n_pseudo_queries(loaded: Index) -> int:
    return sum(len(loaded.pseudo_queries_of(record)) for record in loaded.records)


def _facts(loaded: Index) -> dict[str, Any]:
    trie, unseen = loaded.trie.base, loaded.unseen_rows()
    return {
        "index": str(loaded.folder),
        "images": len(loaded.records),
        "scheme": loaded.manifest.scheme,
        "scheme_options": loaded.manifest.scheme_options,
        "alphabet": loaded.manifest.alphabet,
        "identifier_length": trie.depth,
        "nodes_per_level": list(trie.level_sizes),
        "mean_fan_out_per_level": [
            round(below / above, 2) for above, below in zip((1, *trie.level_sizes), trie.level_sizes, strict=False)
        ],
        "model": loaded.manifest.model.name_or_path,
        "trained": loaded.is_trained,
        "training": loaded.manifest.training,
        "update": loaded.manifest.update,
        "untrained_images": None if unseen is None else len(unseen),
        "captions": sum(len(record.captions) for record in loaded.records),
        "pseudo_queries": _n_pseudo_queries(loaded),
        "tuned": loaded.manifest.tuned and loaded.manifest.tuned.model_dump(),
        "missing_images": [r.file_name for r in loaded.records if not r.path.is_file()],
    }


def _facts_table(loaded: Index) -> Table:
    table = _table("", "")
    for key, value in _facts(loaded).items():
        table.add_row(key.replace("_", " "), str(value))
    return table


def main() -> NoReturn:
    """Entry point: turns errors of ours into one line on stderr and exit code 1."""
    try:
        app(standalone_mode=True)
    except GenretError as error:
        log.print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
