"""What goes over the wire: the request and the answer of `POST /v1/recall`, and the list of indexes.

Knows pydantic and metadata filters.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from llama_index_genret.corpus import Scalar
from llama_index_genret.store import RecordFilters, Scoring, ScoringChoice
from llama_index_genret.store.filters import MAX_FILTERS, Text, Value
from llama_index_genret.store.scoring import RerankBy

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

EXACT_BUDGET = 1000
"""Prefixes that an exact search expands before it goes on as a beam, where the request names no budget."""


MAX_WEIGHT = 1e6
"""The largest `eta` and `rerank_weight`: what they are multiplied with stays finite."""

Equal = Annotated[dict[Text, Value | list[Value]], Field(max_length=MAX_FILTERS)]


class RecallRequest(BaseModel):
    """Which images do these queries mean?

    query, queries: one or the other, or neither with an image.
    image: a `data:image/...;base64,` URL, the query itself, or with a text: "the same, but red". Nothing is fetched.
    filters: metadata that an image must have, `{"album": "2024", "shape": ["bar", "frame"]}` (of a list, any one), or
        conditions in the JSON form of LlamaIndex's MetadataFilters.
    mode: "beam", or "exact": until the best are certain, or `budget` prefixes were expanded.
    eta: how much of the prior of the images is taken off their score, 0 for nothing.
    rerank: how many of the best are ranked anew by log p(query | image), of text queries only; 0 for none.
    rerank_weight, rerank_by: see `store.Scoring`. What is not given of these four is as `genret tune` chose it.
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
    mode: Literal["beam", "exact"] = "beam"
    budget: int = Field(default=EXACT_BUDGET, ge=0)
    eta: float | None = Field(default=None, ge=0, le=MAX_WEIGHT)
    rerank: int | None = Field(default=None, ge=0, le=MAX_K)
    rerank_weight: float | None = Field(default=None, ge=0, le=MAX_WEIGHT)
    rerank_by: RerankBy | None = None
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
        return ScoringChoice(self.eta, self.rerank, self.rerank_weight, self.rerank_by)

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
