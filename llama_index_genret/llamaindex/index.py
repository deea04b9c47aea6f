"""`GenerativeImageIndex`: an index of LlamaIndex whose nodes are in any docstore, and whose memory is an index folder.

    storage context   the nodes, the hashes of documents, and where the folder is
    index folder      identifiers, trie and trained weights: what `genret train`, `genret serve` and `genret query` take

To make an index names the images; the model recalls them when it was trained: `train`, or `genret train` on the folder.
What is inserted later has its name at once; text hardly leads to it before it was learnt: `untrained_ids` lists it.
What is deleted is found no more, at once; retrievers and engines made before see both.

Knows LlamaIndex and the folder; nothing of searches. torch is needed to name images and without a server only.
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
from llama_index_genret.store import PICTURES, add_images, load_index, remove_images
from llama_index_genret.store.model_state import unseen_rows

STRUCT_TYPE = "genret"

_RETRIEVER_OPTIONS = frozenset(inspect.signature(GenerativeImageRetriever.__init__).parameters) - {"kwargs"}

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
"""The engines that pass images on, and what they call the prompt around the question."""


@dataclass
class GenretIndexStruct(IndexStruct):
    """What the storage context keeps of an index: where its folder is."""

    folder: str = ""

    @classmethod
    def get_type(cls) -> Any:
        """Name of the struct in LlamaIndex's registries, whose enumeration is closed."""
        return STRUCT_TYPE


class GenerativeImageIndex(BaseIndex[GenretIndexStruct]):
    """Images that a model recalls by generating their identifiers.

    Args:
        nodes: `ImageNode`s; their ids are image ids. Documents go into `from_documents`. An image in memory is
            written into the folder, one that is only an address is refused.
        index_dir: the folder, which must be free; of an index that is loaded, where it has moved to.
        model: the base model that is to be trained, a folder or hub id, or a loaded `Mllm`.
        scheme, scheme_options, alphabet, overwrite: how images are named, see `store.build.build_index`.
        api_base, api_key: of a server that `genret serve` started on the folder, which recalls and answers then. None
            for a model in this process.
        llm: what answers; an `OpenAILike` also names the server that recalls.
        scorer: recalls in place of both.
        device: of models in this process.
        kwargs: of `BaseIndex`.
    Raises:
        IndexExists: the folder is not free. CorpusError: there are no images, or one cannot be used.
    """

    index_struct_cls = GenretIndexStruct

    def __init__(
        self,
        nodes: Sequence[BaseNode] | None = None,
        *,
        index_dir: str | Path | None = None,
        model: Any = None,
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
            raise CorpusError("an index of images needs a folder of its own: name a free one as index_dir.")
        self._folder = Path(index_dir or index_struct.folder).absolute()  # type: ignore[union-attr]
        naming = {"scheme": scheme, "scheme_options": scheme_options, "alphabet": alphabet, "overwrite": overwrite}
        self._naming, self._edits = naming, RLock()
        self._retrievers: WeakSet[GenerativeImageRetriever] = WeakSet()
        self._show_progress = kwargs.get("show_progress", False)
        self._models = IndexModels(
            model=model, api_base=api_base, api_key=api_key, llm=llm, scorer=scorer, device=device
        )
        if index_struct is not None:
            index_struct.folder = str(self._folder)
            self._index = load_index(self._folder)
        else:
            nodes = [sealed_node(node, self._folder / PICTURES) for node in nodes or []]
        transformations = transformations or [ImageDocumentParser()]
        super().__init__(nodes=nodes, index_struct=index_struct, transformations=transformations, **kwargs)

    @classmethod
    def from_documents(  # type: ignore[override]  # the folder must be named
        cls, documents: Sequence[Document], *args: Any, index_dir: str | Path, **kwargs: Any
    ) -> GenerativeImageIndex:
        """Name the images of documents, and store their nodes.

        Raises:
            IndexExists, CorpusError: as of the class; ImageError names the document that has no image.
        """
        pictures = Path(index_dir).absolute() / PICTURES
        sealed = [sealed_document(document, pictures) for document in documents]
        kwargs["transformations"] = kwargs.get("transformations") or [ImageDocumentParser()]
        index = super().from_documents(sealed, *args, index_dir=index_dir, **kwargs)
        index._remember(sealed)
        return index

    @property
    def folder(self) -> Path:
        """The index folder, which the command line and servers take."""
        return self._folder

    @property
    def stored(self) -> store.Index:
        """The folder's index as it is now: training or edits by other processes are seen."""
        with self._edits:
            if store.read_manifest(self._folder) != self._index.manifest:
                self._use(load_index(self._folder))
            return self._index

    def untrained_ids(self) -> list[str]:
        """Images that the model has not seen under their identifiers: all before the first training.

        They are found by their identifiers alone, and well only where these tell of the picture (`structured`,
        `semantic`) or where their rows were guessed from it (`atomic`).
        """
        index = self.stored
        rows = unseen_rows(index) if index.is_trained else range(len(index.records))
        return [index.records[row].image_id for row in rows or []]

    def train(self, options: Any = None, *, update: bool = False, show_progress: bool = True) -> None:
        """Teach the model its images, by `training.recipe.train`: hours on a GPU for a large corpus.

        Args:
            options: `TrainOptions`.
            update: learn what was inserted since the last training in an adapter on top of it.
        """
        from llama_index_genret.training.recipe import train

        trained = train(self.stored, options, update=update, device=self._models.device, show_progress=show_progress)
        with self._edits:
            self._use(trained)

    def as_retriever(self, **kwargs: Any) -> GenerativeImageRetriever:
        """A retriever of the nodes in the docstore, which sees every later edit and training of this index.

        Args:
            kwargs: of `GenerativeImageRetriever`; those of engines are left alone.
        Raises:
            NotTrained: no model has learnt the images yet.
            TypeError: there is no such option: `doc_ids` or a misspelt `filters`, left alone, would hide nothing.
        """
        if unknown := kwargs.keys() - _RETRIEVER_OPTIONS - _ENGINE_OPTIONS:
            raise TypeError(
                f"neither retrievers nor engines of an image index take {sorted(unknown)}. Retrievers take "
                f"{sorted(_RETRIEVER_OPTIONS - {'self', 'index', 'scorer'})}."
            )
        index = self.stored
        scorer, endpoint = self._models.recall_backend(index)
        options = {name: value for name, value in kwargs.items() if name in _RETRIEVER_OPTIONS}
        retriever = GenerativeImageRetriever(
            index, scorer, endpoint=endpoint, docstore=self.docstore, callback_manager=self._callback_manager, **options
        )
        self._retrievers.add(retriever)
        return retriever

    def as_query_engine(self, llm: Any = None, **kwargs: Any) -> RetrieverQueryEngine:
        """`image_query_engine`: the pictures reach the model. kwargs: of the retriever and of the engine."""
        options = {name: value for name, value in kwargs.items() if name not in _RETRIEVER_OPTIONS}
        return image_query_engine(self.as_retriever(**kwargs), self._llm(llm), **options)

    def as_chat_engine(self, chat_mode: ChatMode = ChatMode.BEST, llm: Any = None, **kwargs: Any) -> BaseChatEngine:
        """A chat whose model sees the pictures, by LlamaIndex's multimodal chat engines.

        Args:
            chat_mode: CONDENSE_PLUS_CONTEXT (also BEST) and CONTEXT are these engines, to which a caption is not
                told; CONDENSE_QUESTION asks `as_query_engine`; SIMPLE recalls nothing.
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
        """The documents whose images are in the index."""
        rows = self.stored.rows_by_id
        infos = self.docstore.get_all_ref_doc_info() or {}
        return {name: info for name, info in infos.items() if any(node_id in rows for node_id in info.node_ids)}

    def build_index_from_nodes(self, nodes: Sequence[BaseNode], **build_kwargs: Any) -> GenretIndexStruct:
        """See `BaseIndex`; what cannot be named is not stored."""
        struct = self._build_index_from_nodes(nodes, **build_kwargs)
        self._docstore.add_documents(nodes, allow_update=True)
        return struct

    def _build_index_from_nodes(self, nodes: Sequence[BaseNode], **build_kwargs: Any) -> GenretIndexStruct:
        from llama_index_genret.store.build import build_index

        images = [node for node in nodes if isinstance(node, ImageNode)]
        if not images:
            raise CorpusError("there are no images: give documents or nodes, for example load_images(folder).")
        folder = common_folder(images)
        corpus = Corpus(folder, tuple(records_of(images, [folder])))
        named = {"progress": self._bar("Encoding"), **self._naming}
        self._index = build_index(corpus, self._folder, self._models.base_for_new_index(), **named)
        return GenretIndexStruct(folder=str(self._folder))

    def insert_nodes(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        """Insert nodes; what cannot be named is not stored.

        Raises:
            DuplicateImage: an image of its id is there already; `update_ref_doc` replaces it.
        """
        sealed = [sealed_node(node, self._folder / PICTURES) for node in nodes]
        with self._callback_manager.as_trace("insert_nodes"), self._edits:
            self._insert(sealed, **insert_kwargs)
            self.docstore.add_documents(sealed, allow_update=True)
            self._storage_context.index_store.add_index_struct(self._index_struct)

    def insert(self, document: Document, **insert_kwargs: Any) -> None:
        """Insert a document: see `insert_nodes`."""
        super().insert(sealed_document(document, self._folder / PICTURES), **insert_kwargs)

    def _insert(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        from llama_index_genret.store.build import add_to_index

        with self._edits:
            index, records = self.stored, self._records(nodes)
            if records:
                self._use(add_to_index(index, records, self._base_model(), progress=self._bar("Encoding")))

    def _base_model(self) -> Any:
        """The base model where images that join are named by their looks; None where not."""
        from llama_index_genret.store.build import needs_features

        return self._models.base_of(self._index) if needs_features(self._index) else None

    def delete_nodes(self, node_ids: list[str], delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """Delete nodes: no search finds them any more. The files of their images stay; ids not in the index too."""
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
        """Replace a document, or insert it. An image whose picture is the same keeps its identifier, and with it what
        the model has learnt of it."""
        with self._callback_manager.as_trace("update_ref_doc"):
            self._put([sealed_document(document, self._folder / PICTURES)])

    def refresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """Insert new documents and replace changed ones, in one write; also those whose file was replaced.

        Returns:
            For each whether it was inserted or replaced.
        """
        with self._callback_manager.as_trace("refresh_ref_docs"), self._edits:
            sealed = [sealed_document(document, self._folder / PICTURES) for document in documents]
            changed = [self.docstore.get_document_hash(document.id_) != document.hash for document in sealed]
            self._put([document for document, is_changed in zip(sealed, changed, strict=True) if is_changed])
            return changed

    async def ainsert_nodes(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        """As `insert_nodes`, in a thread, as all that edits: the files and the model are not asynchronous."""
        await asyncio.to_thread(self.insert_nodes, nodes, **insert_kwargs)

    async def ainsert(self, document: Document, **insert_kwargs: Any) -> None:
        """As `insert`, in a thread."""
        await asyncio.to_thread(self.insert, document, **insert_kwargs)

    async def adelete_nodes(
        self, node_ids: list[str], delete_from_docstore: bool = False, **delete_kwargs: Any
    ) -> None:
        """As `delete_nodes`, in a thread."""
        await asyncio.to_thread(self.delete_nodes, node_ids, delete_from_docstore, **delete_kwargs)

    async def aupdate_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """As `update_ref_doc`, in a thread."""
        await asyncio.to_thread(self.update_ref_doc, document, **update_kwargs)

    async def arefresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """As `refresh_ref_docs`, in a thread."""
        return await asyncio.to_thread(self.refresh_ref_docs, documents, **update_kwargs)

    def _put(self, documents: Sequence[Document]) -> None:
        """Replace and insert sealed documents."""
        with self._edits:
            index = self.stored
            made = run_transformations(documents, self._transformations, show_progress=self._show_progress)
            nodes = [sealed_node(node, self._folder / PICTURES) for node in made]
            same = {node.node_id: node for node in nodes if self._is_same_picture(node)}
            identifiers = [index.identifiers[index.rows_by_id[image_id]] for image_id in same]
            others = [node for node in nodes if node.node_id not in same]
            if others:
                self._base_model()  # fails before anything is deleted
            self.delete_nodes(self._nodes_of(documents, nodes), delete_from_docstore=True)
            self._insert(others)
            if same:
                index = self._index
                self._use(add_images(index, self._records(list(same.values())), identifiers, index.scheme()))
            self.docstore.add_documents(nodes, allow_update=True)
            self._remember(documents)

    def _nodes_of(self, documents: Sequence[Document], nodes: Sequence[BaseNode]) -> list[str]:
        """Ids of the nodes that documents had, and of those that they have now."""
        infos = [self.docstore.get_ref_doc_info(document.id_) for document in documents]
        earlier = {node_id for info in infos if info for node_id in info.node_ids}
        return sorted(earlier | {node.node_id for node in nodes})

    def _is_same_picture(self, node: ImageNode) -> bool:
        row = self._index.rows_by_id.get(node.node_id)
        return row is not None and self._index.records[row].sha256 == node.metadata["content_sha256"]

    def _records(self, nodes: Sequence[BaseNode]) -> list[Record]:
        folders = [Path(folder) for folder in self._index.manifest.folders]
        return records_of([node for node in nodes if isinstance(node, ImageNode)], folders)

    def _remember(self, documents: Sequence[Document]) -> None:
        """Store the hashes of documents; storing a node of the same id has replaced them."""
        for document in documents:
            self.docstore.set_document_hash(document.id_, document.hash)

    def _use(self, index: store.Index) -> None:
        """Go on with another version, and all retrievers with it."""
        self._index = index
        for retriever in list(self._retrievers):
            self._models.refresh(retriever, index)

    def _bar(self, what: str) -> Any:
        return partial(tqdm, desc=what, unit="batch", disable=not self._show_progress)


INDEX_STRUCT_TYPE_TO_INDEX_STRUCT_CLASS[STRUCT_TYPE] = GenretIndexStruct  # type: ignore[index]
INDEX_STRUCT_TYPE_TO_INDEX_CLASS[STRUCT_TYPE] = GenerativeImageIndex  # type: ignore[index]
