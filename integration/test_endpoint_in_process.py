"""Tests of the recall routes behind vLLM's own guard, in this process: access, fetching, isolation of tenants.

The engine is a table that answers as vLLM's does. The app, its guard and the middleware are the real ones. A whole
server is in `test_endpoint.py`.
"""

import asyncio
import json
import secrets
import socket
from contextlib import closing

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from vllm.multimodal.media.connector import MediaConnector

from integration.recall_app import recall_app
from llama_index_genret.serving.endpoint.schema import INDEXES_VARIABLE
from llama_index_genret.serving.launch import FETCH_NO_MEDIA

KEY = "sk-of-the-test"
BODY = {"query": "red circle", "k": 20}


@pytest.fixture
def app_of(untrained_index, monkeypatch):
    monkeypatch.setenv(INDEXES_VARIABLE, f"shapes={untrained_index.folder}")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)

    def make(*, api_key=(KEY,), root_path=""):
        return recall_app(untrained_index, api_key=api_key, root_path=root_path)

    return make


def client_of(app, key=KEY):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", headers=headers)


PATHS = ["/v1/recall", "/v1/recall/", "/v1/recall/indexes", "/v1/recall/indexes/", "//v1/recall", "/v1//recall",
         "/V1/recall", "/%76%31/recall", "/v1/./recall", "/x/../v1/recall", "/v1/recall?x=/health", "/v1/recall;x",
         "/api/v1/recall", "/api/api/v1/recall"]  # fmt: skip
METHODS = ["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"]


@pytest.mark.parametrize("root_path", ["", "/", "/v", "/v1", "/api", "/api/"])
async def test_every_path_method_and_mount_needs_the_key(app_of, root_path):
    app = app_of(root_path=root_path)
    for key in (None, "wrong", f"{KEY}x", KEY[:-1], ""):
        async with client_of(app, key) as client:
            for path in PATHS:
                for method in METHODS if key is None else ["POST", "GET"]:
                    answer = await client.request(method, path, json=BODY, follow_redirects=True)
                    assert answer.status_code in (400, 401, 404, 405), (key, method, path, answer.status_code)
                    assert "shapes" not in answer.text
                    assert "circle" not in answer.text
    async with client_of(app) as client:
        assert (
            await client.post(f"{'' if root_path in ('/', '/v', '/api/') else root_path}/v1/recall", json=BODY)
        ).is_success


async def test_key_needs_the_bearer_scheme_and_is_optional(app_of):
    for header, status in ((KEY, 401), (f"Basic {KEY}", 401), (f"Bearer  {KEY}", 401), (f"bearer {KEY}", 200)):
        async with client_of(app_of(), None) as client:
            answer = await client.post("/v1/recall", json=BODY, headers={"Authorization": header})
            assert answer.status_code == status, header
    async with client_of(app_of(api_key=()), None) as client:
        assert (await client.post("/v1/recall", json=BODY)).status_code == 200


async def test_a_key_is_compared_in_constant_time(app_of, monkeypatch):
    compared, compare = [], secrets.compare_digest
    monkeypatch.setattr(secrets, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    async with client_of(app_of(root_path="/"), "wrong") as client:
        assert (await client.post("/v1/recall", json=BODY)).status_code == 401
    assert compared
    assert {len(part) for pair in compared for part in pair} == {
        32
    }  # digests, so that the length reveals nothing either


def test_a_websocket_without_the_key_is_rejected(app_of):
    with (
        pytest.raises((WebSocketDisconnect, RuntimeError, AssertionError)),
        TestClient(app_of()).websocket_connect("/v1/recall") as socket,
    ):
        socket.receive_text()


IMAGES = ["http://{}/x.png", "https://{}/x.png", "file:///etc/passwd", "FILE:///etc/passwd", "//{}/x.png",
          "/etc/passwd", "ftp://{}/x", "data:text/html;base64,PGI+", "data:image/png,raw", "data:image/png;base64,AAAA",
          " data:image/png;base64,AAAA", "data:image/svg+xml;base64,PHN2Zz48L3N2Zz4="]  # fmt: skip


@pytest.mark.parametrize("image", IMAGES)
async def test_image_addresses_and_files_are_never_fetched(app_of, image):
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        listening.settimeout(0.05)
        image_url = image.format(f"127.0.0.1:{listening.getsockname()[1]}")
        async with client_of(app_of()) as client:
            answer = await client.post("/v1/recall", json={"image": image_url})
        assert answer.status_code == 400
        assert "root:" not in answer.text
        with pytest.raises(TimeoutError):
            listening.accept()


def test_serve_flags_forbid_vllm_to_fetch_for_a_chat():
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        listening.settimeout(0.05)
        connector = MediaConnector(allowed_media_domains=[FETCH_NO_MEDIA[1]])
        host = f"127.0.0.1:{listening.getsockname()[1]}"
        for url in (f"http://{host}/x.png", f"http://none.invalid@{host}/x.png", "file:///etc/passwd"):
            with pytest.raises((ValueError, RuntimeError)):
                connector.fetch_image(url)
        with pytest.raises(TimeoutError):
            listening.accept()


async def test_tenants_are_isolated_and_invalid_filters_refused(app_of, untrained_index):
    colors = sorted({record.metadata["color"] for record in untrained_index.records})
    async with client_of(app_of()) as client:

        async def ask(number):
            color = colors[number % len(colors)]
            request = {**BODY, "filters": {"color": color}, "mode": ("beam", "exact")[number % 2]}
            hits = (await client.post("/v1/recall", json=request)).raise_for_status().json()["results"][0]["hits"]
            return {hit["metadata"]["color"] for hit in hits} == {color} and len(hits) == 4

        assert all(await asyncio.gather(*(ask(number) for number in range(40))))
        for filters in (
            {"color": 5},
            {"color": [5]},
            {"colour": "red"},
            {"color": "\ud800"},
            {"color": None},
            {"filters": [], "condition": "or"},
            {"filters": [{"key": "color", "value": "red", "operator": "in"}]},
            {"filters": [{"key": "color", "operator": "!="}]},
            {"filters": [{"key": "color", "value": "red", "operator": "~"}]},
            [],
            "color=red",
        ):
            content = json.dumps({**BODY, "filters": filters})  # half a surrogate pair passes through it
            refused = await client.post("/v1/recall", content=content, headers={"Content-Type": "application/json"})
            assert refused.status_code in (400, 422), (filters, refused.text)
        nan = '{"query": "x", "filters": {"filters": [{"key": "color", "value": NaN, "operator": "!="}]}}'
        answer = await client.post("/v1/recall", content=nan, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_model_output_without_a_number_is_a_server_error(app_of, value):
    app = app_of()
    app.state.engine_client.value = value
    async with client_of(app) as client:
        answer = await client.post("/v1/recall", json=BODY)
    assert answer.status_code == 500
    assert "NaN" in answer.json()["error"]["message"]


async def test_invalid_image_is_a_json_error(app_of):
    app = app_of()
    app.state.engine_client.value = float("-inf")
    async with client_of(app) as client:
        hits = (await client.post("/v1/recall", json=BODY)).raise_for_status().json()["results"][0]["hits"]
    assert min(hit["log_prob"] for hit in hits) == -9999.0
    assert min(hit["score"] for hit in hits) > 0
