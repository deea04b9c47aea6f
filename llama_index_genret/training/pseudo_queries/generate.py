"""A run that lets a model write queries of an index's images, and stores them; killed, the same run goes on.

Knows the index and what a writer promises; nothing of torch, HTTP or vLLM.
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
"""Replies that a model gives for each query that is wanted: some are empty, cut off or repeated."""


@dataclass(frozen=True)
class WriteSummary:
    """What a run did.

    images: that it wrote for. kept: of them, by a run before it was killed. queries: stored for them. short: images
    that got fewer than wanted. none: that got none. refused: answers of the model, by reason.
    """

    images: int
    kept: int
    queries: int
    short: int
    none: int
    refused: dict[str, int]


@dataclass(frozen=True)
class WriteRun:
    """A run that may begin: made by `open_writing`, which has checked all that can be checked without a model.

    records: of the images that are to get queries.
    """

    index: Index
    records: tuple[Record, ...]
    header: WriteHeader
    samples: tuple[str, ...]
    part: BinaryIO

    def finish(
        self, load: Callable[[], Writer], *, progress: Callable[[int], None] = lambda done: None
    ) -> WriteSummary:
        """Write for all images that have none of this run yet, and store the queries of all.

        A run goes on at the beginning of a batch, so that a model sees what it would have seen together without the
        interruption; the model of a server samples anew all the same. The index is read again before it is written:
        what was added meanwhile stays.

        Args:
            load: gives the writer; called where something is left to write.
            progress: called with the number of images that are done: at once, and after each batch.
        """
        batches = read_batches(self.part)
        written = {_picture(image) for batch in batches for image in batch.images}
        todo = [record for record in self.records if _picture(record) not in written]
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
        """Let the model write queries of every kind for some images, all at once."""
        tokenizer, header = self.index.tokenizer, self.header
        requests = []
        for record in records:
            for kind in KINDS:
                seed = seed_of(header.seed, record.sha256, kind)
                requests.append(WriterRequest(record.path, instruction(kind, self.samples, seed), seed))
        n = math.ceil(header.per_image * REPLIES_PER_QUERY / len(KINDS))
        answers = writer.write(requests, Sampling(n=n, temperature=header.temperature))
        copies = frozenset(map(text_key, self.samples))
        images = []
        for place, record in enumerate(records):
            of_image = answers[place * len(KINDS) : (place + 1) * len(KINDS)]
            found = candidates_of(
                dict(zip(KINDS, of_image, strict=True)),
                captions=record.captions,
                samples=copies,
                is_plain=lambda text: _is_plain(tokenizer, text),
            )
            names = {"image_id": record.image_id, "sha256": record.sha256}
            images.append(ImageCandidates(**names, queries=found.queries, refused=dict(found.refused)))
        return Batch(model=writer.model, fingerprint=writer.fingerprint, images=images)

    def _store(self, batches: Sequence[Batch], kept: int) -> WriteSummary:
        """Choose among what was written, now that all of it is there, and store it with what was stored of others."""
        index = load_index(self.index.folder)
        wanted = {_picture(record): _wanted(record, self.header) for record in self.records}
        here = {_picture(record) for record in index.records} & wanted.keys()
        pairs = [(batch, image) for batch in batches for image in batch.images if _picture(image) in here]
        new = {image.image_id for _, image in pairs}
        others = [line for line in index.pseudo_queries.values() if line.image_id not in new]
        n_images = _images_of_texts(index.records, others, [image for _, image in pairs])
        refused: Counter[str] = Counter()
        lines = []
        for batch, image in pairs:
            unshared = choose(image.queries, len(image.queries), n_images)
            refused.update(image.refused)
            refused["shared by too many images"] += len(image.queries) - len(unshared)
            line = ImagePseudoQueries(
                image_id=image.image_id,
                sha256=image.sha256,
                wanted=wanted[_picture(image)],
                queries=unshared[: wanted[_picture(image)]],
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
    """Say which images need queries, before a model is loaded, and keep other runs from writing the same.

    Args:
        samples: queries of users, as examples of style. Those with the model's markup in them are not shown.
        written_by: the kind of writer, for a later run that goes on.
    Raises:
        BatchError: an unfinished run asks something else, or is still running.
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
                way_out = "remove the file, or pass --overwrite to write for all images anew."
                raise BatchError(difference(path, earlier, header, way_out=way_out))
            part.truncate(0)
        shown = tuple(sample for sample in samples if _is_plain(index.tokenizer, sample))
        try:
            yield WriteRun(index, tuple(_lacking(index, header)), header, shown, part)
        finally:
            if path.exists() and not size(part):
                path.unlink()


def _lacking(index: Index, header: WriteHeader) -> Iterator[Record]:
    """The records that need queries, and have not been written for; or all that need some, to write anew."""
    for record in index.records:
        line = index.pseudo_queries.get(record.image_id)
        wanted = _wanted(record, header)
        if wanted > 0 and (header.overwrite or line is None or line.wanted < wanted):
            yield record


def _wanted(record: Record, header: WriteHeader) -> int:
    return header.per_image - len(record.captions)


def _picture(of: Record | ImageCandidates) -> tuple[str, str]:
    return of.image_id, of.sha256


def _images_of_texts(
    records: Sequence[Record], others: Sequence[ImagePseudoQueries], images: Sequence[ImageCandidates]
) -> Counter[str]:
    """Of every text, by its key, how many images have it: as a caption, as a stored query, or as a new one."""
    texts = {record.image_id: set(map(text_key, record.captions)) for record in records}
    written = [(line.image_id, line.queries) for line in others] + [(image.image_id, image.queries) for image in images]
    for image_id, queries in written:
        texts[image_id].update(text_key(query.text) for query in queries)
    return Counter(key for keys in texts.values() for key in keys)


def _is_plain(tokenizer: IndexTokenizer, text: str) -> bool:
    """Whether no special token and no symbol of an identifier is spelled in the text."""
    return tokenizer.encode_text(text) == tokenizer.encode_markup(text)
