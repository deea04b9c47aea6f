"""Recalling a large file of queries: answers are written as they come, so that a run that was killed goes on.

    QUERIES.jsonl          one object a line; read as a stream, never held
    HITS.jsonl.part        the answers so far, in the order of the queries; renamed to HITS.jsonl with the last one
    HITS.jsonl.part.json   what they answer: a run that asks something else does not go on with them

Knows scorers and files; nothing of LlamaIndex.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError

from llama_index_genret.errors import BatchError, CorpusError, QueryError
from llama_index_genret.files import difference, locked, size, sync
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import Scorer, recall
from llama_index_genret.scorers.rerank import Rerank, reranking, with_scoring
from llama_index_genret.search import Hit, Mode, Ranking, SearchOptions
from llama_index_genret.store import Index, RecordFilters, Scoring, ScoringChoice
from llama_index_genret.store.filters import Value

BATCH_SIZE = 32
ANSWER_KEYS = ("hits", "exact", "error")
"""Keys of an answer beside those of its query."""

WAY_OUT = "name another --out, or pass --overwrite to throw away its answers."


class BatchHeader(BaseModel):
    """What decides the answers of a run. A run goes on only if the header of the earlier one is equal.

    index: its version. queries: sha256 of the file. scored_by: free text that tells one kind from another.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    index: str
    queries: str
    k: int = 10
    mode: Mode = "beam"
    max_expansions: int | None = None
    filters: dict[str, str] = {}
    scoring: Scoring = Scoring()
    scored_by: str = ""


@dataclass(frozen=True)
class BatchSummary:
    """queries: of the file. refused: those with an error instead of hits. kept: answered by an earlier run."""

    queries: int
    refused: int
    kept: int


@dataclass(frozen=True)
class _PartialAnswers:
    """What lies in HITS.jsonl.part: answers, those among them that are errors, and where they end in the file."""

    answers: int = 0
    refused: int = 0
    end: int = 0


@dataclass(frozen=True)
class BatchRun:
    """A run that may begin: made by `open_batch`, which has checked everything that can be checked without a model."""

    index: Index
    queries: Path
    out: Path
    header: BatchHeader
    total: int
    part: BinaryIO
    options: SearchOptions

    def finish(
        self, scorer: Scorer, *, batch_size: int = BATCH_SIZE, progress: Callable[[int], None] = lambda done: None
    ) -> BatchSummary:
        """Recall all queries that have no answer yet, `batch_size` in one search, and put the file in its place.

        A query that is refused gets an `error` instead of hits. A run goes on at the beginning of a batch, so that it
        searches what a run without interruption would have searched together.

        Args:
            progress: called with the number of answered queries: at once, and after each batch.
        """
        kept = _whole_batches(self.part, batch_size)
        self.part.truncate(kept.end)
        self.part.seek(kept.end)
        progress(kept.answers)
        rerank = reranking(self.index, self.header.scoring)
        done, refused = kept.answers, kept.refused
        rows = islice(read_rows(self.queries), kept.answers, None)
        while batch := list(islice(rows, batch_size)):
            answers = _answers(self.index, scorer, [row["query"] for row in batch], self.options, rerank)
            for row, answer in zip(batch, answers, strict=True):
                self.part.write(_line({**row, **answer}))
            self.part.flush()
            done += len(batch)
            refused += sum("error" in answer for answer in answers)
            progress(done)
        os.fsync(self.part.fileno())
        _part_of(self.out).replace(self.out)
        sync(self.out.parent)
        _header_of(self.out).unlink()
        return BatchSummary(queries=done, refused=refused, kept=kept.answers)


@contextmanager
def open_batch(
    index: Index,
    queries: Path,
    out: Path,
    *,
    k: int = 10,
    mode: Mode = "beam",
    max_expansions: int | None = None,
    filters: Mapping[str, str] | None = None,
    scoring: ScoringChoice | None = None,
    scored_by: str = "",
    overwrite: bool = False,
) -> Iterator[BatchRun]:
    """Check the files of a run, before a model is loaded, and keep other runs from writing the same.

    Args:
        k, mode, max_expansions: see `search.SearchOptions`.
        filters: metadata values, compared as text, all of which an image must have.
        scoring: how hits are ranked; None, and None in it: the value chosen by `genret tune`.
        scored_by: the kind of scorer, for a later run that goes on.
        overwrite: whether HITS.jsonl may be replaced, and an unfinished run that asks something else thrown away.
    Raises:
        CorpusError: QUERIES.jsonl cannot be read, has no queries, or a broken line; names file and line.
        BatchError: `out` exists, or its unfinished run asks something else or is still running.
        FilterError: no record has one of the keys.
        SearchError: the options or the scoring cannot be.
    """
    leaf_filter = index.leaf_filter(text_filters(index, filters)) if filters else None
    chosen = index.scoring(scoring)
    options = SearchOptions(k=k, mode=mode, max_expansions=max_expansions, leaf_filter=leaf_filter)
    options = with_scoring(options, index, chosen)
    if out.exists() and (not overwrite or out.is_dir() or (queries.exists() and out.samefile(queries))):
        raise BatchError(f"{out} exists: name another file, or pass --overwrite to replace a file of hits.")
    total, sha256 = _survey(queries)
    header = BatchHeader(
        index=index.version,
        queries=sha256,
        k=k,
        mode=mode,
        max_expansions=max_expansions,
        filters=dict(filters or {}),
        scoring=chosen,
        scored_by=scored_by,
    )
    with locked(_part_of(out), way_out="name another --out") as part:
        earlier = _read_header(_header_of(out)) if size(part) else header
        if earlier != header:
            if not overwrite:
                raise BatchError(difference(_part_of(out), earlier, header, way_out=WAY_OUT))
            part.truncate(0)
        if not size(part):
            _header_of(out).write_text(header.model_dump_json(indent=1), encoding="utf-8")
        try:
            yield BatchRun(index, queries, out, header, total, part, options)
        finally:
            if not size(part):
                _part_of(out).unlink(missing_ok=True)
                _header_of(out).unlink(missing_ok=True)


def text_filters(index: Index, wanted: Mapping[str, str]) -> RecordFilters:
    """Require that metadata equal all of `wanted`, compared as text: "2024" is also the number, "true" also true.

    Raises:
        FilterError: no record has one of the keys.
    """
    distinct = index.columns.distinct
    return RecordFilters.equal({key: [v for v in distinct(key) if _reads_as(v, text)] for key, text in wanted.items()})


def _reads_as(value: Value, text: str) -> bool:
    """Tell whether a value is written as this text in Python or, for true and false, in JSON."""
    return str(value) == text or (isinstance(value, bool) and str(value).lower() == text)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of QUERIES.jsonl, one after another: `{"query": "...", any other keys}`; empty lines are skipped.

    Raises:
        CorpusError: the file cannot be read or a line is broken; names file and line.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(line, f"{path}, line {number}")
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: no JSON in UTF-8: {error}; found {line[:80]!r}.") from error
    if not isinstance(row, dict) or not isinstance(row.get("query"), str):
        raise CorpusError(f'{where}: want {{"query": "..."}}, found {line[:80]!r}.')
    if taken := [key for key in ANSWER_KEYS if key in row]:
        raise CorpusError(f"{where} has {taken}, which an answer writes: rename these keys.")
    return row


def _survey(path: Path) -> tuple[int, str]:
    """Number of queries and sha256 of the file; reads every line, so that a broken one is told at the beginning."""
    if path.exists() and not path.is_file():
        raise CorpusError(f"{path} is no regular file: it is read twice, write the queries to a file.")
    total = sum(1 for _ in read_rows(path))
    if total == 0:
        raise CorpusError(f"{path} has no queries.")
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return total, digest.hexdigest()


def _answers(
    index: Index, scorer: Scorer, queries: Sequence[str], options: SearchOptions, rerank: Rerank | None
) -> list[dict[str, Any]]:
    """Return for each query its hits, or why it is refused."""
    answers: list[dict[str, Any]] = [{} for _ in queries]
    prompts: dict[int, Prompt] = {}
    for place, query in enumerate(queries):
        try:
            prompts[place] = index.prompts.for_query(index.tokenizer, query)
        except QueryError as error:
            answers[place] = {"error": str(error)}
    try:
        rankings = recall(scorer, index.trie, list(prompts.values()), options, rerank=rerank) if prompts else []
    except QueryError as error:  # by the scorer, which does not say of which
        if len(queries) == 1:
            return [{"error": str(error)}]
        return [answer for query in queries for answer in _answers(index, scorer, [query], options, rerank)]
    for place, ranking in zip(prompts, rankings, strict=True):
        answers[place] = _answer(index, ranking)
    return answers


def _answer(index: Index, ranking: Ranking) -> dict[str, Any]:
    return {"hits": [hit_to_json(index, hit) for hit in ranking.hits], "exact": ranking.exact}


def hit_to_json(index: Index, hit: Hit) -> dict[str, Any]:
    """Return a hit as the command line and files of hits write it."""
    record = index.record_of(hit)
    names = {"image_id": record.image_id, "file_name": record.file_name}
    scores = {"score": hit.score, "log_prob": hit.log_prob}
    scores |= {} if hit.ranked_by is None else {"ranked_by": hit.ranked_by}
    return {**names, **scores, "identifier": index.identifier_of(hit)}


def _line(answer: Mapping[str, Any]) -> bytes:
    """A half of a surrogate pair, which JSON can hold and UTF-8 cannot, stays the escape that it came as."""
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _whole_batches(part: BinaryIO, batch_size: int) -> _PartialAnswers:
    """The answers of an earlier run up to the end of its last whole batch."""
    part.seek(0)
    whole = _PartialAnswers()
    refused = 0
    for answers, line in enumerate(part, start=1):
        try:
            answer = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):  # written half
            break
        refused += "error" in answer
        if answers % batch_size == 0:
            whole = _PartialAnswers(answers, refused, part.tell())
    return whole


def _read_header(path: Path) -> BatchHeader | None:
    try:
        return BatchHeader.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None


def _part_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def _header_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.part.json")
