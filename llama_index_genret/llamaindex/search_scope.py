"""The scope of a retriever's search: one version of an index, one scorer, and the images that may be found.

Depends on the index and the filters; independent of queries and LlamaIndex.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import ServerError
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import Scorer
from llama_index_genret.scorers.blend import Blender
from llama_index_genret.search import Ranking
from llama_index_genret.serving.endpoint.client import RecallClient
from llama_index_genret.store import Index, RecordFilters, Scoring
from llama_index_genret.trie import LeafFilter


@dataclass(frozen=True)
class SearchScope:
    """The scope of a search, replaced as a whole: index and filters never change apart while a query runs.

    scorer: scores with the trained weights, None for an index without. blender: adds the encoder to it.
    filters: conditions that a found image fulfils, None for no condition.
    image_ids: the images that may be found, None for all.
    """

    index: Index
    scorer: Scorer | None
    blender: Blender
    endpoint: RecallClient | None
    filters: RecordFilters | None
    image_ids: frozenset[str] | None

    @cached_property
    def record_mask(self) -> NDArray[np.bool_] | None:
        """The records that may be found, (records,) bool, or None for all."""
        passing = None if self.filters is None else self.index.columns.record_mask(self.filters)
        if self.image_ids is None:
            return passing
        chosen = np.array([record.image_id in self.image_ids for record in self.index.records], np.bool_)
        return chosen if passing is None else passing & chosen

    @cached_property
    def leaf_filter(self) -> LeafFilter | None:
        """`record_mask` as a bitmap over leaves, or None for all."""
        return None if self.record_mask is None else self.index.leaf_filter_of(self.record_mask)

    def scorer_of(self, scoring: Scoring, prompts: Sequence[Prompt] = ()) -> Scorer:
        """Return the scorer of a query: the model, the encoder, or a blend of both.

        Raises:
            NotTrained: there is neither.
        """
        return self.blender.scorer(self.scorer, self.blender.scoring_of(scoring, self.scorer, prompts))

    @property
    def empty_ranking(self) -> Ranking | None:
        """An empty ranking if no image may be found, so that no model is queried, else None."""
        none = not self.index.records or (self.leaf_filter is not None and not self.leaf_filter.n_allowed)
        return Ranking((), True, 0) if none else None

    def check_ranking(self, ranking: Ranking | None) -> Ranking | None:
        """Return an endpoint's ranking, whose images must pass the filters.

        Raises:
            ServerError: a hit does not pass. The server may run another version of this package.
        """
        mask = self.record_mask
        for hit in () if ranking is None else ranking.hits:
            if mask is not None and not mask[hit.key]:
                raise ServerError(
                    f"the recall endpoint returned {self.index.record_of(hit).image_id!r}, which does not pass the "
                    "filters. Its response is not used. Run `genret serve` of the same version as this client."
                )
        return ranking
