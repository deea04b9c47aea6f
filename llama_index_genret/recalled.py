"""From a record of an index to a LlamaIndex node, and from a hit to the node that a retriever returns.

The metadata of a node are flat: the user's own, `image_id`, `file_path` and `content_sha256`, and those of a hit begin
with `genret_`. The id of a node is the id of its image.

Knows LlamaIndex's nodes and one record; nothing of searches or models.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from llama_index.core.schema import ImageNode, NodeRelationship, RelatedNodeInfo

from llama_index_genret.corpus import Record
from llama_index_genret.errors import FilterError, ImageError
from llama_index_genret.image_node import OWN_KEYS, OWN_PREFIX, GenretImageNode
from llama_index_genret.images import sniff_mime
from llama_index_genret.store import MetadataFilters
from llama_index_genret.store.filters import Columns

log = logging.getLogger(__name__)


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


def still_passes(node: ImageNode, record: Record, filters: MetadataFilters, keys: Collection[str]) -> bool:
    """Whether a node that stands for a record passes the filters that the record has passed.

    What its own metadata say of the index's `keys` counts; of what they do not say, the record's. It does not pass
    where that cannot be decided.
    """
    stored = {key: node.metadata[key] for key in keys if key in node.metadata}
    if all(value == record.metadata.get(key) for key, value in stored.items()):
        return True
    try:
        return bool(Columns([{**dict.fromkeys(keys), **record.metadata, **stored}]).passing(filters)[0])
    except (FilterError, TypeError):
        return False


def recalled_node(
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
        picture = node.shown()
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
