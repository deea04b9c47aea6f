"""The images of a corpus with their captions, questions and metadata: `Record`, `Question`, `Corpus`.

Depends on paths and plain values; independent of file formats, pixels, identifiers, models and LlamaIndex.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

from llama_index_genret.errors import DuplicateImage, MetadataError, UnsafePath

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Question:
    """A question about one image, and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Record:
    """One image with its captions, questions and metadata. The pixels stay in the file."""

    image_id: str
    path: Path
    """Absolute path of the image file."""
    file_name: str
    """Path relative to the image folder, with forward slashes."""
    sha256: str
    captions: tuple[str, ...] = ()
    metadata: Mapping[str, Scalar] = field(default_factory=dict, hash=False)
    questions: tuple[Question, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the record as JSON values. The path is left out, so that the folder can move."""
        return {
            "image_id": self.image_id,
            "file_name": self.file_name,
            "sha256": self.sha256,
            "captions": list(self.captions),
            "metadata": dict(self.metadata),
            "questions": [asdict(question) for question in self.questions],
        }

    @classmethod
    def from_json(cls, obj: object, folder: Path) -> Record:
        """Return the record that `to_json` stored. Reads no file.

        Args:
            obj: the JSON values of one record.
            folder: absolute path of the image folder.
        Raises:
            MetadataError: a key is missing or unknown, or a value has the wrong type.
            UnsafePath: the file name leaves the folder.
        """
        where = f"a record stored for {folder}: "
        keys = ["captions", "file_name", "image_id", "metadata", "questions", "sha256"]
        if not isinstance(obj, Mapping) or sorted(map(str, obj)) != keys:
            raise MetadataError(f"{where}expected an object with the keys {keys}, not {obj!r:.200}.")
        file_name = parse_file_name(obj["file_name"], where)
        return cls(
            image_id=parse_text(obj["image_id"], "image_id", where),
            path=folder / file_name,
            file_name=file_name,
            sha256=parse_text(obj["sha256"], "sha256", where),
            captions=parse_captions(obj["captions"], where),
            metadata=parse_metadata(obj["metadata"], where),
            questions=parse_questions(obj["questions"], where),
        )


@dataclass(frozen=True)
class SkippedImage:
    """An image or a metadata line that `skip_broken` left out."""

    file_name: str
    """File name of the image. Name of the metadata file if the line has no file name."""
    line: int | None
    reason: str


@dataclass(frozen=True)
class Corpus:
    """The records of one image folder, in the order of its metadata, and the images that were left out."""

    folder: Path
    records: tuple[Record, ...]
    skipped: tuple[SkippedImage, ...] = ()

    def __post_init__(self) -> None:
        if len(self.by_id) != len(self.records):
            raise DuplicateImage(f"the records of {self.folder} share image ids: give each image its own.")

    @cached_property
    def by_id(self) -> Mapping[str, Record]:
        """Map each `image_id` to its record."""
        return {record.image_id: record for record in self.records}

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


# Names that are safe as they stand. Parsing them as paths would take most of the time to load a million records.
_PLAIN_NAME = re.compile(r"(?:(?!\.{1,2}(?:/|\Z))[^/\\:\0]+(?:/(?!\Z)|\Z))+\Z")


def parse_text(value: object, name: str, where: str) -> str:
    """Return `value` if it is text with more than white space, else raise MetadataError."""
    if not isinstance(value, str) or not value.strip():
        raise MetadataError(f"{where}{name} must be text and not empty, not {value!r:.200}.")
    return value


def parse_captions(value: object, where: str) -> tuple[str, ...]:
    """Return one caption, a list of captions or None as a tuple. Raises MetadataError."""
    captions = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(parse_text(caption, "text (a caption, or each in a list)", where) for caption in captions)


def parse_questions(value: object, where: str) -> tuple[Question, ...]:
    """Return the questions of a list of {"question", "answer"}, or () for None. Raises MetadataError."""
    questions = [] if value is None else value
    if not isinstance(questions, list) or not all(isinstance(q, Mapping) for q in questions):
        raise MetadataError(f"{where}questions must be a list of {{'question', 'answer'}}, not {value!r:.200}.")
    if wrong := [sorted(q) for q in questions if set(q) != {"question", "answer"}]:
        raise MetadataError(f"{where}questions need the keys ['answer', 'question'], not {wrong[0]}.")
    return tuple(
        Question(parse_text(q["question"], "a question", where), parse_text(q["answer"], "an answer", where))
        for q in questions
    )


def parse_metadata(value: object, where: str) -> dict[str, Scalar]:
    """Return flat metadata. Raises MetadataError for a nested value."""
    if not isinstance(value, Mapping):
        raise MetadataError(f"{where}metadata must be an object, not {value!r:.200}.")
    for key, item in value.items():
        if not isinstance(item, Scalar):
            raise MetadataError(
                f"{where}the metadata {key!r} is a {type(item).__name__}, but must be text, a number, true, false or "
                "null. Flatten it into several columns."
            )
    return dict(value)


def parse_file_name(value: object, where: str) -> str:
    """Return the name of a file inside the image folder, with forward slashes.

    The name is parsed as a Windows path, which has both separators and drives.

    Raises:
        UnsafePath: the name leads out of the folder.
        MetadataError: the name is not text.
    """
    name = parse_text(value, "file_name", where)
    if _PLAIN_NAME.match(name):
        return name
    parts = PureWindowsPath(name)
    if parts.anchor or ".." in parts.parts or "\0" in name:
        raise UnsafePath(f"{where}{name!r} leads out of the image folder. Give a path relative to it, without '..'.")
    return PurePosixPath(name).as_posix()
