"""What a retriever searches: one version of an index, with one scorer, and only the images that may be found.

Knows the index and the filters; nothing of queries or LlamaIndex.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import ServerError
from llama_index_genret.scorers.base import Scorer
from llama_index_genret.search import Ranking
from llama_index_genret.serving.endpoint.client import RecallClient
from llama_index_genret.store import Index, MetadataFilters
from llama_index_genret.trie import LeafFilter


@dataclass(frozen=True)
class Searched:
    """What is searched, replaced as a whole: index and filters never change apart while a query runs.

    image_ids: those that may be found; None for all. conditions: what they must fulfil besides.
    """

    index: Index
    scorer: Scorer
    endpoint: RecallClient | None
    conditions: MetadataFilters | None
    image_ids: frozenset[str] | None

    @cached_property
    def rows(self) -> NDArray[np.bool_] | None:
        """(records,) which may be found; None for all."""
        passing = None if self.conditions is None else self.index.columns.passing(self.conditions)
        if self.image_ids is None:
            return passing
        chosen = np.array([record.image_id in self.image_ids for record in self.index.records], np.bool_)
        return chosen if passing is None else passing & chosen

    @cached_property
    def allowed(self) -> LeafFilter | None:
        """The same as leaves."""
        return None if self.rows is None else self.index.leaves_of(self.rows)

    @property
    def nothing(self) -> Ranking | None:
        """The ranking of no images, where none may be found: nothing is asked of a model then."""
        none = not self.index.records or (self.allowed is not None and not self.allowed.n_allowed)
        return Ranking((), True, 0) if none else None

    def told(self, ranking: Ranking | None) -> Ranking | None:
        """What an endpoint told, which may know the filters of another version of this package, or none."""
        rows = self.rows
        for hit in () if ranking is None else ranking.hits:
            if rows is not None and not rows[hit.key]:
                raise ServerError(
                    f"the server's endpoint answered {self.index.record_of(hit).image_id!r}, which does not pass the "
                    "filters. Nothing of its answer is used: is it `genret serve` of this version?"
                )
        return ranking
