"""`GenerativeImageIndex` with a tiny model: documents, edits, persistence and engines."""

import base64
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from llama_index.core import SimpleDirectoryReader, StorageContext, load_index_from_storage
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.llms import ImageBlock, LLMMetadata, MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.schema import Document, ImageDocument, ImageNode, TextNode
from PIL import Image, ImageDraw

from llama_index_genret import FakeScorer, GenerativeImageIndex, load_images
from llama_index_genret.errors import (
    CorpusError,
    DuplicateImage,
    ImageError,
    IndexExists,
    MetadataError,
    NotTrained,
)
from llama_index_genret.store import load_index, remove_images
from llama_index_genret.training.options import TrainOptions
from tests.conftest import draw_pictures


class RecordingLLM(MockLLM):
    """A chat model that records its messages."""

    @property
    def metadata(self):
        return LLMMetadata(is_chat_model=True, context_window=8192)

    def chat(self, messages, **kwargs):
        chats.append(list(messages))
        return super().chat(messages, **kwargs)


chats = []


def image_counts():
    return [sum(isinstance(block, ImageBlock) for m in messages for block in m.blocks) for messages in chats]


@pytest.fixture
def folder(tmp_path):
    return draw_pictures(tmp_path / "images")


@pytest.fixture
def make(tmp_path, tiny_model_dir):
    """Return a maker of an index over documents, with a `FakeScorer`."""

    def make(documents, storage_context=None, **options):
        options = {"index_dir": tmp_path / "index", "model": str(tiny_model_dir), "device": "cpu", **options}
        return GenerativeImageIndex.from_documents(
            documents, storage_context, **{"scorer": FakeScorer(1000), **options}
        )

    return make


@pytest.fixture
def index(make, folder):
    return make(load_images(folder))


def memory():
    """Return a memory without SQLite: LlamaIndex's default one leaves a connection open."""
    return ChatMemoryBuffer.from_defaults()


def found(retriever, query="red circle"):
    return {hit.node.node_id for hit in retriever.retrieve(query)}


def everything(index, **options):
    return index.as_retriever(similarity_top_k=100, **options)


def another(path, color="orange"):
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((20, 20, 44, 44), fill=color)
    image.save(path)
    return path


def document(path, image_id="new", **options):
    return ImageDocument(
        id_=image_id,
        image_path=str(path),
        text="an orange dot",
        **{"metadata": {"color": "orange", "shape": "dot"}, **options},
    )


def test_folder_images_become_nodes_with_ids_and_captions(index, folder):
    assert len(index.docstore.docs) == 20
    (hit,) = index.as_retriever(similarity_top_k=1).retrieve("x")
    node = hit.node
    assert node.node_id == node.metadata["image_id"] == node.ref_doc_id
    assert node.text == f"{node.metadata['color']} {node.metadata['shape']}"
    assert node.image_path == node.metadata["file_path"] == str(folder / f"{node.node_id}.png")
    assert index.ref_doc_info[node.node_id].node_ids == [node.node_id]


def test_index_folder_is_complete_for_the_command_line(index, folder):
    stored = load_index(index.folder)
    first = stored.records[0]
    assert (first.image_id, first.captions, dict(first.metadata)) == (
        "red-circle",
        ("red circle",),
        {"color": "red", "shape": "circle"},
    )
    assert stored.records[0].file_name == "red-circle.png"


def test_captions_are_lines_and_questions_are_hidden(tmp_path, make):
    images = tmp_path / "images"
    images.mkdir()
    another(images / "a.png")
    question = {"question": "Which color?", "answer": "orange"}
    line = {"file_name": "a.png", "text": ["a dot", "a small dot"], "questions": [question]}
    (images / "metadata.jsonl").write_text(json.dumps(line))
    index = make(load_images(images), scheme="numeric")
    (record,) = index.stored.records
    assert (record.captions, record.questions[0].answer, dict(record.metadata)) == (
        ("a dot", "a small dot"),
        "orange",
        {},
    )
    assert "Which color" not in index.docstore.get_node("a").get_content("llm")


def test_any_document_with_an_image_is_accepted(make, tmp_path):
    path = another(tmp_path / "b.png")
    plain = Document(id_="plain", text="a dot", image_resource={"path": path})
    index = make([document(another(tmp_path / "a.png")), plain], scheme="numeric")
    assert found(everything(index)) == {"new", "plain"}


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (lambda path: Document(id_="t", text="mojibake"), ImageError, "'t' has no image"),
        (lambda path: document(path, metadata={"tags": ["a", "b"]}), MetadataError, "'tags' of 'new' is a list"),
        (lambda path: Document(id_="t", image_resource={"path": path.parent / "gone.png"}), ImageError, "'t'.*missing"),
        (lambda path: Document(id_="t", image_resource={"url": "http://127.0.0.1:9/a.png"}), ImageError, "a URL"),
        (lambda path: TextNode(id_="t", text="x"), ImageError, "no document"),
    ],
    ids=["no image", "nested metadata", "missing file", "url", "a text node"],
)
def test_invalid_document_error_has_its_id(make, tmp_path, given, error, words):
    with pytest.raises(error, match=words):
        make([given(another(tmp_path / "a.png"))])
    assert not (tmp_path / "index" / "manifest.json").exists()


def test_image_in_memory_is_stored_as_a_file(make, tmp_path):
    content = another(tmp_path / "a.png").read_bytes()
    storage = StorageContext.from_defaults()
    documents = [ImageDocument(id_="mem", image=base64.b64encode(content).decode(), text="a dot")]
    index = make(documents, storage, scheme="numeric")
    index.insert_nodes([ImageNode(id_="too", image=base64.b64encode(content).decode())])
    storage.persist(tmp_path / "persisted")
    for node_id in ("mem", "too"):
        assert Path(index.docstore.get_node(node_id).image_path).read_bytes() == content
    stored = (tmp_path / "persisted" / "docstore.json").read_text()
    assert base64.b64encode(content).decode()[:60] not in stored
    assert len(list((index.folder / "pictures").iterdir())) == 1


def test_occupied_folder_or_no_images_is_an_error(make, index):
    with pytest.raises(IndexExists):
        make(load_images(index.stored.records[0].path.parent))
    with pytest.raises(CorpusError, match="no images"):
        make([], index_dir=index.folder.parent / "other")
    with pytest.raises(CorpusError, match="index_dir"):
        GenerativeImageIndex(nodes=[])


def test_existing_retrievers_find_an_inserted_image(index, tmp_path):
    before = everything(index)
    index.insert(document(another(tmp_path / "new.png")))
    assert found(before) == found(everything(index))
    assert "new" in found(before)
    assert "new" in index.untrained_ids()
    assert index.docstore.get_node("new").text == "an orange dot"


def test_image_with_a_known_id_is_not_inserted(index, folder):
    with pytest.raises(DuplicateImage):
        index.insert(load_images(folder)[0])
    assert len(index.docstore.docs) == len(index.stored.records) == 20


def test_existing_retrievers_do_not_find_a_deleted_image(index, folder):
    before, engine = everything(index), index.as_query_engine(llm=RecordingLLM(), similarity_top_k=100)
    index.delete_ref_doc("red-circle")
    index.delete_nodes(["blue-bar"], delete_from_docstore=True)
    assert found(before) == found(engine) == found(everything(index)) == set(index.stored.rows_by_id)
    assert len(index.stored.records) == 18
    assert "red-circle" in index.docstore.docs
    assert "blue-bar" not in index.docstore.docs
    assert (folder / "blue-bar.png").exists()


def test_emptied_index_finds_nothing_and_accepts_images(index, tmp_path):
    retriever = everything(index)
    index.delete_nodes(list(index.docstore.docs), delete_from_docstore=True)
    assert retriever.retrieve("x") == []
    index.insert(document(another(tmp_path / "new.png")))
    assert found(retriever) == {"new"}


def test_refresh_detects_new_and_changed_documents_only(index, folder, tmp_path):
    assert index.refresh_ref_docs(load_images(folder)) == [False] * 20
    another(folder / "red-circle.png")
    documents = load_images(folder)
    documents[1].set_content("an empty square")
    documents.append(document(another(tmp_path / "new.png")))
    assert index.refresh_ref_docs(documents) == [True, True, *[False] * 18, True]
    stored = index.stored
    assert stored.records[stored.rows_by_id["red-square"]].captions == ("an empty square",)
    assert index.docstore.get_node("red-square").text == "an empty square"
    assert found(everything(index)) == set(stored.rows_by_id) == set(index.docstore.docs)
    assert len(stored.records) == 21
    assert index.refresh_ref_docs(documents) == [False] * 21


def test_replaced_file_is_detected_without_a_content_hash(make, tmp_path):
    path = another(tmp_path / "new.png")
    index = make([document(path)], scheme="numeric")
    assert index.refresh_ref_docs([document(path)]) == [False]
    another(path, "purple")
    assert index.refresh_ref_docs([document(path)]) == [True]


def test_metadata_update_keeps_the_identifier(make, folder):
    """The scheme numeric would give a new image the next number."""
    index = make(load_images(folder), scheme="numeric")
    before = index.stored.identifiers[index.stored.rows_by_id["red-square"]]
    changed = next(d for d in load_images(folder) if d.id_ == "red-square")
    changed.metadata["color"] = "crimson"
    index.update_ref_doc(changed)
    stored = index.stored
    assert stored.identifiers[stored.rows_by_id["red-square"]] == before
    assert stored.records[stored.rows_by_id["red-square"]].metadata["color"] == "crimson"


async def test_async_edits_match_the_sync_edits(index, folder, tmp_path):
    await index.ainsert(document(another(tmp_path / "new.png")))
    await index.adelete_ref_doc("red-circle", delete_from_docstore=True)
    changed = next(d for d in load_images(folder) if d.id_ == "red-square")
    changed.set_content("an empty square")
    await index.aupdate_ref_doc(changed)
    assert (await index.arefresh_ref_docs(load_images(folder)[:3])) == [True, True, False]
    hits = await everything(index).aretrieve("x")
    assert {hit.node.node_id for hit in hits} == set(index.stored.rows_by_id) == set(index.docstore.docs)


RELOAD = """
import sys
from llama_index.core import StorageContext, load_index_from_storage
from llama_index_genret import FakeScorer, GenerativeImageIndex

index = load_index_from_storage(StorageContext.from_defaults(persist_dir=sys.argv[1]), scorer=FakeScorer(1000))
assert isinstance(index, GenerativeImageIndex)
assert "torch" not in sys.modules
for hit in index.as_retriever(similarity_top_k=5).retrieve("red circle"):
    print(hit.node.node_id, hit.score, hit.node.text, sep="\\t")
"""


def test_new_process_loads_the_index_and_recalls_the_same(index, tmp_path):
    index.storage_context.persist(tmp_path / "persisted")
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "persisted")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    hits = index.as_retriever(similarity_top_k=5).retrieve("red circle")
    assert printed == "".join(f"{hit.node.node_id}\t{hit.score}\t{hit.node.text}\n" for hit in hits)


def test_moved_folder_is_passed_on_load_and_can_be_edited(index, tmp_path):
    index.storage_context.persist(tmp_path / "persisted")
    moved = shutil.move(index.folder, tmp_path / "moved")
    storage = StorageContext.from_defaults(persist_dir=str(tmp_path / "persisted"))
    loaded = load_index_from_storage(storage, index_dir=moved, scorer=FakeScorer(1000), device="cpu")
    loaded.insert(document(another(tmp_path / "new.png")))
    loaded.delete_ref_doc("red-bar")
    assert found(everything(loaded)) == set(load_index(tmp_path / "moved").rows_by_id)
    assert len(load_index(tmp_path / "moved").records) == 20


def test_edit_by_another_process_is_kept(index, tmp_path):
    retriever = everything(index)
    remove_images(load_index(index.folder), ["red-bar"])
    index.insert(document(another(tmp_path / "new.png")))
    assert found(retriever) == found(everything(index)) == set(load_index(index.folder).rows_by_id)
    assert "red-bar" not in found(retriever)


def test_untrained_index_raises_not_trained(make, folder):
    index = make(load_images(folder), scorer=None)
    assert index.untrained_ids() == list(index.stored.rows_by_id)
    with pytest.raises(NotTrained, match="train"):
        index.as_retriever()


def test_query_engine_sends_images_to_the_model(index):
    chats.clear()
    answer = index.as_query_engine(llm=RecordingLLM(), similarity_top_k=3).query("Which color?")
    assert image_counts() == [3]
    assert len(answer.source_nodes) == 3


@pytest.mark.parametrize("mode", [ChatMode.BEST, ChatMode.CONTEXT, ChatMode.CONDENSE_PLUS_CONTEXT])
def test_chat_engine_sends_images_in_every_turn(index, mode):
    chats.clear()
    chat = index.as_chat_engine(
        mode, llm=RecordingLLM(), memory=memory(), similarity_top_k=2, node_postprocessors=[SimilarityPostprocessor()]
    )
    chat.chat("Which color?")
    chat.chat("And which shape?")
    assert [n for n in image_counts() if n] == [2, 2]
    assert chats[0][-1].blocks[-1].text == "Which color?"


def test_chat_continues_without_a_missing_image(index, folder):
    chats.clear()
    gone = index.as_retriever(similarity_top_k=1).retrieve("Which color?")[0].node
    (folder / f"{gone.node_id}.png").unlink()
    index.as_chat_engine(llm=RecordingLLM(), similarity_top_k=2, memory=memory()).chat("Which color?")
    assert image_counts() == [1]
    assert chats[0][-1].blocks[-1].text == f"{gone.text}\n(The picture {gone.node_id} cannot be shown.)\n\nWhich color?"


def test_condense_question_chat_uses_the_query_engine(index):
    chats.clear()
    chat = index.as_chat_engine(ChatMode.CONDENSE_QUESTION, llm=RecordingLLM(), similarity_top_k=2, memory=memory())
    chat.chat("Which color?")
    assert image_counts() == [2]


def test_index_trains_recalls_answers_and_updates(make, folder, tmp_path):
    index = make(load_images(folder), scorer=None)
    index.train(TrainOptions(max_steps=2, lora_rank=2), show_progress=False)
    assert index.untrained_ids() == []
    engine = index.as_query_engine(similarity_top_k=2)
    answer = engine.query("What is in the picture?")
    assert len(answer.source_nodes) == 2
    retriever = everything(index)
    index.insert(document(another(tmp_path / "new.png")))
    assert index.untrained_ids() == ["new"]
    assert "new" in found(retriever)
    before = {hit.node.node_id: hit.score for hit in retriever.retrieve("x")}
    index.train(TrainOptions(max_steps=2, lora_rank=2), update=True, show_progress=False)
    assert index.untrained_ids() == []
    after = {hit.node.node_id: hit.score for hit in retriever.retrieve("x")}
    assert before.keys() == after.keys()
    assert before != after


@pytest.mark.skipif(find_spec("llama_index.readers") is not None, reason="llama-index-readers-file is installed")
def test_stock_reader_without_its_extra_is_an_error(make, folder):
    (document, *_) = SimpleDirectoryReader(input_files=[folder / "red-bar.png"]).load_data()
    with pytest.raises(ImageError, match="load_images"):
        make([document])
