"""How images get their names: schemes behind one registry.

`numeric` and `structured` today. `clustering` needs scikit-learn and loads on first use.
"""

from llama_index_genret.identifiers.base import Identifier, Scheme, get_scheme, register_scheme

__all__ = ["Identifier", "Scheme", "get_scheme", "register_scheme"]
