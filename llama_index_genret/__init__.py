"""A multimodal LLM that has memorised your images, served by vLLM, as a LlamaIndex retriever.

Light to import: each public object loads on first use. The client side needs neither torch nor vllm.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_index_genret.corpus import Corpus, Record, read_corpus
    from llama_index_genret.errors import GenretError
    from llama_index_genret.llamaindex.documents import ImageDocumentParser, load_images
    from llama_index_genret.llamaindex.index import GenerativeImageIndex
    from llama_index_genret.llamaindex.llms import InProcessLLM, genret_llm
    from llama_index_genret.llamaindex.nodes import GenretImageNode, ReadablePictures
    from llama_index_genret.llamaindex.query_engine import image_query_engine
    from llama_index_genret.llamaindex.retriever import GenerativeImageRetriever
    from llama_index_genret.llamaindex.verifier import RecallVerifier
    from llama_index_genret.scorers.abstention import Abstention
    from llama_index_genret.scorers.fake import FakeScorer
    from llama_index_genret.search import Normalise
    from llama_index_genret.store import Index, ScoringChoice, load_index

_HOME = {
    "Abstention": "scorers.abstention",
    "Corpus": "corpus",
    "FakeScorer": "scorers.fake",
    "GenerativeImageIndex": "llamaindex.index",
    "GenerativeImageRetriever": "llamaindex.retriever",
    "GenretError": "errors",
    "GenretImageNode": "llamaindex.nodes",
    "ImageDocumentParser": "llamaindex.documents",
    "InProcessLLM": "llamaindex.llms",
    "Index": "store",
    "Normalise": "search",
    "ReadablePictures": "llamaindex.nodes",
    "RecallVerifier": "llamaindex.verifier",
    "Record": "corpus",
    "ScoringChoice": "store",
    "genret_llm": "llamaindex.llms",
    "image_query_engine": "llamaindex.query_engine",
    "load_images": "llamaindex.documents",
    "load_index": "store",
    "read_corpus": "corpus",
}

__all__ = [
    "Abstention",
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
    "RecallVerifier",
    "Record",
    "ScoringChoice",
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
