"""A multimodal LLM that has memorised your images, served by vLLM, as a LlamaIndex retriever.

Light to import: names load on first use, and the client side needs neither torch nor vllm.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_index_genret.corpus import Corpus, Record, read_corpus
    from llama_index_genret.errors import GenretError
    from llama_index_genret.image_documents import ImageDocumentParser, load_images
    from llama_index_genret.image_index import GenerativeImageIndex
    from llama_index_genret.image_node import GenretImageNode, ReadablePictures
    from llama_index_genret.llms import InProcessLLM, genret_llm
    from llama_index_genret.query_engine import image_query_engine
    from llama_index_genret.retriever import GenerativeImageRetriever
    from llama_index_genret.scorers.fake import FakeScorer
    from llama_index_genret.search import Normalise
    from llama_index_genret.store import Index, load_index

_HOME = {
    "Corpus": "corpus",
    "FakeScorer": "scorers.fake",
    "GenerativeImageIndex": "image_index",
    "GenerativeImageRetriever": "retriever",
    "GenretError": "errors",
    "GenretImageNode": "image_node",
    "ImageDocumentParser": "image_documents",
    "InProcessLLM": "llms",
    "Index": "store",
    "Normalise": "search",
    "ReadablePictures": "image_node",
    "Record": "corpus",
    "genret_llm": "llms",
    "image_query_engine": "query_engine",
    "load_images": "image_documents",
    "load_index": "store",
    "read_corpus": "corpus",
}

__all__ = [
    "Corpus",
    "FakeScorer",
    "GenerativeImageIndex",
    "GenerativeImageRetriever",
    "GenretError",
    "GenretImageNode",
    "ImageDocumentParser",
    "InProcessLLM",
    "Index",
    "Normalise",
    "ReadablePictures",
    "Record",
    "genret_llm",
    "image_query_engine",
    "load_images",
    "load_index",
    "read_corpus",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
