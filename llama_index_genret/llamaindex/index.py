"""`GenerativeImageIndex`: a LlamaIndex index with nodes in any docstore and a generative model in an index folder.

    storage context   the nodes, the hashes of documents, and the path of the folder
    index folder      identifiers, trie and trained weights, for `genret train`, `genret serve` and `genret query`

Creating the index assigns identifiers. The model recalls the images after training: `train`, or `genret train` on the
folder. An inserted image gets its identifier at once, but text queries rarely find it before the next training:
`untrained_ids` lists such images. A deleted image is not found any more. Existing retrievers and engines see both.

Depends on LlamaIndex and the folder; independent of searches. Needs torch only to assign identifiers, or without a
server.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any
from weakref import WeakSet

from llama_index.core.chat_engine import CondenseQuestionChatEngine
from llama_index.core.chat_engine.multi_modal_condense_plus_context import MultiModalCondensePlusContextChatEngine
from llama_index.core.chat_engine.multi_modal_context import MultiModalContextChatEngine
from llama_index.core.chat_engine.types import BaseChatEngine, ChatMode
from llama_index.core.data_structs.data_structs import IndexStruct
from llama_index.core.data_structs.registry import INDEX_STRUCT_TYPE_TO_INDEX_STRUCT_CLASS
from llama_index.core.indices.base import BaseIndex
from llama_index.core.indices.registry import INDEX_STRUCT_TYPE_TO_INDEX_CLASS
from llama_index.core.ingestion import run_transformations
from llama_index.core.llms import LLM
from llama_index.core.llms.utils import resolve_llm
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import BaseNode, Document, ImageNode, TransformComponent
from llama_index.core.storage.docstore.types import RefDocInfo
from tqdm.auto import tqdm

from llama_index_genret import store
from llama_index_genret.corpus import Corpus, Record
from llama_index_genret.errors import CorpusError
from llama_index_genret.identifiers import Alphabet
from llama_index_genret.llamaindex.backends import IndexModels
from llama_index_genret.llamaindex.documents import (
    ImageDocumentParser,
    common_folder,
    records_of,
    sealed_document,
    sealed_node,
)
from llama_index_genret.llamaindex.model_images import MAX_IMAGE_PIXELS
from llama_index_genret.llamaindex.nodes import ReadablePictures
from llama_index_genret.llamaindex.query_engine import QUESTION_AFTER_CONTEXT, image_query_engine
from llama_index_genret.llamaindex.retriever import GenerativeImageRetriever
from llama_index_genret.models.encoder import Encoder
from llama_index_genret.store import PICTURES, add_images, load_index, remove_images
from llama_index_genret.store.model_state import unseen_rows

STRUCT_TYPE = "genret"

_RETRIEVER_OPTIONS = frozenset(inspect.signature(GenerativeImageRetriever.__init__).parameters) - {"kwargs", "encoder"}

_ENGINE_OPTIONS = frozenset(
    name
    for make in (
        RetrieverQueryEngine.from_args,
        get_response_synthesizer,
        image_query_engine,
        MultiModalContextChatEngine.from_defaults,
        MultiModalCondensePlusContextChatEngine.from_defaults,
        CondenseQuestionChatEngine.from_defaults,
    )
    for name in inspect.signature(make).parameters
) - {"kwargs"}

_CHATS: dict[ChatMode, tuple[Any, str]] = {
    ChatMode.CONTEXT: (MultiModalContextChatEngine, "context_template"),
    ChatMode.CONDENSE_PLUS_CONTEXT: (MultiModalCondensePlusContextChatEngine, "context_prompt"),
    ChatMode.BEST: (MultiModalCondensePlusContextChatEngine, "context_prompt"),
}
"""The multimodal chat engines, with the name of their argument for the prompt around the question."""


@dataclass
class GenretIndexStruct(IndexStruct):
    """The entry of an index in the storage context. folder: absolute path of the index folder."""

    folder: str = ""

    @classmethod
    def get_type(cls) -> Any:
        """Return the name of the struct in LlamaIndex's registries. Their enumeration cannot be extended."""
        return STRUCT_TYPE


class GenerativeImageIndex(BaseIndex[GenretIndexStruct]):
    """An index of images that a model recalls by generating their identifiers.

    Args:
        nodes: `ImageNode`s. Their ids are image ids. Pass documents to `from_documents`. An image in memory is written
            into the folder. An image that is only a URL is refused.
        index_dir: index folder, which must be free. For an index that is loaded: its new place, if it has moved.
        model: base model to train, a folder, a hub id or a loaded `Mllm`.
        encoder: embedding model of the index, which recalls before any training: an `Encoder`, a folder or hub id of
            sentence-transformers, a URL, or "none". Default None: `DEFAULT_ENCODER` where it is available. For an
            index that is loaded: its encoder, or the new place of that.
        scheme, scheme_options, alphabet, overwrite: how to assign identifiers, see `store.build.build_index`.
        api_base, api_key: URL and key of a server that `genret serve` started on the folder. The server then recalls
            and answers. Default None: a model in this process.
        llm: LLM that answers. An `OpenAILike` also gives the server that recalls. Default: the model that recalls.
        scorer: scorer that recalls, in place of the server and the model. Default None.
        device: torch device of models in this process, default "auto".
        kwargs: further arguments of `BaseIndex`.

    Raises:
        IndexExists: the folder is not free. CorpusError: there are no images, or an image is invalid.
    """

    index_struct_cls = GenretIndexStruct

    def __init__(
        self,
        nodes: Sequence[BaseNode] | None = None,
        *,
        index_dir: str | Path | None = None,
        model: Any = None,
        encoder: Encoder | str | None = None,
        scheme: str = "structured",
        scheme_options: dict[str, Any] | None = None,
        alphabet: Alphabet = "new",
        overwrite: bool = False,
        api_base: str | None = None,
        api_key: str = "EMPTY",
        llm: Any = None,
        scorer: Any = None,
        device: str = "auto",
        index_struct: GenretIndexStruct | None = None,
        transformations: list[TransformComponent] | None = None,
        **kwargs: Any,
    ) -> None:
        if index_dir is None and index_struct is None:
            raise CorpusError("an index of images needs a folder. Pass a free one as index_dir.")
        self._folder = Path(index_dir or index_struct.folder).absolute()  # type: ignore[union-attr]
        self._build_options: dict[str, Any] = {
            "scheme": scheme,
            "scheme_options": scheme_options,
            "alphabet": alphabet,
            "overwrite": overwrite,
        }
        self._edits = RLock()
        self._retrievers: WeakSet[GenerativeImageRetriever] = WeakSet()
        self._show_progress = kwargs.get("show_progress", False)
        self._models = IndexModels(
            model=model, encoder=encoder, api_base=api_base, api_key=api_key, llm=llm, scorer=scorer, device=device
        )
        if index_struct is not None:
            index_struct.folder = str(self._folder)
            self._index = load_index(self._folder)
        else:
            nodes = [sealed_node(node, self._folder / PICTURES) for node in nodes or []]
        transformations = transformations or [ImageDocumentParser()]
        super().__init__(nodes=nodes, index_struct=index_struct, transformations=transformations, **kwargs)

    @classmethod
    def from_documents(  # type: ignore[override]  # the folder is required
        cls, documents: Sequence[Document], *args: Any, index_dir: str | Path, **kwargs: Any
    ) -> GenerativeImageIndex:
        """Assign identifiers to the images of documents, and store their nodes.

        Raises:
            IndexExists, CorpusError: see the class. ImageError: a document has no image.
        """
        pictures = Path(index_dir).absolute() / PICTURES
        sealed = [sealed_document(document, pictures) for document in documents]
        kwargs["transformations"] = kwargs.get("transformations") or [ImageDocumentParser()]
        index = super().from_documents(sealed, *args, index_dir=index_dir, **kwargs)
        index._store_hashes(sealed)
        return index

    @property
    def folder(self) -> Path:
        """The index folder, for the command line and servers."""
        return self._folder

    @property
    def stored(self) -> store.Index:
        """The current version of the index in the folder, including training and edits by other processes."""
        with self._edits:
            if store.read_manifest(self._folder) != self._index.manifest:
                self._use(load_index(self._folder))
            return self._index

    def untrained_ids(self) -> list[str]:
        """Return the ids of images whose identifiers the model was not trained on. Before the first training: all.

        Recall of these images depends on their identifiers. It works well only if the identifier describes the image
        (`structured`, `semantic`), or if its symbol row was initialised from the image (`atomic`).
        """
        index = self.stored
        rows = unseen_rows(index) if index.is_trained else range(len(index.records))
        return [index.records[row].image_id for row in rows or []]

    def train(self, options: Any = None, *, update: bool = False, show_progress: bool = True) -> None:
        """Train the model on its images with `training.recipe.train`. A large corpus takes hours on a GPU.

        Args:
            options: `TrainOptions`, default those of `training.recipe.train`.
            update: train only an adapter on top, for images inserted since the last training. Default False.
            show_progress: draw a progress bar, default True.
        """
        from llama_index_genret.training.recipe import train

        trained = train(
            self.stored,
            options,
            update=update,
            encoder=self._models.encoder_choice,
            device=self._models.device,
            show_progress=show_progress,
        )
        with self._edits:
            self._use(trained)

    def as_retriever(self, **kwargs: Any) -> GenerativeImageRetriever:
        """Return a retriever of the nodes in the docstore. It sees every later edit and training of this index.

        Args:
            kwargs: options of `GenerativeImageRetriever`. Options of engines are ignored.

        Raises:
            NotTrained: the model has not been trained on the images yet.
            TypeError: an option is unknown. Ignoring `doc_ids` or a misspelt `filters` would return hidden images.
        """
        if unknown := kwargs.keys() - _RETRIEVER_OPTIONS - _ENGINE_OPTIONS:
            raise TypeError(
                f"unknown options {sorted(unknown)} of a retriever or engine of an image index. Options of retrievers: "
                f"{sorted(_RETRIEVER_OPTIONS - {'self', 'index', 'scorer'})}."
            )
        index = self.stored
        backend = self._models.recall_backend(index)
        options = {name: value for name, value in kwargs.items() if name in _RETRIEVER_OPTIONS}
        retriever = GenerativeImageRetriever(
            index,
            backend.scorer,
            encoder=backend.encoder,
            endpoint=backend.endpoint,
            docstore=self.docstore,
            callback_manager=self._callback_manager,
            **options,
        )
        self._retrievers.add(retriever)
        return retriever

    def as_query_engine(self, llm: Any = None, **kwargs: Any) -> RetrieverQueryEngine:
        """Return an `image_query_engine`, whose model receives the images.

        Args:
            llm: LLM that answers, default the one of the index.
            kwargs: options of the retriever and of the engine.
        """
        options = {name: value for name, value in kwargs.items() if name not in _RETRIEVER_OPTIONS}
        return image_query_engine(self.as_retriever(**kwargs), self._llm(llm), **options)

    def as_chat_engine(self, chat_mode: ChatMode = ChatMode.BEST, llm: Any = None, **kwargs: Any) -> BaseChatEngine:
        """Return a multimodal chat engine of LlamaIndex, whose model receives the images.

        Args:
            chat_mode: CONDENSE_PLUS_CONTEXT (also BEST, the default) and CONTEXT are multimodal engines, whose model
                receives no captions. CONDENSE_QUESTION uses `as_query_engine`. SIMPLE recalls nothing.
            llm: LLM that answers, default the one of the index.
            kwargs: options of the retriever and of the engine.
        """
        model = self._llm(llm)
        if chat_mode not in _CHATS:
            stock: BaseChatEngine = super().as_chat_engine(chat_mode, model, **kwargs)
            return stock
        options = {name: value for name, value in kwargs.items() if name not in _RETRIEVER_OPTIONS}
        engine, template = _CHATS[chat_mode]
        readable = ReadablePictures(max_image_pixels=kwargs.get("max_image_pixels", MAX_IMAGE_PIXELS))
        options["node_postprocessors"] = [*(options.get("node_postprocessors") or []), readable]
        options.setdefault(template, QUESTION_AFTER_CONTEXT)
        options.setdefault("system_prompt", "")
        chat: BaseChatEngine = engine.from_defaults(
            retriever=self.as_retriever(**kwargs), multi_modal_llm=model, **options
        )
        return chat

    def _llm(self, llm: Any) -> LLM:
        if llm:
            return resolve_llm(llm, callback_manager=self._callback_manager)
        return self._models.answer_llm(self.stored)

    @property
    def ref_doc_info(self) -> dict[str, RefDocInfo]:
        """The documents whose images are in the index, keyed by document id."""
        rows = self.stored.rows_by_id
        infos = self.docstore.get_all_ref_doc_info() or {}
        return {name: info for name, info in infos.items() if any(node_id in rows for node_id in info.node_ids)}

    def build_index_from_nodes(self, nodes: Sequence[BaseNode], **build_kwargs: Any) -> GenretIndexStruct:
        """Build the index as in `BaseIndex`. If assigning identifiers fails, no node is stored."""
        struct = self._build_index_from_nodes(nodes, **build_kwargs)
        self._docstore.add_documents(nodes, allow_update=True)
        return struct

    def _build_index_from_nodes(self, nodes: Sequence[BaseNode], **build_kwargs: Any) -> GenretIndexStruct:
        from llama_index_genret.store.build import build_index

        images = [node for node in nodes if isinstance(node, ImageNode)]
        if not images:
            raise CorpusError("there are no images. Pass documents or nodes, for example load_images(folder).")
        folder = common_folder(images)
        corpus = Corpus(folder, tuple(records_of(images, [folder])))
        options = {"progress": self._bar("Encoding"), **self._build_options}
        base, encoder = self._models.base_for_new_index(), self._models.encoder_for_new_index()
        self._index = build_index(corpus, self._folder, base, encoder=encoder, **options)
        return GenretIndexStruct(folder=str(self._folder))

    def insert_nodes(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        """Insert nodes. If assigning identifiers fails, no node is stored.

        Raises:
            DuplicateImage: the index already has an image with this id. `update_ref_doc` replaces it.
        """
        sealed = [sealed_node(node, self._folder / PICTURES) for node in nodes]
        with self._callback_manager.as_trace("insert_nodes"), self._edits:
            self._insert(sealed, **insert_kwargs)
            self.docstore.add_documents(sealed, allow_update=True)
            self._storage_context.index_store.add_index_struct(self._index_struct)

    def insert(self, document: Document, **insert_kwargs: Any) -> None:
        """Insert a document, as `insert_nodes` does."""
        super().insert(sealed_document(document, self._folder / PICTURES), **insert_kwargs)

    def _insert(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        from llama_index_genret.store.build import add_to_index

        with self._edits:
            index, records = self.stored, self._records(nodes)
            if records:
                encoder = self._models.encoder_of(index)
                base = self._base_model()
                self._use(add_to_index(index, records, base, encoder=encoder, progress=self._bar("Encoding")))

    def _base_model(self) -> Any:
        """Return the base model if identifiers of new images depend on image features, else None."""
        from llama_index_genret.store.build import needs_features

        return self._models.base_of(self._index) if needs_features(self._index) else None

    def delete_nodes(self, node_ids: list[str], delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """Delete nodes, so that no search finds them. Image files are kept. Ids that the index lacks are ignored."""
        with self._edits:
            index = self.stored
            known = [node_id for node_id in node_ids if node_id in index.rows_by_id]
            if known:
                self._use(remove_images(index, known))
            if delete_from_docstore:
                for node_id in node_ids:
                    self.docstore.delete_document(node_id, raise_error=False)
            self._storage_context.index_store.add_index_struct(self._index_struct)

    def _delete_node(self, node_id: str, **delete_kwargs: Any) -> None:
        self.delete_nodes([node_id])

    def update_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """Replace a document, or insert it.

        An image with unchanged content keeps its identifier, so the model still recalls it.
        """
        with self._callback_manager.as_trace("update_ref_doc"):
            self._replace([sealed_document(document, self._folder / PICTURES)])

    def refresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """Insert new documents and replace changed ones, in one write. A document with a replaced file is changed.

        Returns:
            Whether each document was inserted or replaced.
        """
        with self._callback_manager.as_trace("refresh_ref_docs"), self._edits:
            sealed = [sealed_document(document, self._folder / PICTURES) for document in documents]
            changed = [self.docstore.get_document_hash(document.id_) != document.hash for document in sealed]
            self._replace([document for document, is_changed in zip(sealed, changed, strict=True) if is_changed])
            return changed

    async def ainsert_nodes(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        """Run `insert_nodes` in a thread, like every edit, because files and the model have no async interface."""
        await asyncio.to_thread(self.insert_nodes, nodes, **insert_kwargs)

    async def ainsert(self, document: Document, **insert_kwargs: Any) -> None:
        """Run `insert` in a thread."""
        await asyncio.to_thread(self.insert, document, **insert_kwargs)

    async def adelete_nodes(
        self, node_ids: list[str], delete_from_docstore: bool = False, **delete_kwargs: Any
    ) -> None:
        """Run `delete_nodes` in a thread."""
        await asyncio.to_thread(self.delete_nodes, node_ids, delete_from_docstore, **delete_kwargs)

    async def aupdate_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """Run `update_ref_doc` in a thread."""
        await asyncio.to_thread(self.update_ref_doc, document, **update_kwargs)

    async def arefresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """Run `refresh_ref_docs` in a thread."""
        return await asyncio.to_thread(self.refresh_ref_docs, documents, **update_kwargs)

    def _replace(self, documents: Sequence[Document]) -> None:
        """Replace or insert sealed documents."""
        with self._edits:
            index = self.stored
            made = run_transformations(documents, self._transformations, show_progress=self._show_progress)
            nodes = [sealed_node(node, self._folder / PICTURES) for node in made]
            same = {node.node_id: node for node in nodes if self._is_same_picture(node)}
            identifiers = [index.identifiers[index.rows_by_id[image_id]] for image_id in same]
            others = [node for node in nodes if node.node_id not in same]
            if others:
                self._base_model()  # fails before anything is deleted
            self.delete_nodes(self._node_ids(documents, nodes), delete_from_docstore=True)
            self._insert(others)
            if same:
                index = self._index
                self._use(add_images(index, self._records(list(same.values())), identifiers, index.scheme()))
            self.docstore.add_documents(nodes, allow_update=True)
            self._store_hashes(documents)

    def _node_ids(self, documents: Sequence[Document], nodes: Sequence[BaseNode]) -> list[str]:
        """Return the ids of the earlier nodes of documents, and of their new nodes."""
        infos = [self.docstore.get_ref_doc_info(document.id_) for document in documents]
        earlier = {node_id for info in infos if info for node_id in info.node_ids}
        return sorted(earlier | {node.node_id for node in nodes})

    def _is_same_picture(self, node: ImageNode) -> bool:
        row = self._index.rows_by_id.get(node.node_id)
        return row is not None and self._index.records[row].sha256 == node.metadata["content_sha256"]

    def _records(self, nodes: Sequence[BaseNode]) -> list[Record]:
        folders = [Path(folder) for folder in self._index.manifest.folders]
        return records_of([node for node in nodes if isinstance(node, ImageNode)], folders)

    def _store_hashes(self, documents: Sequence[Document]) -> None:
        """Store the hashes of documents again, because storing a node with the same id has replaced them."""
        for document in documents:
            self.docstore.set_document_hash(document.id_, document.hash)

    def _use(self, index: store.Index) -> None:
        """Switch to another version of the index, with all retrievers."""
        self._index = index
        for retriever in list(self._retrievers):
            self._models.refresh(retriever, index)

    def _bar(self, label: str) -> Any:
        return partial(tqdm, desc=label, unit="batch", disable=not self._show_progress)


INDEX_STRUCT_TYPE_TO_INDEX_STRUCT_CLASS[STRUCT_TYPE] = GenretIndexStruct  # type: ignore[index]
INDEX_STRUCT_TYPE_TO_INDEX_CLASS[STRUCT_TYPE] = GenerativeImageIndex  # type: ignore[index]
