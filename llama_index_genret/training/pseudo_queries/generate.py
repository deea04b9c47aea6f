"""A resumable run in which a model writes queries for an index's images.

Depends on the index and the protocol of a writer; independent of torch, HTTP and vLLM.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from llama_index_genret.corpus import Record
from llama_index_genret.errors import BatchError
from llama_index_genret.files import difference, locked, size
from llama_index_genret.models.tokenizer import IndexTokenizer
from llama_index_genret.store import (
    ImagePseudoQueries,
    Index,
    Provenance,
    load_index,
    store_pseudo_queries,
    text_key,
)
from llama_index_genret.training.pseudo_queries.filtering import candidates_of, choose
from llama_index_genret.training.pseudo_queries.run_file import (
    PART,
    Batch,
    ImageCandidates,
    WriteHeader,
    WriteOptions,
    read_batches,
    read_header,
    write_line,
)
from llama_index_genret.training.pseudo_queries.writer import (
    KINDS,
    Sampling,
    Writer,
    WriterRequest,
    instruction,
    seed_of,
)

REPLIES_PER_QUERY = 1.5
"""Replies requested per query, because some are empty, cut off or duplicates."""


@dataclass(frozen=True)
class WriteSummary:
    """The counts of a run.

    images: images for which the run wrote queries.
    kept: images among them that an earlier, killed run had processed.
    queries: stored queries of these images.
    short: images with fewer queries than requested.
    none: images without any query.
    refused: refused replies by reason.
    """

    images: int
    kept: int
    queries: int
    short: int
    none: int
    refused: dict[str, int]


@dataclass(frozen=True)
class WriteRun:
    """A run that is ready to start. `open_writing` creates it after all checks that need no model.

    records: records of the images that need queries.
    """

    index: Index
    records: tuple[Record, ...]
    header: WriteHeader
    samples: tuple[str, ...]
    part: BinaryIO

    def finish(
        self, load: Callable[[], Writer], *, progress: Callable[[int], None] = lambda done: None
    ) -> WriteSummary:
        """Write queries for the images that the run has not processed yet, and store the queries of all images.

        A resumed run starts at a batch boundary, so that the model gets the same batches as without the interruption. A
        server samples with its own seed, so that its replies differ. The index is loaded again before it is written,
        which keeps concurrent edits.

        Args:
            load: returns the writer; called only if images are left.
            progress: called with the number of processed images, at the start and after each batch.
        """
        batches = read_batches(self.part)
        processed = {_content_key(image) for batch in batches for image in batch.images}
        todo = [record for record in self.records if _content_key(record) not in processed]
        kept = len(self.records) - len(todo)
        progress(kept)
        if todo:
            batches += self._write(load(), todo, lambda done: progress(kept + done))
        summary = self._store(batches, kept)
        (self.index.folder / PART).unlink()
        return summary

    def _write(self, writer: Writer, records: Sequence[Record], progress: Callable[[int], None]) -> Iterator[Batch]:
        if not size(self.part):
            write_line(self.part, self.header)
        for start in range(0, len(records), self.header.batch_size):
            batch = self._batch(writer, records[start : start + self.header.batch_size])
            write_line(self.part, batch)
            progress(start + len(batch.images))
            yield batch

    def _batch(self, writer: Writer, records: Sequence[Record]) -> Batch:
        """Let the model write queries of every kind for some images, in one batch of requests."""
        tokenizer, header = self.index.tokenizer, self.header
        requests = []
        for record in records:
            for kind in KINDS:
                seed = seed_of(header.seed, record.sha256, kind)
                requests.append(WriterRequest(record.path, instruction(kind, self.samples, seed), seed))
        n = math.ceil(header.per_image * REPLIES_PER_QUERY / len(KINDS))
        replies = writer.write(requests, Sampling(n=n, temperature=header.temperature))
        copies = frozenset(map(text_key, self.samples))
        images = []
        for place, record in enumerate(records):
            image_replies = replies[place * len(KINDS) : (place + 1) * len(KINDS)]
            candidates = candidates_of(
                dict(zip(KINDS, image_replies, strict=True)),
                captions=record.captions,
                samples=copies,
                is_plain=lambda text: _is_plain(tokenizer, text),
            )
            key = {"image_id": record.image_id, "sha256": record.sha256}
            images.append(ImageCandidates(**key, queries=candidates.queries, refused=dict(candidates.refused)))
        return Batch(model=writer.model, fingerprint=writer.fingerprint, images=images)

    def _store(self, batches: Sequence[Batch], kept: int) -> WriteSummary:
        """Choose the queries of all images, and store them together with the stored queries of other images."""
        index = load_index(self.index.folder)
        wanted = {_content_key(record): _n_wanted(record, self.header) for record in self.records}
        present = {_content_key(record) for record in index.records} & wanted.keys()
        pairs = [(batch, image) for batch in batches for image in batch.images if _content_key(image) in present]
        new = {image.image_id for _, image in pairs}
        others = [line for line in index.pseudo_queries.values() if line.image_id not in new]
        n_images = _count_images(index.records, others, [image for _, image in pairs])
        refused: Counter[str] = Counter()
        lines = []
        for batch, image in pairs:
            unshared = choose(image.queries, len(image.queries), n_images)
            refused.update(image.refused)
            refused["shared by too many images"] += len(image.queries) - len(unshared)
            line = ImagePseudoQueries(
                image_id=image.image_id,
                sha256=image.sha256,
                wanted=wanted[_content_key(image)],
                queries=unshared[: wanted[_content_key(image)]],
                provenance=self._provenance(batch),
            )
            lines.append(line)
        if lines:
            store_pseudo_queries(index, [*others, *lines])
        return WriteSummary(
            images=len(lines),
            kept=kept,
            queries=sum(len(line.queries) for line in lines),
            short=sum(len(line.queries) < line.wanted for line in lines),
            none=sum(not line.queries for line in lines),
            refused=dict((+refused).most_common()),
        )

    def _provenance(self, batch: Batch) -> Provenance:
        header = self.header
        return Provenance(
            model=batch.model,
            fingerprint=batch.fingerprint,
            written_by=header.written_by,
            seed=header.seed,
            temperature=header.temperature,
            style=header.style,
        )


@contextmanager
def open_writing(
    index: Index,
    options: WriteOptions | None = None,
    *,
    samples: Sequence[str] = (),
    written_by: str = "transformers",
) -> Iterator[WriteRun]:
    """Find the images that need queries, before a model is loaded, and lock the run's file against other runs.

    Args:
        options: options of the run. Default: WriteOptions().
        samples: queries of users, as examples of style. Samples with the model's markup are left out of the prompt.
        written_by: the kind of writer, which a resumed run must match.
    Raises:
        BatchError: an unfinished run has other options, or another run is active.
    """
    options = options or WriteOptions()
    style = hashlib.sha256("\n".join(samples).encode()).hexdigest() if samples else None
    model = index.manifest.model.fingerprint
    header = WriteHeader(**options.model_dump(), model=model, style=style, written_by=written_by)
    path = index.folder / PART
    with locked(path, way_out="make it writable") as part:
        earlier = read_header(part)
        if earlier != header:
            if read_batches(part) and not options.overwrite:
                way_out = "remove the file, or pass --overwrite to write the queries of all images again."
                raise BatchError(difference(path, earlier, header, way_out=way_out))
            part.truncate(0)
        shown = tuple(sample for sample in samples if _is_plain(index.tokenizer, sample))
        try:
            yield WriteRun(index, tuple(_lacking(index, header)), header, shown, part)
        finally:
            if path.exists() and not size(part):
                path.unlink()


def _lacking(index: Index, header: WriteHeader) -> Iterator[Record]:
    """Yield the records that need queries and have none stored, or with `overwrite` all that need queries."""
    for record in index.records:
        line = index.pseudo_queries.get(record.image_id)
        wanted = _n_wanted(record, header)
        if wanted > 0 and (header.overwrite or line is None or line.wanted < wanted):
            yield record


def _n_wanted(record: Record, header: WriteHeader) -> int:
    return header.per_image - len(record.captions)


def _content_key(image: Record | ImageCandidates) -> tuple[str, str]:
    return image.image_id, image.sha256


def _count_images(
    records: Sequence[Record], others: Sequence[ImagePseudoQueries], images: Sequence[ImageCandidates]
) -> Counter[str]:
    """Count the images of each text, by its key, over captions, stored queries and new queries."""
    texts = {record.image_id: set(map(text_key, record.captions)) for record in records}
    queries_by_image = [(line.image_id, line.queries) for line in others] + [
        (image.image_id, image.queries) for image in images
    ]
    for image_id, queries in queries_by_image:
        texts[image_id].update(text_key(query.text) for query in queries)
    return Counter(key for keys in texts.values() for key in keys)


def _is_plain(tokenizer: IndexTokenizer, text: str) -> bool:
    """Return whether a text contains neither special tokens nor symbols of identifiers."""
    return tokenizer.encode_text(text) == tokenizer.encode_markup(text)
