"""A program of a client: recall by a table, by a server, with filters, and an answer from the recalled images.

python client_program.py INDEX API_BASE

`test_wheel.py` runs it, and has its types checked, where the wheel is installed and nothing else of this project.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from llama_index.core.schema import NodeWithScore
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters

from llama_index_genret import (
    FakeScorer,
    GenerativeImageRetriever,
    Index,
    Normalise,
    genret_llm,
    image_query_engine,
    load_index,
)
from llama_index_genret.cli import main as genret

QUERY = "red circle"
command_line: Callable[[], NoReturn] = genret


def image_ids(nodes: list[NodeWithScore]) -> list[str]:
    """Return the recalled images, best first."""
    return [found.node.node_id for found in nodes]


def report(folder: Path, api_base: str) -> dict[str, object]:
    """Return the results of each way of recalling."""
    index: Index = load_index(folder)
    scorer = FakeScorer(index.tokenizer.vocab_size)
    table = GenerativeImageRetriever(index, scorer, similarity_top_k=3, normalise=Normalise.CHILDREN)
    served = GenerativeImageRetriever.from_server(folder, api_base, similarity_top_k=3)
    green = MetadataFilters(filters=[MetadataFilter(key="color", value="green")])
    filtered = GenerativeImageRetriever(index, scorer, filters=green, similarity_top_k=20)
    engine = image_query_engine(served, genret_llm(api_base, model="only"))
    captions: tuple[str, ...] = index.records[0].captions
    return {
        "captions": captions,
        "table": image_ids(table.retrieve(QUERY)),
        "served": image_ids(served.retrieve(QUERY)),
        "filtered": image_ids(filtered.retrieve(QUERY)),
        "answer": str(engine.query("What is it?")),
        "modules": sorted(sys.modules),
    }


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]), sys.argv[2])))
