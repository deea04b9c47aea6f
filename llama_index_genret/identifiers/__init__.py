"""Assigns identifiers to images: five schemes behind one registry that users can extend.

`clustering` needs scikit-learn and loads on first use.
"""

from llama_index_genret.identifiers.base import Identifier, ImageFacts, Scheme, get_scheme, register_scheme
from llama_index_genret.identifiers.spelling import Alphabet, Spelling, spelling_of

__all__ = [
    "Alphabet",
    "Identifier",
    "ImageFacts",
    "Scheme",
    "Spelling",
    "get_scheme",
    "register_scheme",
    "spelling_of",
]
