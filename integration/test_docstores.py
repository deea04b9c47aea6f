"""Tests of the index over another docstore than LlamaIndex's default: a Redis server, started for the test."""

import asyncio
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from llama_index.core import StorageContext
from llama_index.core.schema import ImageNode

from llama_index_genret import FakeScorer, GenerativeImageIndex, load_images
from llama_index_genret.serving.launch import free_port
from tests.conftest import draw_pictures

redis = pytest.importorskip("redis")
RedisDocumentStore = pytest.importorskip("llama_index.storage.docstore.redis").RedisDocumentStore


@contextmanager
def redis_server(folder):
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with (folder / "redis.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            _wait(port, process)
            yield port
        finally:
            process.terminate()


def _wait(port, process):
    for _ in range(100):
        try:
            with redis.Redis(port=port) as client:
                client.ping()
            return
        except redis.ConnectionError:
            assert process.poll() is None, "redis-server ended"
            time.sleep(0.1)
    raise TimeoutError("redis-server did not answer in 10 seconds")


def docstore_at(port):
    return RedisDocumentStore.from_host_and_port("127.0.0.1", port)


def found(index):
    return {hit.node.node_id: hit.node.text for hit in index.as_retriever(similarity_top_k=99).retrieve("red circle")}


LOADED = """
import sys
from llama_index.core import StorageContext, load_index_from_storage
from llama_index.storage.docstore.redis import RedisDocumentStore
from llama_index_genret import FakeScorer, GenerativeImageIndex

docstore = RedisDocumentStore.from_host_and_port("127.0.0.1", int(sys.argv[2]))
storage = StorageContext.from_defaults(docstore=docstore, persist_dir=sys.argv[1])
index = load_index_from_storage(storage, scorer=FakeScorer(1000))
for hit in index.as_retriever(similarity_top_k=99).retrieve("red circle"):
    print(hit.node.node_id, hit.node.text, sep="\\t")
"""


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed: apt-get install it")
def test_redis_docstore_survives_edits_and_a_new_process(tmp_path, tiny_model_dir):
    folder = draw_pictures(tmp_path / "images")
    with redis_server(tmp_path) as port:
        storage = StorageContext.from_defaults(docstore=docstore_at(port))
        given = {"index_dir": tmp_path / "index", "model": str(tiny_model_dir), "device": "cpu"}
        documents = load_images(folder)
        index = GenerativeImageIndex.from_documents(documents[:18], storage, scorer=FakeScorer(1000), **given)

        index.insert(documents[18])
        asyncio.run(index.ainsert(documents[19]))
        index.delete_ref_doc("red-circle", delete_from_docstore=True)
        documents[1].set_content("an empty square")
        assert index.refresh_ref_docs(documents[1:]) == [True, *[False] * 18]
        expected = {document.id_: document.text for document in documents[1:]}
        assert found(index) == expected == {key: node.text for key, node in docstore_at(port).docs.items()}
        assert set(index.ref_doc_info) == set(expected)

        retriever = index.as_retriever(similarity_top_k=3)
        runs = [[hit.node.node_id for hit in asyncio.run(retriever.aretrieve("red circle"))] for _ in range(3)]
        assert runs[0] == runs[1] == runs[2]

        docstore_at(port).add_documents([ImageNode(id_="red-bar", text="from Redis", image_path="x.png")])
        storage.persist(str(tmp_path / "persisted"))
        command = [sys.executable, "-c", LOADED, str(tmp_path / "persisted"), str(port)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert dict(line.split("\t") for line in printed.splitlines()) == {**expected, "red-bar": "from Redis"}
