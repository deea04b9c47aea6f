"""Images, captions, questions and metadata that the user gives. Independent of models."""

from llama_index_genret.corpus.imagefolder import read_corpus
from llama_index_genret.corpus.records import Corpus, Question, Record, Scalar, SkippedImage

__all__ = ["Corpus", "Question", "Record", "Scalar", "SkippedImage", "read_corpus"]
