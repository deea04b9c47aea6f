"""Convert between LlamaIndex's documents and nodes and the records of an index.

A document with an image becomes one node. The id of the node is the image id: `image_id` in the metadata, else the id
of the document. Its text is its captions, one per line. The metadata are flat. The hash of a document includes the
content of its image (`content_sha256`), so that `refresh_ref_docs` detects a replaced file.

Depends on LlamaIndex's documents, files and records; independent of indexes and models.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    MediaResource,
    NodeRelationship,
    TransformComponent,
)
from pydantic import AnyUrl

from llama_index_genret.corpus import Question, Record, Scalar, read_corpus
from llama_index_genret.corpus.images import decode_image, image_sha256, load_image, sniff_mime
from llama_index_genret.errors import DuplicateImage, ImageError, MetadataError
from llama_index_genret.files import make_folder, write_file, writing
from llama_index_genret.llamaindex.nodes import OWN_KEYS, OWN_PREFIX

QUESTIONS = f"{OWN_PREFIX}questions"
"""Metadata key of the questions of an image, as JSON. They are training data and hidden from models at query time."""


def load_images(folder: Path | str, *, skip_broken: bool = False) -> list[ImageDocument]:
    """Return the images of a folder as documents with stable ids.

    Args:
        folder: a folder that `read_corpus` reads.
        skip_broken: skip broken images, default False.

    Raises:
        CorpusError: see `read_corpus`.
    """
    return [_document(record) for record in read_corpus(folder, skip_broken=skip_broken)]


def _document(record: Record) -> ImageDocument:
    questions = json.dumps([asdict(question) for question in record.questions], ensure_ascii=False)
    metadata = {**record.metadata, **({QUESTIONS: questions} if record.questions else {})}
    document = ImageDocument(id_=record.image_id, text="\n".join(record.captions), metadata=metadata)
    _seal(document, record.image_id, record.path, record.sha256)
    return document


def sealed_document(document: BaseNode, pictures: Path) -> Document:
    """Return a copy with the path and the sha256 of its image file.

    An image in memory is written to the folder `pictures`.

    Raises:
        ImageError: the document has no image, only the URL of one, or an unreadable one.
        MetadataError: the metadata are not flat.
    """
    if not isinstance(document, Document):
        raise ImageError(
            f"{document.node_id!r} is a {type(document).__name__}, no document. Pass nodes to insert_nodes."
        )
    resource = document.image_resource
    path = _file(document.id_, resource.path if resource else None, resource, pictures)
    copy = document.model_copy(deep=True)
    _seal(copy, _image_id(document), path, _check_image(document, path))
    return copy


def sealed_node(node: BaseNode, pictures: Path) -> ImageNode:
    """Return a copy of a node, as `sealed_document` does. The id of the node is its image id.

    Raises:
        ImageError, MetadataError: see `sealed_document`.
    """
    if not isinstance(node, ImageNode):
        raise ImageError(
            f"{node.node_id!r} is a {type(node).__name__}, no ImageNode. Pass documents to from_documents or insert. "
            "They need an image, for example from load_images(folder). Put texts into a text index."
        )
    content = MediaResource(data=node.image.encode()) if node.image else None
    address = MediaResource(url=AnyUrl(node.image_url)) if node.image_url else None
    path = _file(node.node_id, node.image_path, content or address, pictures)
    sha256 = _check_image(node, path)
    fields = {**node.to_dict(), "image": None, "image_url": None, "image_path": str(path)}
    copy = ImageNode.from_dict({**fields, "image_mimetype": sniff_mime(path)})
    _set_file_metadata(copy, node.node_id, path, sha256)
    return copy


class ImageDocumentParser(TransformComponent):
    """A transformation that makes one `ImageNode` per document with an image. Nodes pass unchanged.

    Set `disable_cache=True` in an `IngestionPipeline`: its cache treats all images without text as equal.
    """

    @classmethod
    def class_name(cls) -> str:
        """Return the name for LlamaIndex's pipelines."""
        return "GenretImageDocumentParser"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """See `TransformComponent`.

        Raises:
            ImageError: a document has no image.
        """
        return [_node(node) if isinstance(node, Document) else node for node in nodes]


def records_of(nodes: Iterable[ImageNode], folders: Iterable[Path] = ()) -> list[Record]:
    """Return the records of sealed nodes.

    Args:
        nodes: sealed nodes.
        folders: base folders for `file_name`. An image outside all of them uses the folder of its file.

    Raises:
        DuplicateImage: two nodes have the same id.
    """
    records: dict[str, Record] = {}
    for node in nodes:
        if node.node_id in records:
            raise DuplicateImage(f"two nodes have the id {node.node_id!r}. Give each image a unique id.")
        records[node.node_id] = _record(node, list(folders))
    return list(records.values())


def common_folder(nodes: Iterable[ImageNode]) -> Path:
    """Return the innermost folder that contains the images of all sealed nodes."""
    return Path(os.path.commonpath([str(Path(str(node.image_path)).parent) for node in nodes]))


def _record(node: ImageNode, folders: list[Path]) -> Record:
    path = Path(str(node.image_path))
    folder = next((folder for folder in folders if path.is_relative_to(folder)), path.parent)
    metadata = {key: value for key, value in node.metadata.items() if not _is_own(key)}
    return Record(
        image_id=node.node_id,
        path=path,
        file_name=path.relative_to(folder).as_posix(),
        sha256=node.metadata["content_sha256"],
        captions=tuple(line.strip() for line in node.text.split("\n") if line.strip()),
        metadata=metadata,
        questions=tuple(Question(**question) for question in json.loads(node.metadata.get(QUESTIONS, "[]"))),
    )


def _image_id(document: Document) -> str:
    return str(document.metadata.get("image_id") or document.id_)


def _is_own(key: str) -> bool:
    return key == "image_id" or key in OWN_KEYS or key.startswith(OWN_PREFIX)


def _node(document: Document) -> ImageNode:
    resource = document.image_resource
    if resource is None:
        raise ImageError(_no_image(document.id_))
    return ImageNode(
        id_=_image_id(document),
        text=document.text_resource.text or "" if document.text_resource else "",
        image=resource.data.decode() if resource.data else None,
        image_path=str(resource.path) if resource.path else None,
        image_url=str(resource.url) if resource.url else None,
        image_mimetype=resource.mimetype,
        extra_info=dict(document.metadata),
        excluded_llm_metadata_keys=list(document.excluded_llm_metadata_keys),
        excluded_embed_metadata_keys=list(document.excluded_embed_metadata_keys),
        relationships={NodeRelationship.SOURCE: document.as_related_node_info()},
    )


def _file(name: str, path: Path | str | None, resource: MediaResource | None, pictures: Path) -> Path:
    """Return the file of an image. An image in memory is written to `pictures`."""
    if path is not None:
        return Path(path).resolve()
    if resource is not None and resource.data:
        return _write_image(base64.b64decode(resource.data), pictures)
    if resource is not None and resource.url:
        raise ImageError(
            f"the image of {name!r} is a URL, {resource.url}. URLs are not fetched, because their content may change. "
            "Download it, and pass the file (image_path) or its content (image)."
        )
    raise ImageError(_no_image(name))


def _write_image(content: bytes, pictures: Path) -> Path:
    """Write an image file. Its name is the sha256 of the content."""
    load_image(content)
    suffix = sniff_mime(content).rpartition("/")[2].removeprefix("x-")
    path = pictures / f"{hashlib.sha256(content).hexdigest()}.{suffix}"
    with writing(pictures):
        make_folder(pictures)
        write_file(path, content)
    return path.resolve()


def _check_image(node: BaseNode, path: Path) -> str:
    """Check metadata and image, and return the sha256 of the image. An image that was checked before is not decoded."""
    for key, value in node.metadata.items():
        if not isinstance(value, Scalar):
            raise MetadataError(
                f"the metadata {key!r} of {node.node_id!r} is a {type(value).__name__}, expected text, a number, "
                "true, false or null. Flatten it into several keys."
            )
    try:
        json.dumps([node.node_id, node.get_content(), node.metadata], ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise MetadataError(
            f"the text or the metadata of {node.node_id!r} cannot be stored: {error}. Remove NaN, infinite numbers "
            "and halves of surrogate pairs."
        ) from error
    where = f"the image of {node.node_id!r}: "
    if not path.is_file() or image_sha256(path) != node.metadata.get("content_sha256"):
        decode_image(path, where)
    return image_sha256(path)


def _seal(document: Document, image_id: str, path: Path, sha256: str) -> None:
    document.image_resource = MediaResource(path=path, mimetype=sniff_mime(path))
    _set_file_metadata(document, image_id, path, sha256)


def _set_file_metadata(node: BaseNode, image_id: str, path: Path, sha256: str) -> None:
    """Add image id, path and sha256 to the metadata, and hide our keys from models. Modifies the node in place."""
    own = {"image_id": image_id, "file_path": str(path), "content_sha256": sha256}
    node.metadata = {**node.metadata, **own}
    hidden = [key for key in node.metadata if _is_own(key)]
    node.excluded_llm_metadata_keys = list(dict.fromkeys([*node.excluded_llm_metadata_keys, *hidden]))
    node.excluded_embed_metadata_keys = list(dict.fromkeys([*node.excluded_embed_metadata_keys, *hidden]))


def _no_image(name: str) -> str:
    return (
        f"{name!r} has no image: it is a text, or its file was read as text. Read images with load_images(folder). "
        "SimpleDirectoryReader reads images only with llama-index-readers-file."
    )
