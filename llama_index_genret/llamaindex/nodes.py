"""LlamaIndex nodes of images: `GenretImageNode`, and how a record or a hit becomes one.

`GenretImageNode` sends both caption and picture to the model, and outlives its file. LlamaIndex's `ImageNode` drops the
caption, sends the file unchanged, and fails the query where the file is gone.

Metadata of a node are flat: the user's own, `image_id`, `file_path` and `content_sha256`. Keys that describe a hit
start with `genret_`. The id of a node is the id of its image.

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
"""Metadata of ours that no model is shown; so is every key that begins with OWN_PREFIX."""

OWN_PREFIX = "genret_"

_TOKEN_SIDE = 28
"""Pixels of the side of the square that Qwen2-VL and Qwen2.5-VL make one token of."""

_MOST_TOKENS = 2125
"""LlamaIndex's estimate for any image."""


_TEXT_ONLY = (
    "recalled images go through an engine that gives its model text only: captions, and no picture. Use "
    "`image_query_engine(retriever, llm)`, or a query engine with `multimodal=True`; for chats a "
    "`MultiModal...ChatEngine`; for agents a `QueryEngineTool` over one of these."
)


class ModelImageBlock(ImageBlock):
    """An `ImageBlock` of a small file. tokens: how many LlamaIndex counts it as when it packs a prompt."""

    tokens: int = Field(exclude=True)

    async def aestimate_tokens(self, *args: Any, **kwargs: Any) -> int:
        """See `ImageBlock.aestimate_tokens`; reads no file."""
        return self.tokens


class MissingPictureBlock(TextBlock):
    """What a model is told where it cannot be shown a picture; never merged with the texts around it."""

    @classmethod
    async def amerge(  # type: ignore[override]  # the bases disagree
        cls, splits: Sequence[TextBlock], chunk_size: int, tokenizer: Any | None = None
    ) -> Sequence[TextBlock]:
        """See `TextBlock.amerge`."""
        return splits


class GenretImageNode(ImageNode):
    """A recalled image.

    Its content is one text block, the caption and the metadata that the mode shows, where there is any, and then the
    picture: by its path, never inlined, so that no log or event holds it. A picture of more than `max_image_pixels`,
    or one that is no plain RGB file, is converted once. Where it cannot be read there is a text block instead, that
    says so, and a warning in the log.

    A docstore gives it back as the `ImageNode` that it is; `of` makes it whole again.

    max_image_pixels: None for pictures of any size. image_tokens: what the model makes of a picture, where it is
    known; else it is estimated by the picture's size.
    """

    max_image_pixels: int | None = MAX_IMAGE_PIXELS
    image_tokens: int | None = None

    @classmethod
    def of(cls, node: ImageNode, **options: Any) -> GenretImageNode:
        """A copy of any `ImageNode`; `options` replace fields of it."""
        return cls.from_dict({**node.to_dict(), **options})

    def get_content(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> str:
        """See `BaseNode.get_content`. Warns `ImageNotShown` of the text that a model reads instead."""
        if metadata_mode == MetadataMode.LLM:
            warnings.warn(_TEXT_ONLY, ImageNotShown, stacklevel=1)  # of one line: Python shows it once
        return super().get_content(metadata_mode)

    def get_content_blocks(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> list[BaseContentBlock]:
        """See `BaseNode.get_content_blocks`: text, then picture; of the mode NONE the picture only."""
        text = "" if metadata_mode == MetadataMode.NONE else super().get_content(metadata_mode).strip()
        blocks: list[BaseContentBlock] = [TextBlock(text=text)] if text else []
        try:
            picture = self.model_image()
        except ImageError as error:
            log.warning("the model is not shown the picture of %s: %s", self.node_id, error)
            return [*blocks, MissingPictureBlock(text=self.missing_text())]
        block = ModelImageBlock(path=picture.path, image_mimetype=picture.mime, tokens=self._tokens(picture))
        return [*blocks, block]

    def model_image(self) -> ModelImage:
        """The file that the model is shown.

        Raises:
            ImageError: it is missing, damaged, too large, or an address: nothing is fetched.
        """
        if self.image is not None:
            try:
                return model_image(base64.b64decode(self.image), max_pixels=self.max_image_pixels)
            except binascii.Error as error:
                raise ImageError(f"the image of the node {self.node_id!r} is no base64: {error}.") from error
        if self.image_path is None:
            raise ImageError(
                f"the node {self.node_id!r} has no image file (image_url={self.image_url!r}); none is fetched from an "
                "address while a query runs. Download it, and set image_path."
            )
        return model_image(Path(self.image_path), max_pixels=self.max_image_pixels)

    def missing_text(self) -> str:
        """What the model is told where it cannot be shown the picture."""
        return f"(The picture {self.node_id} cannot be shown.)"

    def _tokens(self, picture: ModelImage) -> int:
        if self.image_tokens is not None:
            return self.image_tokens
        tokens = math.ceil(picture.width / _TOKEN_SIDE) * math.ceil(picture.height / _TOKEN_SIDE)
        return min(tokens + 2, _MOST_TOKENS)  # with what begins and ends an image


class ReadablePictures(BaseNodePostprocessor):
    """Makes nodes safe for engines that open `image_path` themselves: LlamaIndex's multimodal chat engines.

    Each image node names the file that its model is to be shown; one whose picture cannot be read becomes a text node
    with its caption. Scores, ids and metadata stay. Also makes plain `ImageNode`s, as BM25 gives them, whole.
    """

    max_image_pixels: int | None = MAX_IMAGE_PIXELS

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's events."""
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
            picture = whole.model_image()
        except ImageError as error:
            log.warning("the model is not shown the picture of %s: %s", node.node_id, error)
            fields = {name: getattr(node, name) for name in TextNode.model_fields}
            return TextNode(**{**fields, "text": "\n".join(filter(None, [node.text, whole.missing_text()]))})
        return whole.model_copy(update={"image_path": str(picture.path), "image_mimetype": picture.mime, "image": None})


def node_of(record: Record) -> GenretImageNode:
    """The node of an image of an index folder: `text` is its first caption, the source is the document of its id."""
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
    """Whether a node that stands for a record passes the filters that the record has passed.

    What its own metadata say of the index's `keys` counts; of what they do not say, the record's. It does not pass
    where that cannot be decided.
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
    """A copy of `node` with what is to be said of the hit in its metadata, and the type of the file as it is now.

    A picture in memory becomes a file of this process: no log or event that shows the node holds it.

    Args:
        llm_metadata_keys: what of the metadata the answering model is shown.
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
        fields |= {"image": None, **_file_of(GenretImageNode.of(node, max_image_pixels=max_image_pixels))}
    elif node.image_path is not None:
        fields["image_mimetype"] = _mime(node)
    return GenretImageNode.from_dict(fields)


def _file_of(node: GenretImageNode) -> dict[str, str | None]:
    try:
        picture = node.model_image()
    except ImageError as error:
        log.warning("the picture of %s cannot be read: %s", node.node_id, error)
        return {}
    return {"image_path": str(picture.path), "image_mimetype": picture.mime}


def _mime(node: ImageNode) -> str | None:
    try:
        return sniff_mime(node.image_path or "")
    except ImageError as error:
        log.warning("the picture of %s cannot be read: %s", node.node_id, error)
        return node.image_mimetype
