"""LlamaIndex nodes of images: `GenretImageNode`, and the conversion from records and hits.

`GenretImageNode` sends both caption and image to the model, and works without its file. LlamaIndex's `ImageNode` drops
the caption, sends the file unchanged, and fails the query if the file is missing.

The metadata of a node are flat: those of the user, `image_id`, `file_path` and `content_sha256`. Keys that describe a
hit start with `genret_`. The id of a node is its image id.

Depends on LlamaIndex's nodes and on one record; independent of searches and models.
"""

from __future__ import annotations

import base64
import binascii
import logging
import math
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.llms.types import BaseContentBlock, ImageBlock, TextBlock
from llama_index.core.bridge.pydantic import Field
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import (
    ImageNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)

from llama_index_genret.corpus import Record
from llama_index_genret.corpus.images import sniff_mime
from llama_index_genret.errors import FilterError, ImageError, ImageNotShown
from llama_index_genret.llamaindex.model_images import MAX_IMAGE_PIXELS, ModelImage, model_image
from llama_index_genret.store import RecordFilters
from llama_index_genret.store.filters import Columns

log = logging.getLogger(__name__)

OWN_KEYS = ("file_path", "content_sha256")
"""Our metadata keys that are hidden from models, as is every key that starts with `OWN_PREFIX`."""

OWN_PREFIX = "genret_"

_TOKEN_SIDE = 28
"""Side in pixels of the square that is one token of Qwen2-VL and Qwen2.5-VL."""

_MOST_TOKENS = 2125
"""LlamaIndex's token estimate for any image."""

_TEXT_ONLY = (
    "recalled images go through a text-only engine, whose model gets captions but no image. Use "
    "`image_query_engine(retriever, llm)` or a query engine with `multimodal=True`. For chats, use a "
    "`MultiModal...ChatEngine`. For agents, use a `QueryEngineTool` over one of these."
)


class ModelImageBlock(ImageBlock):
    """An `ImageBlock` with a token count. tokens: the number that LlamaIndex uses to pack a prompt."""

    tokens: int = Field(exclude=True)

    async def aestimate_tokens(self, *args: Any, **kwargs: Any) -> int:
        """Return `tokens` without reading the file. See `ImageBlock.aestimate_tokens`."""
        return self.tokens


class MissingPictureBlock(TextBlock):
    """A text block in place of an unreadable image. It is never merged with the texts around it."""

    @classmethod
    async def amerge(  # type: ignore[override]  # the bases disagree
        cls, splits: Sequence[TextBlock], chunk_size: int, tokenizer: Any | None = None
    ) -> Sequence[TextBlock]:
        """Return the blocks unmerged. See `TextBlock.amerge`."""
        return splits


class GenretImageNode(ImageNode):
    """A recalled image.

    Its content is a text block with the caption and the visible metadata, if any, and an image block. The image block
    has the path of the file. The content is never inlined, so that no log or event contains it. An image of more than
    `max_image_pixels`, or one that is no plain RGB file, is converted once. An unreadable image becomes a text block
    that says so, and logs a warning.

    A docstore returns the node as a plain `ImageNode`. `of` restores it.

    max_image_pixels: limit of pixels, default `MAX_IMAGE_PIXELS`, None for no limit.
    image_tokens: tokens that the model uses per image. Default None: estimated from the image size.
    """

    max_image_pixels: int | None = MAX_IMAGE_PIXELS
    image_tokens: int | None = None

    @classmethod
    def of(cls, node: ImageNode, **options: Any) -> GenretImageNode:
        """Return a copy of any `ImageNode` as a `GenretImageNode`. `options` replace fields of it."""
        return cls.from_dict({**node.to_dict(), **options})

    def get_content(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> str:
        """Return the text for the mode. The mode LLM warns `ImageNotShown`. See `BaseNode.get_content`."""
        if metadata_mode == MetadataMode.LLM:
            warnings.warn(_TEXT_ONLY, ImageNotShown, stacklevel=1)  # one source line, so Python shows it once
        return super().get_content(metadata_mode)

    def get_content_blocks(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> list[BaseContentBlock]:
        """Return text, then image. The mode NONE returns only the image. See `BaseNode.get_content_blocks`."""
        text = "" if metadata_mode == MetadataMode.NONE else super().get_content(metadata_mode).strip()
        blocks: list[BaseContentBlock] = [TextBlock(text=text)] if text else []
        try:
            image = self.model_image()
        except ImageError as error:
            log.warning("the model does not get the image of %s: %s", self.node_id, error)
            return [*blocks, MissingPictureBlock(text=self.missing_text())]
        block = ModelImageBlock(path=image.path, image_mimetype=image.mime, tokens=self._tokens(image))
        return [*blocks, block]

    def model_image(self) -> ModelImage:
        """Return the image file that the model reads.

        Raises:
            ImageError: the image is missing, damaged, too large, or a URL. URLs are not fetched.
        """
        if self.image is not None:
            try:
                return model_image(base64.b64decode(self.image), max_pixels=self.max_image_pixels)
            except binascii.Error as error:
                raise ImageError(f"the image of the node {self.node_id!r} is not valid base64: {error}.") from error
        if self.image_path is None:
            raise ImageError(
                f"the node {self.node_id!r} has no image file (image_url={self.image_url!r}). URLs are not fetched "
                "during a query. Download it, and set image_path."
            )
        return model_image(Path(self.image_path), max_pixels=self.max_image_pixels)

    def missing_text(self) -> str:
        """Return the text that the model reads in place of an unreadable image."""
        return f"(The picture {self.node_id} cannot be shown.)"

    def _tokens(self, image: ModelImage) -> int:
        if self.image_tokens is not None:
            return self.image_tokens
        tokens = math.ceil(image.width / _TOKEN_SIDE) * math.ceil(image.height / _TOKEN_SIDE)
        return min(tokens + 2, _MOST_TOKENS)  # with the tokens that begin and end an image


class ReadablePictures(BaseNodePostprocessor):
    """A postprocessor for engines that open `image_path` themselves: LlamaIndex's multimodal chat engines.

    It sets `image_path` of each image node to the file that the model reads. A node with an unreadable image becomes a
    text node with its caption. Scores, ids and metadata stay. Plain `ImageNode`s, such as those of BM25, are accepted.

    max_image_pixels: limit of pixels for plain `ImageNode`s, default `MAX_IMAGE_PIXELS`, None for no limit.
    """

    max_image_pixels: int | None = MAX_IMAGE_PIXELS

    @classmethod
    def class_name(cls) -> str:
        """Return the name for LlamaIndex's events."""
        return "GenretReadablePictures"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return [NodeWithScore(node=self._readable(found.node), score=found.score) for found in nodes]

    def _readable(self, node: Any) -> Any:
        if not isinstance(node, ImageNode):
            return node
        whole = (
            node
            if isinstance(node, GenretImageNode)
            else GenretImageNode.of(node, max_image_pixels=self.max_image_pixels)
        )
        try:
            image = whole.model_image()
        except ImageError as error:
            log.warning("the model does not get the image of %s: %s", node.node_id, error)
            fields = {name: getattr(node, name) for name in TextNode.model_fields}
            return TextNode(**{**fields, "text": "\n".join(filter(None, [node.text, whole.missing_text()]))})
        return whole.model_copy(update={"image_path": str(image.path), "image_mimetype": image.mime, "image": None})


def node_of(record: Record) -> GenretImageNode:
    """Return the node of a record. Its `text` is the first caption, and its source document has the image id."""
    own = {"image_id": record.image_id, "file_path": str(record.path), "content_sha256": record.sha256}
    return GenretImageNode(
        id_=record.image_id,
        text=record.captions[0] if record.captions else "",
        image_path=str(record.path),
        extra_info={**record.metadata, **own},
        excluded_embed_metadata_keys=list(own),
        excluded_llm_metadata_keys=list(own),
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=record.image_id)},
    )


def still_passes(node: ImageNode, record: Record, filters: RecordFilters, keys: Collection[str]) -> bool:
    """Return whether the docstore node of a record passes the filters that the record has passed.

    For each of the `keys` of the index, the metadata of the node count, else those of the record. The result is False
    if the filters do not apply to the values.
    """
    stored = {key: node.metadata[key] for key in keys if key in node.metadata}
    if all(value == record.metadata.get(key) for key, value in stored.items()):
        return True
    try:
        return bool(Columns([{**dict.fromkeys(keys), **record.metadata, **stored}]).record_mask(filters)[0])
    except (FilterError, TypeError):
        return False


def hit_node(
    node: ImageNode, hit: dict[str, Any], *, llm_metadata_keys: Collection[str], max_image_pixels: int | None
) -> GenretImageNode:
    """Return a copy of `node` with the facts of a hit in its metadata, and with the current type of its file.

    An image in memory becomes a file of this process, so that no log or event of the node contains it.

    Args:
        node: node of the recalled image.
        hit: metadata that describe the hit.
        llm_metadata_keys: metadata keys that the answering model reads.
        max_image_pixels: limit of pixels, None for no limit.
    """
    fields = node.to_dict()
    metadata = {**fields["metadata"], **hit}
    hidden = [key for key in metadata if key in OWN_KEYS or key.startswith(OWN_PREFIX)]
    fields |= {
        "metadata": metadata,
        "excluded_llm_metadata_keys": [key for key in metadata if key not in llm_metadata_keys],
        "excluded_embed_metadata_keys": list(dict.fromkeys([*fields["excluded_embed_metadata_keys"], *hidden])),
        "max_image_pixels": max_image_pixels,
    }
    if node.image is not None:
        fields |= {"image": None, **_image_file(GenretImageNode.of(node, max_image_pixels=max_image_pixels))}
    elif node.image_path is not None:
        fields["image_mimetype"] = _mime(node)
    return GenretImageNode.from_dict(fields)


def _image_file(node: GenretImageNode) -> dict[str, str | None]:
    try:
        image = node.model_image()
    except ImageError as error:
        log.warning("the image of %s cannot be read: %s", node.node_id, error)
        return {}
    return {"image_path": str(image.path), "image_mimetype": image.mime}


def _mime(node: ImageNode) -> str | None:
    try:
        return sniff_mime(node.image_path or "")
    except ImageError as error:
        log.warning("the image of %s cannot be read: %s", node.node_id, error)
        return node.image_mimetype
