"""The schema of the recall routes: request and response of `POST /v1/recall`, and the list of indexes.

Depends on pydantic, metadata filters and search options; independent of vLLM and FastAPI.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from llama_index_genret.corpus import Scalar
from llama_index_genret.search import Mode, SearchOptions
from llama_index_genret.store import RecordFilters, Scoring, ScoringChoice
from llama_index_genret.store.filters import MAX_FILTERS, Text, Value
from llama_index_genret.store.scoring import MIN_TEMPERATURE, RerankBy
from llama_index_genret.trie import LeafFilter

INDEXES_VARIABLE = "GENRET_INDEXES"
"""Environment variable of the server: `name=folder`, one index per line. vLLM passes no arguments to a middleware."""

ENCODER_VARIABLE = "GENRET_ENCODER"
"""Environment variable of the server: another place of its indexes' encoder, a folder, hub id or address."""

ENCODER_DEVICE_VARIABLE = "GENRET_ENCODER_DEVICE"
"""Environment variable of the server: torch device of the encoder, default "cpu"."""

MIDDLEWARE = "llama_index_genret.serving.endpoint.RecallMiddleware"
"""Value of vLLM's flag `--middleware`."""

MAX_QUERIES = 256
"""Maximum number of queries in one request."""

MAX_K = 1000
"""Maximum number of images per query, and maximum beam width."""

MAX_IMAGE_CHARACTERS = 2**25
"""Maximum length of a data URL, for an image of about 25 MB."""

IMPOSSIBLE = -9999.0
"""Stands for the logarithm of zero, which JSON cannot encode, as in vLLM's responses."""

DEFAULT_MAX_EXPANSIONS = 1000
"""Default `max_expansions` of a request in mode "exact": a server never searches without a limit."""

MAX_WEIGHT = 1e6
"""Maximum `eta` and `rerank_weight`: their products with log-probabilities stay finite."""

Equal = Annotated[dict[Text, Value | list[Value]], Field(max_length=MAX_FILTERS)]


class RecallScoring(BaseModel):
    """The ranking of hits; see `store.Scoring`. An omitted field has the value chosen by `genret tune`.

    model_weight: share of the trained model, from 0 to 1; the rest is the encoder's. 1 is the generative model alone.
    temperature: temperature of the encoder's p(image | query), the softmax of cosine / temperature.
    eta: weight of the images' log prior, which is subtracted from their score; 0 for no prior.
    rerank: number of best hits to re-rank by log p(query | image), for text queries only; 0 for none.
    rerank_weight: weight of log p(query | image).
    rerank_by: "identifier" conditions the model on the image's identifier, "image" on the image itself.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    model_weight: float | None = Field(default=None, ge=0, le=1)
    temperature: float | None = Field(default=None, ge=MIN_TEMPERATURE, le=MAX_WEIGHT)
    eta: float | None = Field(default=None, ge=0, le=MAX_WEIGHT)
    rerank: int | None = Field(default=None, ge=0, le=MAX_K)
    rerank_weight: float | None = Field(default=None, ge=0, le=MAX_WEIGHT)
    rerank_by: RerankBy | None = None


class RecallRequest(BaseModel):
    """A request for the best images of one or more queries.

    query, queries: one query or a list of them; both may be omitted with an image.
    image: a `data:image/...;base64,` URL. It is the query, alone or with a text such as "the same, but red". The
        server fetches nothing.
    k: number of images per query.
    filters: metadata that an image must have, `{"album": "2024", "shape": ["bar", "frame"]}` (a list matches any of its
        values), or conditions in the JSON form of LlamaIndex's MetadataFilters.
    beam_width: width of the beam search.
    mode: "beam", or "exact", which ends when the best images are certain or `max_expansions` prefixes were expanded.
    max_expansions: for mode "exact" only; 1000 if not given. If the limit is reached, the result has `exact: false`.
    scoring: ranking of hits; the response's `scoring` has the values used.
    index: name of a loaded index; may be omitted if there is only one.
    version: version of a loaded index, in place of its name. A server without that version responds with 404.
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
            raise ValueError("'image' cannot be combined with 'queries': send it alone or with one 'query'")
        if self.image is None and (self.query is None) == (self.queries is None):
            raise ValueError("send either 'query' or 'queries', or an 'image'")
        return self

    def texts(self) -> list[str]:
        """Return the texts of all queries."""
        return self.queries if self.queries is not None else [self.query or ""]

    def choice(self) -> ScoringChoice:
        """Return the client's choice of scoring."""
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
        """Return the filters, or None without any."""
        return RecordFilters.equal(self.filters) if isinstance(self.filters, dict) else self.filters


class RecallHit(BaseModel):
    """One image of a result. log_prob: natural logarithm of its probability. score, ranked_by: see `search.Hit`."""

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
    """The images of one query, best first. exact: True if they are provably the best."""

    query: str
    hits: list[RecallHit]
    exact: bool
    nodes_expanded: int


class RecallResponse(BaseModel):
    """The results in the order of the queries, all from one version of one index.

    scoring: the ranking used. Its `model_weight` is 1 without an encoder, and for an image query if the encoder embeds
        texts only. It is 0 for an index without trained weights.
    """

    model_config = ConfigDict(hide_input_in_errors=True)
    object: Literal["recall"] = "recall"
    index: str
    version: str
    scoring: Scoring
    results: list[RecallResult]


class RecallErrorDetail(BaseModel):
    """The details of an error. code: HTTP status. param: the invalid field, if it is known."""

    message: str
    type: str
    param: str | None = None
    code: int


class RecallErrorResponse(BaseModel):
    """An error response in the format of the OpenAI API."""

    error: RecallErrorDetail


class UnreadableBody(BaseModel):
    """FastAPI's own response to a body that is not valid JSON."""

    detail: str


class IndexCard(BaseModel):
    """A loaded index.

    encoder: name of the encoder in the server's process; null if the server recalls by the model alone.
    problem: the reason why a newer version on disk, or the encoder of the index, is not served; else empty.
    """

    name: str
    version: str
    scheme: str
    images: int
    encoder: str | None
    problem: str


class IndexList(BaseModel):
    """The list of all loaded indexes."""

    object: Literal["list"] = "list"
    data: list[IndexCard]
