"""A loaded index: records, names, trie, tokenizer, and where its weights lie. Made by `create_index`, `load_index`.

Knows files and the light parts; nothing of torch or LlamaIndex.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from llama_index_genret.corpus import Record
from llama_index_genret.errors import (
    IdentifierError,
    IndexChanged,
    IndexDamaged,
    IndexNotFound,
    ModelMismatch,
    NotWritten,
)
from llama_index_genret.files import make_folder, writing
from llama_index_genret.identifiers import Alphabet, Identifier, Scheme, get_scheme
from llama_index_genret.models.identity import ModelEntry
from llama_index_genret.models.prompts import Prompt, PromptSet
from llama_index_genret.models.tokenizer import IndexTokenizer
from llama_index_genret.search import Hit
from llama_index_genret.store.array_files import read_npy, read_safetensors
from llama_index_genret.store.filters import Columns, MetadataFilters, Value
from llama_index_genret.store.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    check_free,
    commit,
    only_writer_of,
    read_manifest,
    verify,
)
from llama_index_genret.store.pseudo_queries import PSEUDO_QUERIES, PseudoQuery, WrittenQueries, read_written
from llama_index_genret.store.records import RECORDS, read_records, write_records
from llama_index_genret.store.scoring import RerankBy, Scoring, ScoringChoice
from llama_index_genret.store.weights import (
    ADAPTER,
    IMAGES,
    NEW_ROWS,
    UPDATE,
    NewRows,
    image_key,
    read_images,
    weights_id,
)
from llama_index_genret.trie import (
    LeafFilter,
    LiveTrie,
    TriePrior,
    build_trie,
    close_beginnings,
    open_trie,
    save_trie,
    with_edits,
)

EDITS = "edits.safetensors"

PRIOR = "prior.npy"
"""(records,) float32, log p(image | no query) of every record; NaN of those added since it was computed."""


@dataclass(frozen=True)
class Index:
    """A loaded index. Immutable: a change is a new write (`store_adapter`, `store_tuned`, edits) and a new load."""

    folder: Path
    manifest: Manifest
    records: tuple[Record, ...]
    identifiers: tuple[Identifier, ...]
    trie: LiveTrie
    tokenizer: IndexTokenizer

    @property
    def prompts(self) -> PromptSet:
        """The rendered prompts of the base model."""
        return self.manifest.prompts

    @property
    def is_trained(self) -> bool:
        """Whether trained weights are stored."""
        return any(name.startswith(ADAPTER) for name in self.manifest.files)

    @property
    def weights_id(self) -> str | None:
        """Twelve hex digits that name the trained weights, None without them. A server of theirs carries it."""
        return weights_id(self.manifest.files)

    @property
    def has_update(self) -> bool:
        """Whether there is an update on top of the trained weights."""
        return any(name.startswith(UPDATE) for name in self.manifest.files)

    def unseen_rows(self, *, update: bool = True) -> list[int] | None:
        """Records that the trained weights have not seen under their identifiers; None where that is not known.

        Args:
            update: whether what the update has seen counts as seen.
        """
        name = f"{UPDATE if update and self.has_update else ADAPTER}{IMAGES}"
        if name not in self.manifest.files:
            return None
        seen, named = read_images(self.file(name)), zip(self.records, self.identifiers, strict=True)
        return [row for row, (record, name) in enumerate(named) if image_key(record, name) not in seen]

    def new_rows(self) -> NewRows | None:
        """Rows of the symbols that joined after the training, None without any."""
        return NewRows.load(self.file(NEW_ROWS)) if NEW_ROWS in self.manifest.files else None

    @cached_property
    def log_prior(self) -> NDArray[np.float32] | None:
        """(records,) log p(image | no query), NaN where it is not known; None before `genret tune`."""
        if PRIOR not in self.manifest.files:
            return None
        log_prior = read_npy(self.file(PRIOR))
        if log_prior.shape != (len(self.records),) or log_prior.dtype.kind != "f":
            raise IndexDamaged(
                f"{PRIOR} of {self.folder} is {log_prior.dtype} {log_prior.shape} for {len(self.records)} images."
            )
        return log_prior

    @cached_property
    def prior(self) -> TriePrior | None:
        """`log_prior` of every node of `trie`."""
        if self.log_prior is None:
            return None
        row = self._rows_of_leaves
        of_leaves = np.where(row >= 0, self.log_prior[np.maximum(row, 0)], np.float32(np.nan))
        return TriePrior.of_leaves(self.trie, of_leaves)

    def scoring(self, choice: ScoringChoice | None = None, *, pictured: bool = False) -> Scoring:
        """How hits are ranked: as chosen, else as tuned, else by log p(id | query).

        Args:
            pictured: of a query that is a picture; what was tuned on text queries does not apply to it.
        """
        default = Scoring() if pictured or self.manifest.tuned is None else self.manifest.tuned.scoring
        if default.eta and self.prior is None:  # all images that it was of are removed
            default = replace(default, eta=0.0)
        return (choice or ScoringChoice()).over(default)

    def describing_prompt(self, hit: Hit, by: RerankBy) -> Prompt:
        """The prompt after which the model says what is in the image: told its identifier, or shown it."""
        if by == "image":
            return self.prompts.for_picture(self.tokenizer, self.record_of(hit).path)
        return self.prompts.for_identifier(self.tokenizer, self.token_ids(hit.key))

    @cached_property
    def version(self) -> str:
        """Twelve hex digits of everything that is stored; an edit or a training makes another."""
        return hashlib.sha256(self.manifest.model_dump_json(indent=1).encode()).hexdigest()[:12]

    @cached_property
    def rows_by_id(self) -> dict[str, int]:
        """Position of every image id among `records`."""
        return {record.image_id: row for row, record in enumerate(self.records)}

    @cached_property
    def pseudo_queries(self) -> dict[str, WrittenQueries]:
        """What a model has written of each image, by image id. Never captions.

        Raises:
            IndexDamaged: the file is missing, differs from the manifest, or is broken.
        """
        if PSEUDO_QUERIES not in self.manifest.files:
            return {}
        return {line.image_id: line for line in read_written(self.file(PSEUDO_QUERIES))}

    def pseudo_queries_of(self, record: Record) -> tuple[PseudoQuery, ...]:
        """What a model has written of one image."""
        line = self.pseudo_queries.get(record.image_id)
        return line.queries if line else ()

    def record_of(self, hit: Hit) -> Record:
        """The image that a hit names."""
        return self.records[hit.key]

    def identifier_of(self, hit: Hit) -> str:
        """The identifier as people read it, `<g0_17><g1_5>` or `red apple`."""
        return self.tokenizer.read(self.identifiers[hit.key])

    def hit_to_json(self, hit: Hit) -> dict[str, Any]:
        """A hit in the words of the command line."""
        record = self.record_of(hit)
        names = {"image_id": record.image_id, "file_name": record.file_name}
        scores = {"score": hit.score, "log_prob": hit.log_prob}
        scores |= {} if hit.ranked_by is None else {"ranked_by": hit.ranked_by}
        return {**names, **scores, "identifier": self.identifier_of(hit)}

    @property
    def end_token(self) -> int:
        """What closes an identifier that is the beginning of another: the token with which the model ends its turn."""
        return self.tokenizer.encode_markup(self.prompts.end)[0]

    def token_ids(self, row: int) -> tuple[int, ...]:
        """Token ids of the identifier of record `row`."""
        return tuple(self.tokenizer.symbol_id(symbol) for symbol in self.identifiers[row])

    @cached_property
    def columns(self) -> Columns:
        """The metadata of all records, by key."""
        return Columns([record.metadata for record in self.records])

    @cached_property
    def _rows_of_leaves(self) -> NDArray[np.int64]:
        return self.trie.key(np.arange(self.trie.n_leaves))

    def leaf_filter(self, filters: MetadataFilters) -> LeafFilter:
        """The leaves whose records pass, for the `allowed` of a search.

        Raises:
            FilterError: see `Columns.passing`.
        """
        return self.leaves_of(self.columns.passing(filters))

    def leaves_of(self, passing: NDArray[np.bool_]) -> LeafFilter:
        """The leaves of some records. passing: (records,) bool."""
        row = self._rows_of_leaves
        mask = np.zeros(len(row), np.bool_)
        mask[row >= 0] = passing[row[row >= 0]]  # a removed leaf has no record
        return LeafFilter.from_mask(mask)

    def text_filter(self, wanted: Mapping[str, str]) -> MetadataFilters:
        """Records whose metadata equal all of `wanted`, compared as text: "2024" is also the number, "true" also true.

        Raises:
            FilterError: no record has one of the keys.
        """
        return MetadataFilters.equal(
            {key: [v for v in self.columns.distinct(key) if _reads_as(v, text)] for key, text in wanted.items()}
        )

    def scheme(self) -> Scheme:
        """The scheme with its frozen codebooks."""
        scheme = get_scheme(self.manifest.scheme, **self.manifest.scheme_options)
        name = "codebooks.safetensors"
        scheme.restore(read_safetensors(self.file(name)) if name in self.manifest.files else {})
        return scheme

    def new_token_ids(self) -> list[int]:
        """Tokens that the index added to the base model's vocabulary, which must learn them; ascending."""
        if self.manifest.alphabet == "existing":
            return []
        return sorted(self.tokenizer.symbol_id(symbol) for symbol in self.scheme().new_symbols())

    def file(self, name: str) -> Path:
        """Path of a stored file, its checksum verified.

        Raises:
            IndexDamaged: it is missing or differs from the manifest.
            IndexChanged: another process has written the index since it was loaded, and what it held is gone.
        """
        entry = self.manifest.files[name]
        path = self.folder / entry.path
        try:
            verify(path, entry)
        except IndexDamaged as error:
            if _manifest_of(self.folder) == self.manifest:
                raise
            raise IndexChanged(
                f"{self.folder} was written anew since it was loaded, {name!r} of that version is gone: load it again."
            ) from error
        return path

    def adapter_folder(self) -> Path:
        """Folder of the trained weights, every file verified; without the update."""
        return self._verified_folder(ADAPTER)

    def update_folder(self) -> Path:
        """Folder of the update, every file verified."""
        return self._verified_folder(UPDATE)

    def _verified_folder(self, prefix: str) -> Path:
        return [self.file(name) for name in self.manifest.files if name.startswith(prefix)].pop().parent

    def check_tokenizer(self, tokenizer: IndexTokenizer, where: str) -> None:
        """Raise ModelMismatch unless `tokenizer` is the base tokenizer the index was made with."""
        if tokenizer.fingerprint != self.manifest.model.base_tokenizer:
            raise ModelMismatch(
                f"the tokenizer of {where} (sha256 {tokenizer.fingerprint[:12]}) is not the one that {self.folder} was "
                f"made with ({self.manifest.model.name_or_path}, sha256 {self.manifest.model.base_tokenizer[:12]}). "
                "Load the index with its own model, or make it anew with `genret index`."
            )


def _reads_as(value: Value, text: str) -> bool:
    """Whether a value is written so, in Python or, of true and false, in JSON."""
    return str(value) == text or (isinstance(value, bool) and str(value).lower() == text)


def create_index(
    folder: Path,
    *,
    images: Path,
    records: Sequence[Record],
    identifiers: Sequence[Identifier],
    scheme: Scheme,
    tokenizer: IndexTokenizer,
    model: ModelEntry,
    prompts: PromptSet,
    alphabet: Alphabet = "new",
    overwrite: bool = False,
) -> Index:
    """Write a new index, untrained.

    Args:
        identifiers: as `Spelling.spell` gives them, each symbol one token.
        tokenizer: with the scheme's symbols added, where the alphabet is new.
        overwrite: whether an index that is there already may be replaced, its trained weights included.
    Raises:
        IndexExists: there is an index in `folder` already, or something else.
        IndexBusy, NotWritten: somebody else writes it, or nobody can.
        IdentifierError: identifiers are not unique, or a symbol is not one token.
    """
    check_free(folder, overwrite=overwrite)
    token_ids = [[tokenizer.symbol_id(symbol) for symbol in identifier] for identifier in identifiers]
    end = tokenizer.encode_markup(prompts.end)[0]
    trie, order = build_trie(close_beginnings(token_ids, end))

    def write(into: Path) -> None:
        write_records(into, records, identifiers, [0] * len(records))
        (into / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        save_trie(trie, into / "trie.bin")
        np.save(into / "leaf_to_record.npy", order)
        if scheme.arrays():
            save_file(dict(scheme.arrays()), into / "codebooks.safetensors")

    manifest = Manifest(
        format_version=FORMAT_VERSION,
        folders=[str(images.resolve())],
        scheme=scheme.name,
        scheme_options=scheme.options(),
        alphabet=alphabet,
        model=model,
        tokenizer=tokenizer.fingerprint,
        prompts=prompts,
        files={},
    )
    with writing(folder):
        make_folder(folder)
    try:
        with only_writer_of(folder):
            check_free(folder, overwrite=overwrite)
            commit(folder, manifest, write, keep=lambda name: False)
    except NotWritten:
        with suppress(OSError):  # pictures, or an older index
            folder.rmdir()
        raise
    return load_index(folder)


def load_index(folder: Path) -> Index:
    """Open an index. Every file that is read is held against its checksum first, the trie's too, which is then
    memory-mapped. Trained weights are not read; `Index.file` verifies them when they are.

    What another process writes meanwhile is no error: the newer version is read.

    Raises:
        IndexNotFound, IndexVersionError, IndexDamaged: as their names say; each names the file.
    """
    while True:
        manifest = read_manifest(folder)
        try:
            return _loaded(folder, manifest)
        except IndexDamaged:
            if _manifest_of(folder) in (manifest, None):
                raise


def _manifest_of(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except (IndexNotFound, IndexDamaged):
        return None


def _loaded(folder: Path, manifest: Manifest) -> Index:
    def verified(name: str) -> Path:
        if name not in manifest.files:
            raise IndexDamaged(f"{folder / MANIFEST} names no file {name!r}. Make the index anew with `genret index`.")
        path = folder / manifest.files[name].path
        verify(path, manifest.files[name])
        return path

    folders = [Path(folder).absolute() for folder in manifest.folders]
    records, identifiers = read_records(verified(RECORDS), folders)
    tokenizer = IndexTokenizer.from_file(verified("tokenizer.json"))
    if tokenizer.fingerprint != manifest.tokenizer:
        raise IndexDamaged(f"{folder / MANIFEST} records another tokenizer than tokenizer.json beside it.")
    edits = verified(EDITS) if EDITS in manifest.files else None
    return Index(
        folder=folder,
        manifest=manifest,
        records=records,
        identifiers=identifiers,
        trie=_trie(verified("trie.bin"), verified("leaf_to_record.npy"), edits, len(records)),
        tokenizer=tokenizer,
    )


def _trie(path: Path, leaf_to_record: Path, edits: Path | None, n_records: int) -> LiveTrie:
    base = open_trie(path)
    try:
        keys = read_npy(leaf_to_record)
        if keys.dtype != np.int64 or keys.shape != (base.n_leaves,):
            raise ValueError(f"{leaf_to_record.name} is {keys.dtype} {keys.shape} for {base.n_leaves} identifiers")
        trie = with_edits(base, keys, read_safetensors(edits)) if edits else LiveTrie(base, keys=keys)
        rows = trie.key(np.arange(trie.n_leaves))
        if trie.live is not None:
            rows = rows[trie.live.contains(np.arange(trie.n_leaves))]
        if not np.array_equal(np.sort(rows), np.arange(n_records)):
            raise ValueError(f"{len(rows)} identifiers do not stand for {n_records} images, each once")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, IdentifierError) as error:
        raise IndexDamaged(
            f"the names in {path.parent} cannot be used: {error}. Restore the index, or make it anew."
        ) from error
    return trie
