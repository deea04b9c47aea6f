"""What goes over the wire: the request and the answer of `POST /v1/recall`, and the list of indexes.

Knows pydantic and metadata filters.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from llama_index_genret.corpus import Scalar
from llama_index_genret.search import Mode, SearchOptions
from llama_index_genret.store import RecordFilters, Scoring, ScoringChoice
from llama_index_genret.store.filters import MAX_FILTERS, Text, Value
from llama_index_genret.store.scoring import RerankBy
from llama_index_genret.trie import LeafFilter

INDEXES_VARIABLE = "GENRET_INDEXES"
"""Environment of the server: `name=folder`, one index a line. vLLM passes no arguments on to a middleware."""

MIDDLEWARE = "llama_index_genret.serving.endpoint.RecallMiddleware"
"""What vLLM's `--middleware` takes."""

MAX_QUERIES = 256
"""Queries in one request."""

MAX_K = 1000
"""Images that a query may ask for, and the widest beam."""

MAX_IMAGE_CHARACTERS = 2**25
"""Of a data URL: an image of some 25 MB."""

IMPOSSIBLE = -9999.0
"""What stands for the logarithm of zero, which is no JSON, as in vLLM's answers."""

DEFAULT_MAX_EXPANSIONS = 1000
"""The `max_expansions` of a request in mode "exact" that gives none: a server never searches without a limit."""

MAX_WEIGHT = 1e6
"""The largest `eta` and `rerank_weight`: what they are multiplied with stays finite."""

Equal = Annotated[dict[Text, Value | list[Value]], Field(max_length=MAX_FILTERS)]


class RecallScoring(BaseModel):
    """Choose how hits are ranked; see `store.Scoring`. A field left out has the value chosen by `genret tune`.

    eta: how much of the prior of the images is taken off their score, 0 for nothing.
    rerank: how many of the best are ranked anew by log p(query | image), of text queries only; 0 for none.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    eta: float | None = Field(default=None, ge=0, le=MAX_WEIGHT)
    rerank: int | None = Field(default=None, ge=0, le=MAX_K)
    rerank_weight: float | None = Field(default=None, ge=0, le=MAX_WEIGHT)
    rerank_by: RerankBy | None = None


class RecallRequest(BaseModel):
    """Which images do these queries mean?

    query, queries: one or the other, or neither with an image.
    image: a `data:image/...;base64,` URL, the query itself, or with a text: "the same, but red". Nothing is fetched.
    filters: metadata that an image must have, `{"album": "2024", "shape": ["bar", "frame"]}` (of a list, any one), or
        conditions in the JSON form of LlamaIndex's MetadataFilters.
    mode: "beam", or "exact": until the best are certain, or `max_expansions` prefixes were expanded.
    max_expansions: of mode "exact" only; 1000 if not given. Where it did not suffice, the result has `exact: false`.
    scoring: how hits are ranked, as the answer's `scoring` says it.
    index: name of a loaded index; may be left out where there is one.
    version: of a loaded index, in place of its name. A server that has none of it answers 404.
    """

    model_config = ConfigDict(
        extra="forbid",
        hide_input_in_errors=True,
        json_schema_extra={"anyOf": [{"required": [name]} for name in ("query", "queries", "image")]},
    )
    query: Text | None = None
    queries: list[Text] | None = Field(default=None, min_length=1, max_length=MAX_QUERIES)
    image: str | None = Field(default=None, max_length=MAX_IMAGE_CHARACTERS)
    k: int = Field(default=5, ge=1, le=MAX_K)
    filters: RecordFilters | Equal | None = Field(default=None, union_mode="left_to_right")
    beam_width: int | None = Field(default=None, ge=1, le=MAX_K)
    mode: Mode = "beam"
    max_expansions: int | None = Field(default=None, ge=1)
    scoring: RecallScoring = RecallScoring()
    index: Text | None = None
    version: Text | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> RecallRequest:
        if self.image is not None and self.queries is not None:
            raise ValueError("'image' goes with one 'query', or with none")
        if self.image is None and (self.query is None) == (self.queries is None):
            raise ValueError("give either 'query' or 'queries', or an 'image'")
        return self

    def texts(self) -> list[str]:
        """The queries."""
        return self.queries if self.queries is not None else [self.query or ""]

    def choice(self) -> ScoringChoice:
        """How the hits are to be ranked."""
        return ScoringChoice(**self.scoring.model_dump())

    def options(self, leaf_filter: LeafFilter | None) -> SearchOptions:
        """Return the options of the search, without a prior.

        Raises:
            SearchError: mode "beam" has `max_expansions`.
        """
        limit = DEFAULT_MAX_EXPANSIONS if self.mode == "exact" and self.max_expansions is None else self.max_expansions
        return SearchOptions(
            k=self.k, width=self.beam_width, mode=self.mode, max_expansions=limit, leaf_filter=leaf_filter
        )

    def record_filters(self) -> RecordFilters | None:
        """The filters, None where there are none."""
        return RecordFilters.equal(self.filters) if isinstance(self.filters, dict) else self.filters


class RecallHit(BaseModel):
    """One image. log_prob: natural logarithm of its probability; score, ranked_by: see `search.Hit`."""

    model_config = ConfigDict(hide_input_in_errors=True)
    image_id: str
    file_name: str
    caption: str
    identifier: str
    score: FiniteFloat
    log_prob: FiniteFloat
    ranked_by: FiniteFloat | None = None
    metadata: dict[str, Scalar]


class RecallResult(BaseModel):
    """The images of one query, best first. exact: whether they are for certain the best."""

    query: str
    hits: list[RecallHit]
    exact: bool
    nodes_expanded: int


class RecallResponse(BaseModel):
    """The results in the order of the queries, all of one version of one index. scoring: what they are ranked by."""

    model_config = ConfigDict(hide_input_in_errors=True)
    object: Literal["recall"] = "recall"
    index: str
    version: str
    scoring: Scoring
    results: list[RecallResult]


class RecallErrorDetail(BaseModel):
    """Why a request is not answered. code: the HTTP status. param: the field that is wrong, where it is known."""

    message: str
    type: str
    param: str | None = None
    code: int


class RecallErrorResponse(BaseModel):
    """An error, in the shape of the OpenAI API's."""

    error: RecallErrorDetail


class UnreadableBody(BaseModel):
    """FastAPI's own answer to a body that it cannot read as JSON."""

    detail: str


class IndexCard(BaseModel):
    """A loaded index. problem: why a newer version on disk is not served; empty if there is none."""

    name: str
    version: str
    scheme: str
    images: int
    problem: str


class IndexList(BaseModel):
    """All loaded indexes."""

    object: Literal["list"] = "list"
    data: list[IndexCard]
