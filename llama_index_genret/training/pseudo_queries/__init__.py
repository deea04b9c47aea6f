"""Queries that the index's own model writes for images with few or no captions, for training.

    with open_writing(index, samples=read_samples(path)) as run:
        summary = run.finish(lambda: InProcessWriter(index, load_base(index)))

They are stored beside the records with their provenance, not among the captions. Training uses them as queries, and
evaluation over captions ignores them.

Source: generated queries for documents, as in doc2query (arXiv:1904.08375) and, for training generative retrieval,
DSI-QG (arXiv:2206.10128).
"""

from llama_index_genret.training.pseudo_queries.generate import WriteRun, WriteSummary, open_writing
from llama_index_genret.training.pseudo_queries.run_file import WriteOptions
from llama_index_genret.training.pseudo_queries.writer import Sampling, Writer, WriterReply, WriterRequest, read_samples

__all__ = [
    "Sampling",
    "WriteOptions",
    "WriteRun",
    "WriteSummary",
    "Writer",
    "WriterReply",
    "WriterRequest",
    "open_writing",
    "read_samples",
]
