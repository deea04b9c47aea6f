"""`GenretImageNode` sends caption and image to a model, for any kind of image file."""

import base64
import json
import logging
from pathlib import Path

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.indices.prompt_helper import ChatPromptHelper
from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from PIL import Image

from llama_index_genret import GenretImageNode, ReadablePictures
from llama_index_genret.errors import ImageError
from llama_index_genret.llamaindex.model_images import model_image
from llama_index_genret.llamaindex.query_engine import LookAndAnswer


def draw(path, mode="RGB", size=(64, 48), format="PNG", **options):
    Image.linear_gradient("L").resize(size).convert(mode).save(path, format, **options)
    return path


def make(path, **options):
    fields = {"id_": "one", "text": "a red circle", "metadata": {"color": "red", "file_path": str(path)}}
    return GenretImageNode(
        **{**fields, "image_path": str(path), "excluded_llm_metadata_keys": ["file_path"], **options}
    )


def kinds(blocks):
    return [block.block_type for block in blocks]


def opened(block):
    return Image.open(block.resolve_image())


def test_caption_and_metadata_are_one_text_before_the_image(tmp_path):
    text, image = make(draw(tmp_path / "a.png")).get_content_blocks(MetadataMode.LLM)
    assert text.text == "color: red\n\na red circle"
    assert (image.block_type, image.image_mimetype) == ("image", "image/png")


def test_citations_get_only_the_image(tmp_path):
    assert kinds(make(draw(tmp_path / "a.png")).get_content_blocks()) == ["image"]


def test_node_without_caption_and_metadata_has_no_text(tmp_path):
    node = make(draw(tmp_path / "a.png"), text="", excluded_llm_metadata_keys=["color", "file_path"])
    assert kinds(node.get_content_blocks(MetadataMode.LLM)) == ["image"]


def test_small_plain_image_is_sent_unchanged(tmp_path):
    path = draw(tmp_path / "a.png")
    (image,) = make(path).get_content_blocks()
    assert image.path == path


@pytest.mark.parametrize(
    ("name", "mode", "format"),
    [
        ("a.tiff", "RGB", "TIFF"),
        ("b.jpg", "CMYK", "JPEG"),
        ("c.gif", "P", "GIF"),
        ("d.png", "RGBA", "PNG"),
        ("e.bmp", "RGB", "BMP"),
    ],
)
def test_other_image_formats_are_sent_as_rgb(tmp_path, name, mode, format):
    (image,) = make(draw(tmp_path / name, mode, format=format)).get_content_blocks()
    shown = opened(image)
    assert (shown.mode, shown.size, shown.get_format_mimetype()) == ("RGB", (64, 48), image.image_mimetype)
    assert image.image_mimetype in {"image/png", "image/jpeg"}


def test_image_without_suffix_has_the_type_of_its_content(tmp_path):
    (image,) = make(draw(tmp_path / "picture", format="JPEG")).get_content_blocks()
    assert image.inline_url().startswith("data:image/jpeg;base64,")


def test_rotated_photograph_is_sent_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (image,) = make(draw(tmp_path / "a.jpg", format="JPEG", exif=exif)).get_content_blocks()
    assert opened(image).size == (48, 64)


@pytest.mark.parametrize(("size", "limit", "shown"), [((400, 100), 10_000, (200, 50)), ((9000, 1), 100, (100, 1))])
def test_large_image_is_scaled_down_in_proportion(tmp_path, size, limit, shown):
    (image,) = make(draw(tmp_path / "a.png", size=size), max_image_pixels=limit).get_content_blocks()
    assert opened(image).size == shown


def test_scaled_image_is_cached_until_its_file_changes(tmp_path):
    path = draw(tmp_path / "a.png", size=(200, 200))
    first = model_image(path, max_pixels=100)
    written = first.path.stat().st_mtime_ns
    again = model_image(path, max_pixels=100)
    assert (again, again.path.stat().st_mtime_ns) == (first, written)
    draw(path, size=(300, 200))
    assert model_image(path, max_pixels=100).path != first.path


def test_image_size_is_unlimited_if_max_pixels_is_none(tmp_path):
    path = draw(tmp_path / "a.png", size=(2000, 1000))
    (whole,) = make(path, max_image_pixels=None).get_content_blocks()
    (scaled,) = make(path).get_content_blocks()
    assert opened(whole).size == (2000, 1000)
    assert opened(scaled).size == (1448, 724)


async def test_image_tokens_are_estimated_by_size_or_given(tmp_path):
    path = draw(tmp_path / "a.png", size=(280, 140))
    (estimated,) = make(path).get_content_blocks()
    (given,) = make(path, image_tokens=64).get_content_blocks()
    assert (await estimated.aestimate_tokens(), await given.aestimate_tokens()) == (52, 64)


async def test_five_small_images_fit_into_a_small_context(tmp_path):
    """LlamaIndex counts 2,125 tokens for its own block, so that only one fits into a request."""
    own = [ChatMessage(blocks=make(draw(tmp_path / f"{i}.png")).get_content_blocks()) for i in range(5)]
    stock = [
        ChatMessage(blocks=ImageNode(image_path=str(tmp_path / f"{i}.png")).get_content_blocks()) for i in range(5)
    ]
    helper = ChatPromptHelper(context_window=3900, num_output=256)
    prompt = LookAndAnswer().partial_format(query_str="x")
    assert len(await helper.arepack(prompt, own)) == 1
    assert len(await helper.arepack(prompt, stock)) == 5


def broken(path):
    path.write_bytes(draw(path).read_bytes()[:70])


def not_an_image(path):
    path.write_text("<html>404 Not Found</html>")


@pytest.mark.parametrize("spoil", [Path.unlink, broken, not_an_image], ids=["gone", "broken", "not an image"])
def test_unreadable_image_becomes_text_and_logs_a_warning(tmp_path, caplog, spoil):
    path = draw(tmp_path / "a.png")
    node = make(path)
    spoil(path)
    with caplog.at_level(logging.WARNING):
        caption, missing = node.get_content_blocks(MetadataMode.LLM)
    assert caption.text.endswith("a red circle")
    assert "one cannot be shown" in missing.text
    assert str(path) in caplog.text
    assert str(path) not in missing.text


def test_image_with_too_many_pixels_becomes_text(tmp_path, monkeypatch):
    path = draw(tmp_path / "a.png", size=(300, 200))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    assert kinds(make(path).get_content_blocks()) == ["text"]


def test_image_url_is_not_fetched():
    node = GenretImageNode(id_="far", image_url="http://127.0.0.1:9/cat.png")
    with pytest.raises(ImageError, match="Download it"):
        node.model_image()
    assert kinds(node.get_content_blocks()) == ["text"]


def test_image_in_memory_is_sent_from_a_file(tmp_path):
    content = draw(tmp_path / "a.png").read_bytes()
    (image,) = GenretImageNode(image=base64.b64encode(content).decode()).get_content_blocks()
    assert (image.image, opened(image).size) == (None, (64, 48))


async def test_missing_image_text_is_sent_without_show_text(tmp_path):
    path = draw(tmp_path / "a.png")
    there, gone = make(path), make(tmp_path / "gone.png", id_="two")
    messages = [ChatMessage(blocks=node.get_content_blocks(MetadataMode.LLM)) for node in (there, gone, gone)]
    (packed,) = await ChatMessage.amerge(messages, chunk_size=10_000)
    (shown,) = LookAndAnswer().format_messages(context_messages=[packed], query_str="Which color?")
    (read,) = LookAndAnswer(show_text=True).format_messages(context_messages=[packed], query_str="Which color?")
    missing = ["(The picture two cannot be shown.)"] * 2
    assert [getattr(block, "text", "picture") for block in shown.blocks] == ["picture", *missing, "Which color?"]
    assert [getattr(block, "text", "picture") for block in read.blocks].count("color: red\n\na red circle") == 3


def test_node_and_message_texts_contain_no_base64(tmp_path):
    node = make(draw(tmp_path / "a.png"))
    message = ChatMessage(blocks=node.get_content_blocks(MetadataMode.LLM))
    content = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()[:40]
    for text in (
        str(node),
        repr(node),
        node.model_dump_json(),
        node.get_content(),
        repr(message),
        message.model_dump_json(),
    ):
        assert content not in text


def test_node_from_a_docstore_can_be_restored(tmp_path):
    node = make(draw(tmp_path / "a.png", size=(200, 200)))
    docstore = SimpleDocumentStore()
    docstore.add_documents([node])
    stored = SimpleDocumentStore.from_dict(json.loads(json.dumps(docstore.to_dict()))).get_node("one")
    assert type(stored) is ImageNode
    whole = GenretImageNode.of(stored, max_image_pixels=100)
    assert (whole.metadata, whole.text, whole.hash) == (node.metadata, node.text, stored.hash)
    assert opened(whole.get_content_blocks()[0]).size == (10, 10)


def test_readable_pictures_makes_nodes_readable(tmp_path):
    plain = ImageNode(id_="one", text="a red circle", image_path=str(draw(tmp_path / "a.jpg", "CMYK", format="JPEG")))
    gone = make(tmp_path / "gone.png", id_="two")
    found = [NodeWithScore(node=plain, score=0.5), NodeWithScore(node=gone, score=0.25)]
    first, second = ReadablePictures().postprocess_nodes(found)
    with Image.open(first.node.image_path) as picture:
        assert picture.mode == "RGB"
    assert (type(second.node), second.node.node_id, second.score) == (TextNode, "two", 0.25)
    assert second.node.text == "a red circle\n(The picture two cannot be shown.)"
    assert plain.image_path.endswith("a.jpg")


def test_max_image_pixels_below_1_is_an_error(tmp_path):
    with pytest.raises(ImageError, match="max_image_pixels=0"):
        model_image(draw(tmp_path / "a.png"), max_pixels=0)
