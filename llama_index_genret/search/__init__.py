"""The most probable identifiers of a trie, by beam search or exactly."""

from llama_index_genret.search.beam_search import search
from llama_index_genret.search.protocol import Hit, Mode, Normalise, Ranking, Row, Rows, SearchOptions, Steps
from llama_index_genret.search.scores import checked

__all__ = ["Hit", "Mode", "Normalise", "Ranking", "Row", "Rows", "SearchOptions", "Steps", "checked", "search"]
