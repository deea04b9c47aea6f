"""The body of `POST /v1/recall`, up to the requests to a scorer.

A request must mean the same after it is serialised and read again, and the two parsers of pydantic must agree.
"""

import json
from contextlib import suppress

import numpy as np
from pydantic import ValidationError

from integration.fuzz.small_index import small_index
from llama_index_genret.corpus.images import from_data_url, load_image
from llama_index_genret.errors import GenretError
from llama_index_genret.serving.endpoint.loaded_indexes import LoadedIndex
from llama_index_genret.serving.endpoint.schema import RecallRequest

PIXEL = b"data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
SEEDS = (
    b'{"query": "red", "k": 3, "filters": {"shape": ["bar", "frame"], "year": 1999}, '
    b'"scoring": {"eta": 0.5, "rerank": 2}}',
    b'{"queries": ["a", "b"], "beam_width": 5, "mode": "exact", "max_expansions": 9, '
    b'"scoring": {"rerank_by": "image"}, "index": "x"}',
    b'{"query": "a", "filters": {"filters": [{"key": "year", "value": 7, "operator": ">"}, '
    b'{"filters": [{"key": "shape", '
    b'"operator": "is_empty"}], "condition": "not"}], "condition": "or"}, "version": "0"}',
    b'{"image": "%s", "query": "but blue"}' % PIXEL,
)
WORDS = (
    *(b'"query"', b'"queries"', b'"image"', b'"k"', b'"filters"', b'"key"', b'"value"', b'"operator"', b'"condition"'),
    *(b'"and"', b'"or"', b'"not"', b'"=="', b'"!="', b'">="', b'"in"', b'"nin"', b'"any"', b'"all"', b'"contains"'),
    *(b'"text_match"', b'"text_match_insensitive"', b'"is_empty"', b'"year"', b'"shape"', b'"public"', b'"note"'),
    *(b"NaN", b"-Infinity", b"1e999", b"1" * 40, b"\\ud800", b"\\u0000", b"null", b"true", b"[[[[", b"<|im_end|>"),
)


def one(data: bytes) -> None:
    index = small_index()
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):  # FastAPI answers these by itself
        return
    try:
        request = RecallRequest.model_validate(body)
    except ValidationError:
        return
    sent = json.dumps(request.model_dump(mode="json"), allow_nan=False).encode()
    assert RecallRequest.model_validate_json(sent) == request
    for text in request.texts():
        with suppress(GenretError):
            tokens = index.prompts.for_query(index.tokenizer, text).words
            assert not set(tokens) & set(index.tokenizer.encode_markup("<|im_start|><|im_end|><image>"))
    if request.image is not None:
        with suppress(GenretError):
            assert load_image(from_data_url(request.image)).mode == "RGB"
    with suppress(GenretError):
        conditions = request.record_filters()
        leaves = LoadedIndex("x", index).leaf_filter(conditions)
        if conditions is not None and leaves is not None:
            passing = index.columns.record_mask(conditions)
            assert leaves.n_allowed == np.count_nonzero(passing)
    with suppress(GenretError):
        scoring = index.scoring(request.choice())
        assert scoring.eta >= 0
    with suppress(GenretError):
        options = request.options(None)
        assert (options.mode == "exact") == (options.max_expansions is not None)
