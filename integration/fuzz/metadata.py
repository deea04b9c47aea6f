"""The metadata of an image folder: the first byte selects metadata.jsonl or metadata.csv, the others are the file.

Records that are read, written as JSON and read again must be equal. No path may be outside the folder.
"""

import json
from functools import cache
from pathlib import Path

from integration.fuzz.small_index import ROWS, draw, scratch
from llama_index_genret.corpus import Corpus, Record, read_corpus
from llama_index_genret.errors import CorpusError

JSONL, CSV = b"j", b"c"
SEEDS = (
    JSONL + "".join(f"{json.dumps(row)}\n" for row in ROWS).encode(),
    JSONL + b'\xef\xbb\xbf{"file_name": "a.png", "text": "K\xc3\xb6ln \xe2\x80\xa8 \\u2028"}\r\n\r\n',
    JSONL + b'{"file_name": "./sub//b.jpg", "n": 1e3, "m": -0.0}\n{"file_name": "../a.png"}\n{',
    CSV + b'file_name,text,place\na.png,"red, ""flat""\nand more",Koeln\nsub/b.jpg,,\n',
    CSV + b"\xef\xbb\xbffile_name\r\na.png\r\n\r\nd.webp\r\n",
)
WORDS = (
    *(b'"file_name"', b'"text"', b'"image_id"', b'"questions"', b'"question"', b'"answer"', b'"a.png"', b'"sub/b.jpg"'),
    *(b"file_name", b"questions", b"a.png", b"../", b"/etc/passwd", b"C:\\\\", b"\\ud800", b"\\u0000", b"\\u2028"),
    *(b"NaN", b"Infinity", b"1e999", b"-0", b"null", b"true", b"[[[[[[[[", b'{"a":', b"\xe2\x80\xa8", b"\xef\xbb\xbf"),
    *(b'""', b'","', b"\r\n", b"\x00", b"\x85", b"9999999999999999999999"),
)


@cache
def _folder() -> Path:
    return draw(scratch() / "metadata")


def one(data: bytes) -> None:
    folder = _folder()
    for name in ("metadata.jsonl", "metadata.csv"):
        (folder / name).unlink(missing_ok=True)
    (folder / ("metadata.csv" if data[:1] == CSV else "metadata.jsonl")).write_bytes(data[1:])
    whole = _read(folder, skip_broken=False)
    rest = _read(folder, skip_broken=True)
    if whole is not None:
        assert rest == whole, "a folder without an error is read in two ways"
    if rest is not None:
        assert len({record.image_id for record in rest}) == len(rest)
        for record in rest:
            assert record.path.resolve().is_relative_to(folder.resolve())
            stored = json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False).encode()
            assert Record.from_json(json.loads(stored), folder.resolve()) == record


def _read(folder: Path, *, skip_broken: bool) -> Corpus | None:
    try:
        return read_corpus(folder, skip_broken=skip_broken)
    except CorpusError as error:
        assert str(folder.resolve()) in str(error), f"no file is named: {error}"
        return None
