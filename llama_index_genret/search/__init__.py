"""Find the most probable identifiers of a trie, by beam search or by exact search."""

from llama_index_genret.search.beam_search import search
from llama_index_genret.search.protocol import Hit, Mode, Normalise, Ranking, Row, Rows, SearchOptions, Steps
from llama_index_genret.search.scores import check_scores

__all__ = ["Hit", "Mode", "Normalise", "Ranking", "Row", "Rows", "SearchOptions", "Steps", "check_scores", "search"]
