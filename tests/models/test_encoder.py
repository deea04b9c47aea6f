"""Encoders: local models, an embeddings endpoint over HTTP, and functions."""

import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from llama_index_genret.errors import EncoderError, EncoderUnavailable
from llama_index_genret.models.encoder import (
    DEFAULT_ENCODER,
    CallableEncoder,
    EndpointEncoder,
    embed_by_captions,
    load_encoder,
    unit,
)

CAPTIONS = [("a red ring", "red"), (), ("blue square",)]


class _Embeddings(BaseHTTPRequestHandler):
    """`/v1/models` and `/v1/embeddings`; what the class attributes say."""

    models = ("tiny",)
    change = staticmethod(lambda rows: rows)

    def do_GET(self):
        self._answer({"data": [{"id": name} for name in self.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.headers["Authorization"], body))
        rows = [{"index": i, "embedding": [float(len(text)), 1.0, 0.0]} for i, text in enumerate(body["input"])]
        self._answer({"data": self.change(rows)})

    def _answer(self, found):
        content = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture
def endpoint():
    handler = type("Handler", (_Embeddings,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.requests, server.handler = [], handler
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("suffix", ["", "/", "/embeddings", "#tiny"])
def test_an_endpoint_embeds_in_the_order_of_the_texts(endpoint, suffix):
    server, address = endpoint
    server.handler.change = staticmethod(lambda rows: rows[::-1])
    encoder = load_encoder(address + suffix, api_key="secret")
    expected = unit([[4, 1, 0], [1, 1, 0]])
    np.testing.assert_allclose(encoder.embed_queries(["four", "1"]), expected, atol=1e-6)
    np.testing.assert_allclose(encoder.embed_captions(["four", "1"]), expected, atol=1e-6)
    key, body = server.requests[-1]
    assert key == "Bearer secret"
    assert body["model"] == "tiny"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[:-1], "did not return a vector for each"),
        (lambda rows: [{"index": 0}] * len(rows), "no vectors"),
        (lambda rows: "rows", "did not return a vector for each"),
        (lambda rows: [{**row, "embedding": [float("nan")] * 3} for row in rows], "NaN or infinity"),
        (lambda rows: [{**row, "embedding": [1.0]} for row in rows], r"expected \(n, 3\)"),
    ],
)
def test_an_endpoint_that_returns_no_vectors_is_named(endpoint, change, words):
    server, address = endpoint
    encoder = EndpointEncoder(address)
    server.handler.change = staticmethod(change)
    with pytest.raises(EncoderError, match=words):
        encoder.embed_queries(["a", "b"])


def test_several_models_of_a_server_must_be_named(endpoint):
    server, address = endpoint
    server.handler.models = ("tiny", "other")
    with pytest.raises(EncoderError, match="#MODEL"):
        EndpointEncoder(address)
    assert EndpointEncoder(f"{address}#other").dimension == 3


def test_a_server_that_is_gone_names_the_way_out(endpoint):
    server, address = endpoint
    server.shutdown()
    server.server_close()
    with pytest.raises(EncoderUnavailable, match="--encoder"):
        EndpointEncoder(address)


@pytest.mark.torch
def test_a_folder_that_is_no_encoder_names_the_choices(tmp_path):
    with pytest.raises(EncoderUnavailable, match=r"does not load as an encoder.* or `none`"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("name", [DEFAULT_ENCODER, "all-MiniLM-L6-v2", "no/such/folder"])
@pytest.mark.parametrize(("offline", "reason"), [(True, "HF_HUB_OFFLINE is set"), (False, "does not respond")])
def test_encoder_without_hub_fails_before_the_import(tmp_path, monkeypatch, name, offline, reason):
    """sentence-transformers takes ten seconds to import, and retries each request five times."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(EncoderUnavailable, match=f"{name}.*{reason}.*or `none`"):
        load_encoder(name)


@pytest.mark.torch
def test_encoder_in_the_hub_cache_loads_without_the_hub(tmp_path, monkeypatch):
    """The cache is that of a hub that has been reached once, and does not respond now."""
    from tests.tiny_text_encoder import make_text_encoder

    cached = tmp_path / "hub" / "models--sentence-transformers--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123")
    shutil.copytree(make_text_encoder(tmp_path), cached / "snapshots" / "0123")
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert load_encoder("sentence-transformers/tiny").dimension == 16


def test_images_lie_at_the_sum_of_both_caption_vectors():
    vectors = {"a red ring": [1, 0, 0], "red": [0, 1, 0], "a red ring red": [0, 0, 1], "blue square": [1, 1, 0]}
    encoder = CallableEncoder(lambda texts: np.array([vectors.get(text, [1, 1, 1]) for text in texts], np.float32))
    placed, known = embed_by_captions(encoder, CAPTIONS)
    expected = unit(unit([0.5, 0.5, 0]) + np.array([0, 0, 1]))
    np.testing.assert_allclose(placed[0], expected, atol=1e-6)
    assert not placed[1].any()
    np.testing.assert_allclose(placed[2], unit([1, 1, 0]), atol=1e-6)
    assert known.keys() == {"a red ring", "red", "blue square"}


def test_a_function_may_embed_queries_in_another_way():
    encoder = CallableEncoder(
        lambda texts: np.tile([1.0, 0.0], (len(texts), 1)),
        embed_queries=lambda texts: np.tile([0.0, 2.0], (len(texts), 1)),
    )
    np.testing.assert_array_equal(encoder.embed_queries(["a"]), [[0, 1]])
    np.testing.assert_array_equal(encoder.embed_captions(["a"]), [[1, 0]])


@pytest.mark.torch
def test_a_sentence_transformer_embeds_unit_vectors(tmp_path):
    from tests.tiny_text_encoder import make_text_encoder

    encoder = load_encoder(make_text_encoder(tmp_path))
    texts = ["red ring", "a", "blue square circle"]
    together = encoder.embed_captions(texts)
    assert encoder.dimension == 16
    assert not encoder.embeds_images
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    each = np.concatenate([encoder.embed_queries([text]) for text in texts])
    np.testing.assert_allclose(together, each, atol=1e-5)
    with pytest.raises(EncoderError, match="embeds texts only"):
        encoder.embed_images([])
