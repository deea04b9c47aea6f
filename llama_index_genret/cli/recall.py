"""Commands that recall images for one query, for a question, or for a file of queries."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from llama_index_genret.cli.models import open_endpoint, open_llm, open_offline_scorer, open_scorer
from llama_index_genret.cli.options import (
    ApiKey,
    BaseModel,
    Device,
    Filters,
    IndexDir,
    Json,
    MaxExpansions,
    Offline,
    RerankOption,
    SearchMode,
    Server,
    TopK,
    VllmOption,
    parse_filters,
    parse_options,
)
from llama_index_genret.cli.output import counting_bar, emit, log, new_table
from llama_index_genret.search import SearchOptions
from llama_index_genret.store import ScoringChoice, load_index


def query(
    index_dir: IndexDir,
    text: Annotated[
        str, typer.Argument(help="Text query: a description of the image, or its difference from --image.")
    ] = "",
    image: Annotated[Path | None, typer.Option(help="Image query, alone or with a text.")] = None,
    k: TopK = 5,
    filters: Filters = None,
    mode: SearchMode = "beam",
    max_expansions: MaxExpansions = None,
    rerank: RerankOption = None,
    server: Server = None,
    api_key: ApiKey = "EMPTY",
    model: BaseModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Recall images for a text, for an image, or for both."""
    from llama_index_genret.scorers.base import recall
    from llama_index_genret.scorers.rerank import reranking, with_scoring
    from llama_index_genret.serving.batch import hit_to_json, text_filters
    from llama_index_genret.serving.endpoint.client import RecallQuery

    loaded = load_index(index_dir)
    conditions = text_filters(loaded, parse_filters(filters)) if filters else None
    prompts, tokenizer = loaded.prompts, loaded.tokenizer
    prompt = prompts.for_image(tokenizer, image, text) if image else prompts.for_query(tokenizer, text)
    scoring = loaded.scoring(ScoringChoice(rerank=rerank), image_query=image is not None)
    leaf_filter = loaded.leaf_filter(conditions) if conditions else None
    options = SearchOptions(k=k, mode=mode, max_expansions=max_expansions, leaf_filter=leaf_filter)
    endpoint = open_endpoint(loaded, server, api_key) if server else None
    ranking = endpoint.recall(RecallQuery(text, prompt, options, conditions, scoring)) if endpoint else None
    if ranking is None:
        scorer = open_scorer(loaded, server, api_key, model, device, scoring)
        options, rerank_best = with_scoring(options, loaded, scoring), reranking(loaded, scoring)
        (ranking,) = recall(scorer, loaded.trie, [prompt], options, rerank=rerank_best)
    table = new_table("image", "caption", "score", "log p", "identifier", title=text)
    rows = []
    for hit in ranking.hits:
        record = loaded.record_of(hit)
        rows.append(hit_to_json(loaded, hit))
        caption = record.captions[0] if record.captions else ""
        table.add_row(record.file_name, caption, f"{hit.score:.4f}", f"{hit.log_prob:.3f}", loaded.identifier_of(hit))
    certificate = {"exact": ranking.exact, "nodes_expanded": ranking.nodes_expanded}
    emit(as_json, {"query": text, "hits": rows, **certificate, "scoring": dataclasses.asdict(scoring)}, table)


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
    """Recall images and answer the question from them with the same model. Print the answer and its sources."""
    from llama_index_genret.llamaindex.query_engine import image_query_engine
    from llama_index_genret.llamaindex.retriever import GenerativeImageRetriever

    loaded = load_index(index_dir)
    if server:
        scorer = None
        retriever = GenerativeImageRetriever.from_server(index_dir, server, api_key=api_key, similarity_top_k=k)
    else:
        scorer = open_scorer(loaded, None, api_key, model, device)
        retriever = GenerativeImageRetriever(loaded, scorer, similarity_top_k=k)
    llm = open_llm(loaded, scorer, server, api_key, model, device)
    engine = image_query_engine(retriever, llm)
    response = engine.query(question)
    sources = [node.node.metadata["image_id"] for node in response.source_nodes]
    table = new_table("answer", "sources", title=question)
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
    emit(as_json, {"query": question, "hits": hits, "answer": str(response), "sources": sources}, table)


def batch(
    index_dir: IndexDir,
    queries: Annotated[
        Path, typer.Argument(metavar="QUERIES.jsonl", help='One {"query": "..."} per line. Other keys are allowed.')
    ],
    out: Annotated[Path, typer.Option(metavar="HITS.jsonl", help="Output file: one line per query, in their order.")],
    k: TopK = 10,
    mode: SearchMode = "beam",
    max_expansions: MaxExpansions = None,
    filters: Filters = None,
    rerank: RerankOption = None,
    server: Server = None,
    offline: Offline = False,
    vllm_option: VllmOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries per search.")] = 32,
    overwrite: Annotated[
        bool, typer.Option(help="Replace HITS.jsonl, or an unfinished run with other options.")
    ] = False,
    api_key: ApiKey = "EMPTY",
    model: BaseModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Recall images for a file of queries. After an interruption, the same command resumes."""
    from llama_index_genret.serving.batch import open_batch

    if offline and (server or model or device != "auto"):
        raise typer.BadParameter("--offline takes no --server, --model or --device: vLLM chooses its own device")
    if vllm_option and not offline:
        raise typer.BadParameter("--vllm-option needs --offline; pass the flags of a server to `genret serve`")
    vllm_options = parse_options("--vllm-option", vllm_option or [])
    loaded, wanted = load_index(index_dir), parse_filters(filters or [])
    kind = "vllm.LLM" if offline else "server" if server else f"transformers on {device}"
    began = time.monotonic()
    options: dict[str, Any] = {"k": k, "mode": mode, "max_expansions": max_expansions, "filters": wanted}
    options |= {"scoring": ScoringChoice(rerank=rerank), "scored_by": kind}
    with open_batch(loaded, queries, out, overwrite=overwrite, **options) as run:
        scorer = (
            open_offline_scorer(loaded, vllm_options)
            if offline
            else open_scorer(loaded, server, api_key, model, device)
        )
        with counting_bar("Recalling", run.total) as progress:
            summary = run.finish(scorer, batch_size=batch_size, progress=progress)
    if summary.refused:
        log.print(f"{summary.refused} queries were refused. Their lines have an error instead of hits", style="yellow")
    figures = {**dataclasses.asdict(summary), "out": str(out), "seconds": round(time.monotonic() - began, 1)}
    table = new_table(*figures)
    table.add_row(*map(str, figures.values()))
    emit(as_json, figures, table)
