"""Read a corpus from a folder in the layout of a Hugging Face imagefolder.

Depends on files and the metadata format; independent of pixels, identifiers, models and LlamaIndex.
Format: https://huggingface.co/docs/datasets/image_dataset#imagefolder
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from llama_index_genret.corpus.images import decode_image, image_sha256
from llama_index_genret.corpus.jsonl import parse_object, read_lines
from llama_index_genret.corpus.records import (
    Corpus,
    Record,
    SkippedImage,
    parse_captions,
    parse_file_name,
    parse_metadata,
    parse_questions,
    parse_text,
)
from llama_index_genret.errors import CorpusError, DuplicateImage, ImageError, MetadataError, UnsafePath

# Suffixes of images in a bare folder. Those of the second line raise an error, so that no image is lost silently.
_IMAGE_SUFFIX = re.compile(
    r"\.(apng|avif|bmp|gif|ico|jfif|jp2|jpe|jpeg|jpg|mpo|pbm|pgm|png|pnm|ppm|tiff?|webp"
    r"|heic|heif|jxl|svgz?)\Z",
    re.IGNORECASE,
)
_METADATA_FILES = ("metadata.jsonl", "metadata.csv")
_OWN_COLUMNS = frozenset({"file_name", "image_id", "text", "questions"})


@dataclass(frozen=True)
class _MetadataRow:
    """One listed image. `parse` runs late, so that a broken line is an error of that line only."""

    where: str
    line: int | None
    source: str
    parse: Callable[[], Mapping[str, object]]


def read_corpus(
    folder: Path | str,
    *,
    skip_broken: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Corpus:
    """Read a folder of images and decode every image once.

    The folder has a `metadata.jsonl` or a `metadata.csv`, or is bare. Its columns:

    - `file_name`: the path of the image, relative to the folder.
    - `text`: a caption. In JSON also a list of captions.
    - `image_id`: text. Default: the file name without its suffix.
    - `questions`: a list of {"question", "answer"}. JSON only.

    All other columns are flat metadata. A CSV gives them as text, and an empty cell is a missing value.
    A bare folder gives every image below it, except hidden files and linked folders.

    Args:
        folder: the image folder.
        skip_broken: leave out broken images and lines, and list them in `Corpus.skipped`. Default: raise an error.
        progress: wraps the iterable of rows, as `tqdm.tqdm` does. Default: no progress bar.
    Raises:
        MetadataError: a line is broken. Also raised with `skip_broken` if the metadata file as a whole is broken.
        ImageError: a file is missing, damaged, too large, or not a raster image.
        UnsafePath: a file name or a link leaves the folder.
        DuplicateImage: two images have the same `image_id`.
        CorpusError: the folder does not exist, or it has no usable image.
    """
    root = _existing_folder(Path(folder))
    rows = _list_rows(root)
    records: list[Record] = []
    skipped: list[SkippedImage] = []
    places: dict[str, str] = {}
    for row in rows if progress is None else progress(rows):
        file_name = row.source
        try:
            fields = row.parse()
            file_name = str(fields.get("file_name") or file_name)
            record = _read_record(root, fields, row.where, places)
        except CorpusError as error:
            if not skip_broken:
                raise
            skipped.append(SkippedImage(file_name, row.line, str(error)))
            continue
        places[record.image_id] = repr(file_name) if row.line is None else f"line {row.line} ({file_name!r})"
        records.append(record)
    if not records:
        why = f"all {len(skipped)} are broken, the first: {skipped[0].reason}" if skipped else "none is listed."
        raise CorpusError(f"{root} has no usable image: {why} Give a folder of images such as .jpg, .png or .webp.")
    return Corpus(root, tuple(records), tuple(skipped))


def _existing_folder(folder: Path) -> Path:
    if not folder.exists():
        raise CorpusError(f"the image folder {folder} does not exist: check the path.")
    if not folder.is_dir():
        raise CorpusError(f"{folder} is not a folder: give the folder that holds the images ({folder.parent}).")
    root = folder.resolve()
    try:
        str(root).encode()
    except UnicodeEncodeError as error:  # an index could not store it
        raise CorpusError(f"the image folder {str(root)!r} has a name that is not UTF-8: rename it.") from error
    return root


def _list_rows(root: Path) -> Iterable[_MetadataRow]:
    present = [name for name in _METADATA_FILES if os.path.lexists(root / name)]
    if len(present) > 1:
        raise MetadataError(f"{root} has both {' and '.join(present)}: remove one of them.")
    if present and not (root / present[0]).is_file():  # reading a pipe would block
        raise MetadataError(f"{root / present[0]} is not a regular file: write the metadata to a file with that name.")
    if present:
        return (_json_rows if present[0].endswith("jsonl") else _csv_rows)(root / present[0])
    return [_MetadataRow("", None, name, partial(dict, file_name=name)) for name in _image_files(root)]


def _image_files(root: Path) -> list[str]:
    """Return the sorted relative names of the images below `root`, and of linked folders that leave it."""

    def refuse(error: OSError) -> NoReturn:
        raise CorpusError(f"{root} cannot be listed: {error}. Make it readable.") from error

    names = []
    for parent, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if not (Path(parent) / name).resolve().is_relative_to(root)]
        for name in files:
            if name in _METADATA_FILES or name == "metadata.parquet":
                raise MetadataError(
                    f"{Path(parent) / name} would not be read: only a metadata.jsonl or metadata.csv directly in "
                    f"{root} is. Give the folder of that file instead, or write its rows to {root / 'metadata.jsonl'}."
                )
        images = [name for name in files if _IMAGE_SUFFIX.search(name) and not name.startswith(".")]
        names += [(Path(parent) / name).relative_to(root).as_posix() for name in images + links]
    return sorted(names)


def _json_rows(path: Path) -> Iterator[_MetadataRow]:
    for line, text in enumerate(read_lines(path), 1):
        if text.strip():
            where = f"{path}, line {line}: "
            yield _MetadataRow(where, line, path.name, partial(parse_object, text, where))


def _csv_rows(path: Path) -> Iterator[_MetadataRow]:
    reader = csv.reader(read_lines(path), strict=True)
    try:
        columns = next(reader, [])
        _check_columns(columns, path)
        line = reader.line_num + 1
        for cells in reader:
            where = f"{path}, line {line}: "
            if cells:
                yield _MetadataRow(where, line, path.name, partial(_parse_cells, columns, cells, where))
            line = reader.line_num + 1
    except csv.Error as error:  # the start of the next row is unknown after this error
        raise MetadataError(
            f"{path}, line {reader.line_num}: not valid CSV: {error}. Check its quotes, or write a metadata.jsonl."
        ) from error


def _check_columns(columns: list[str], path: Path) -> None:
    where = f"{path}, line 1: the columns are {columns}"
    if "file_name" not in columns:
        raise MetadataError(f"{where}, but 'file_name' is needed. Add it, and separate columns with commas.")
    if len(set(columns)) != len(columns) or "" in columns:
        raise MetadataError(f"{where}, but each needs its own name. Rename the repeated or empty ones.")
    if "questions" in columns:
        raise MetadataError(f"{where}, but a CSV cannot hold 'questions'. Write a metadata.jsonl.")


def _parse_cells(columns: list[str], cells: list[str], where: str) -> dict[str, object]:
    if len(cells) != len(columns):
        raise MetadataError(f"{where}{len(cells)} cells for {len(columns)} columns. Put text with commas in quotes.")
    return {column: cell or None for column, cell in zip(columns, cells, strict=True)}


def _read_record(root: Path, fields: Mapping[str, object], where: str, places: Mapping[str, str]) -> Record:
    file_name = parse_file_name(fields.get("file_name"), where)
    path = _inside(root, file_name, where)
    image_id = file_name.removesuffix(PurePosixPath(file_name).suffix)
    if fields.get("image_id") is not None:
        image_id = parse_text(fields["image_id"], "image_id", where)
    if image_id in places:
        raise DuplicateImage(
            f"{where}{file_name!r} has the image_id {image_id!r}, which {places[image_id]} already has. Give each "
            "its own in the column image_id. List several captions of one image in the text of one line."
        )
    captions = parse_captions(fields.get("text"), where)
    questions = parse_questions(fields.get("questions"), where)
    metadata = parse_metadata({key: value for key, value in fields.items() if key not in _OWN_COLUMNS}, where)
    decode_image(path, where)
    return Record(image_id, path, file_name, image_sha256(path), captions, metadata, questions)


def _inside(root: Path, file_name: str, where: str) -> Path:
    path = root / file_name
    try:
        file_name.encode()
        target = path.resolve()
    except (OSError, RuntimeError, UnicodeError) as error:
        raise ImageError(f"{where}{file_name!r} cannot be opened: {error}. Rename it, or repair its links.") from error
    if not target.is_relative_to(root):
        raise UnsafePath(f"{where}{file_name!r} is a link out of the folder {root}. Copy its target into the folder.")
    return path
