"""Recall images for a large file of queries. Results are written after each batch, so that a killed run resumes.

    QUERIES.jsonl          one object per line; read as a stream, never held in memory
    HITS.jsonl.part        the results so far, in the order of the queries; renamed to HITS.jsonl at the end
    HITS.jsonl.part.json   the header of the run: a run with another header does not resume it

Depends on scorers and files; independent of LlamaIndex.
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
"""Keys that a result adds to those of its query."""

WAY_OUT = "choose another --out, or pass --overwrite to discard its results."


class BatchHeader(BaseModel):
    """The inputs that determine the results of a run. A run resumes an earlier one only if the headers are equal.

    index: version of the index.
    queries: sha256 of the file of queries.
    k, mode, max_expansions: see `search.SearchOptions`.
    filters: metadata values, compared as text.
    scoring: the ranking of hits.
    scored_by: free text that identifies the kind of scorer.
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
    """The counts of a finished run.

    queries: queries in the file.
    refused: queries with an error instead of hits.
    kept: queries whose results come from an earlier run.
    """

    queries: int
    refused: int
    kept: int


@dataclass(frozen=True)
class _PartialAnswers:
    """The content of HITS.jsonl.part: number of results, number of errors among them, and their end in bytes."""

    answers: int = 0
    refused: int = 0
    end: int = 0


@dataclass(frozen=True)
class BatchRun:
    """A run that is ready to start. `open_batch` creates it after all checks that need no model."""

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
        """Recall images for all queries without a result, `batch_size` per search, and rename the file to `out`.

        A refused query gets an `error` instead of hits. A run resumes at the start of a batch, so that its batches
        equal those of an uninterrupted run.

        Args:
            progress: called with the number of finished queries, at the start and after each batch.
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
    """Check the files of a run before a model is loaded, and lock its output against other runs.

    Args:
        k, mode, max_expansions: see `search.SearchOptions`.
        filters: metadata values, compared as text, all of which an image must have.
        scoring: ranking of hits. None, and each field that is None, takes the value chosen by `genret tune`.
        scored_by: the kind of scorer; a resumed run must have the same.
        overwrite: True allows replacing HITS.jsonl and discarding an unfinished run with another header.
    Raises:
        CorpusError: QUERIES.jsonl cannot be read, has no queries, or has an invalid line. The error names file and
            line.
        BatchError: `out` exists, or its unfinished run has another header or is still running.
        FilterError: no record has one of the keys.
        SearchError: the options or the scoring are invalid.
    """
    leaf_filter = index.leaf_filter(text_filters(index, filters)) if filters else None
    chosen = index.scoring(scoring)
    options = SearchOptions(k=k, mode=mode, max_expansions=max_expansions, leaf_filter=leaf_filter)
    options = with_scoring(options, index, chosen)
    if out.exists() and (not overwrite or out.is_dir() or (queries.exists() and out.samefile(queries))):
        raise BatchError(f"{out} exists: choose another file, or pass --overwrite to replace a file of hits.")
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
    with locked(_part_of(out), way_out="choose another --out") as part:
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
    """Return filters that require metadata to equal all of `wanted`, compared as text.

    "2024" also equals the number 2024, and "true" also equals True.

    Raises:
        FilterError: no record has one of the keys.
    """
    distinct = index.columns.distinct
    return RecordFilters.equal({key: [v for v in distinct(key) if _reads_as(v, text)] for key, text in wanted.items()})


def _reads_as(value: Value, text: str) -> bool:
    """Tell whether this text is the value's form in Python or, for true and false, in JSON."""
    return str(value) == text or (isinstance(value, bool) and str(value).lower() == text)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of QUERIES.jsonl: `{"query": "...", any other keys}`. Empty lines are skipped.

    Raises:
        CorpusError: the file cannot be read, or a line is invalid. The error names file and line.
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
        raise CorpusError(f"{where}: not JSON in UTF-8: {error}. Got {line[:80]!r}.") from error
    if not isinstance(row, dict) or not isinstance(row.get("query"), str):
        raise CorpusError(f'{where}: want {{"query": "..."}}, got {line[:80]!r}.')
    if reserved := [key for key in ANSWER_KEYS if key in row]:
        raise CorpusError(f"{where} has {reserved}, which are reserved for results: rename these keys.")
    return row


def _survey(path: Path) -> tuple[int, str]:
    """Parse every line, so that errors are raised early. Return the number of queries and the file's sha256."""
    if path.exists() and not path.is_file():
        raise CorpusError(f"{path} is no regular file, and queries are read twice: write them to a file.")
    total = sum(1 for _ in read_rows(path))
    if total == 0:
        raise CorpusError(f'{path} has no queries: write one {{"query": "..."}} per line.')
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return total, digest.hexdigest()


def _answers(
    index: Index, scorer: Scorer, queries: Sequence[str], options: SearchOptions, rerank: Rerank | None
) -> list[dict[str, Any]]:
    """Return the hits of each query, or the error that refuses it."""
    answers: list[dict[str, Any]] = [{} for _ in queries]
    prompts: dict[int, Prompt] = {}
    for place, query in enumerate(queries):
        try:
            prompts[place] = index.prompts.for_query(index.tokenizer, query)
        except QueryError as error:
            answers[place] = {"error": str(error)}
    try:
        rankings = recall(scorer, index.trie, list(prompts.values()), options, rerank=rerank) if prompts else []
    except QueryError as error:  # the scorer does not report which query it refuses
        if len(queries) == 1:
            return [{"error": str(error)}]
        return [answer for query in queries for answer in _answers(index, scorer, [query], options, rerank)]
    for place, ranking in zip(prompts, rankings, strict=True):
        answers[place] = _answer(index, ranking)
    return answers


def _answer(index: Index, ranking: Ranking) -> dict[str, Any]:
    return {"hits": [hit_to_json(index, hit) for hit in ranking.hits], "exact": ranking.exact}


def hit_to_json(index: Index, hit: Hit) -> dict[str, Any]:
    """Return a hit in the JSON form of the command line and of files of hits."""
    record = index.record_of(hit)
    names = {"image_id": record.image_id, "file_name": record.file_name}
    scores = {"score": hit.score, "log_prob": hit.log_prob}
    scores |= {} if hit.ranked_by is None else {"ranked_by": hit.ranked_by}
    return {**names, **scores, "identifier": index.identifier_of(hit)}


def _line(answer: Mapping[str, Any]) -> bytes:
    """Return an answer as a line of JSON in UTF-8. A lone surrogate, which UTF-8 cannot encode, stays escaped."""
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _whole_batches(part: BinaryIO, batch_size: int) -> _PartialAnswers:
    """Return the results of an earlier run up to the end of its last whole batch."""
    part.seek(0)
    whole = _PartialAnswers()
    refused = 0
    for answers, line in enumerate(part, start=1):
        try:
            answer = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):  # the run was killed during this line
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
