"""The `genret demo` command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from llama_index_genret.cli.models import new_encoder
from llama_index_genret.cli.options import DEFAULT_MODEL, Json, Model, NewEncoder
from llama_index_genret.cli.output import bar, console, emit, log, new_table, visible


def demo(
    model: Model = DEFAULT_MODEL,
    encoder: NewEncoder = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="Recall and answer through a vLLM server.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the index and report.html.")] = Path("demo-out"),
    as_json: Json = False,
) -> None:
    """Run every step on the images in the package: index, recall, train, recall, grounded answer, report."""
    from llama_index_genret.cli.demo.run import figure_rows, run_demo

    opened = new_encoder(encoder)
    result = run_demo(model, out, encoder=opened, vllm=vllm, progress=bar("Encoding"), say=log.print)
    evaluation = result.evaluation
    shown = new_table("kind", "query", "recalled images, best first", "")
    for kind in ("caption", "phrasing", "tag"):
        part = evaluation.of_kind(kind)
        for wanted, ranked in list(zip(part.queries, part.ranked, strict=True))[:: max(1, len(part.queries) // 6)][:6]:
            shown.add_row(kind, wanted.text, ", ".join(ranked[:3]), "✓" if ranked[0] in wanted.image_ids else "")
    figures = new_table("figure", "value", "note")
    for row in figure_rows(result.figures):
        figures.add_row(*row)
    answer = dataclasses.asdict(result.answer)
    if not as_json:
        console().print(shown)
        answer_line = visible(f"  {result.answer.answer}  ← {answer['sources']}")
        console().print(Text.assemble((result.answer.question, "bold"), answer_line))
    emit(as_json, {**dataclasses.asdict(result.figures), "answer": answer, "report": str(result.report)}, figures)
    log.print(f"report: {result.report}")
    log.print(
        f"Look at the index: genret browse {result.index.folder}. With images of your own: genret index FOLDER --out "
        "INDEX recalls at once, genret train INDEX teaches it, genret serve INDEX serves it."
    )
