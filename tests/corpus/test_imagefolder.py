"""`read_corpus` makes the expected records, and raises the documented error for each broken input."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from llama_index_genret.corpus import Corpus, Question, Record, SkippedImage, read_corpus
from llama_index_genret.errors import CorpusError, DuplicateImage, ImageError, MetadataError, UnsafePath
from tests.corpus.conftest import save

needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")


def write_jsonl(folder: Path, *rows: object) -> Path:
    """Write text rows unchanged and all other rows as JSON."""
    path = folder / "metadata.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


# Records


def test_a_line_of_json_becomes_a_record(folder):
    question = {"question": "What colour?", "answer": "Red."}
    extra = {"year": 1999, "score": 0.5, "public": True, "note": None, "place": "Köln"}
    write_jsonl(folder, {"file_name": "sub/b.jpg", "text": ["eins", "zwei"], "questions": [question]} | extra)
    (record,) = read_corpus(folder)
    assert record == Record(
        image_id="sub/b",
        path=(folder / "sub" / "b.jpg").resolve(),
        file_name="sub/b.jpg",
        sha256=hashlib.sha256((folder / "sub" / "b.jpg").read_bytes()).hexdigest(),
        captions=("eins", "zwei"),
        metadata=extra,
        questions=(Question("What colour?", "Red."),),
    )
    assert {key: type(value) for key, value in record.metadata.items()} == {k: type(v) for k, v in extra.items()}


def test_text_may_be_one_caption_or_none(folder):
    write_jsonl(folder, {"file_name": "a.png", "text": "a caption"}, {"file_name": "sub/b.jpg", "text": None})
    assert [record.captions for record in read_corpus(folder)] == [("a caption",), ()]


def test_an_explicit_image_id_replaces_the_file_name(folder):
    write_jsonl(folder, {"file_name": "a.png", "image_id": "mona-lisa"})
    assert list(read_corpus(folder).by_id) == ["mona-lisa"]


def test_the_default_image_id_drops_only_the_last_suffix(folder):
    save(folder / "v1.2" / "x.y.png")
    write_jsonl(folder, {"file_name": "./v1.2//x.y.png"})
    assert [(r.image_id, r.file_name) for r in read_corpus(folder)] == [("v1.2/x.y", "v1.2/x.y.png")]


def test_a_csv_gives_the_same_records_as_json(folder):
    (folder / "metadata.csv").write_text('file_name,text,place\na.png,"red, ""flat""",Köln\nsub/b.jpg,,\n', "utf-8")
    from_csv = read_corpus(folder).records
    (folder / "metadata.csv").unlink()
    write_jsonl(
        folder,
        {"file_name": "a.png", "text": 'red, "flat"', "place": "Köln"},
        {"file_name": "sub/b.jpg", "text": None, "place": None},
    )
    assert from_csv == read_corpus(folder).records


def test_metadata_of_a_csv_stays_text(folder):
    (folder / "metadata.csv").write_text("file_name,postcode\na.png,00123\n")
    assert read_corpus(folder).records[0].metadata == {"postcode": "00123"}


@pytest.mark.parametrize(
    ("name", "content"), [("metadata.jsonl", '{"file_name": "a.png"}'), ("metadata.csv", "file_name\na.png")]
)
def test_byte_order_mark_and_windows_line_ends_are_ignored(folder, name, content):
    (folder / name).write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode() + b"\r\n\r\n")
    assert list(read_corpus(folder).by_id) == ["a"]


def test_a_metadata_file_gives_the_listed_files_in_order(folder):
    save(folder / "unlisted.png")
    write_jsonl(folder, {"file_name": "sub/b.jpg"}, "", {"file_name": "a.png"})
    assert [record.file_name for record in read_corpus(folder)] == ["sub/b.jpg", "a.png"]


def test_a_listed_file_needs_no_known_suffix(folder):
    (folder / "a.png").rename(folder / "a.bin")
    write_jsonl(folder, {"file_name": "a.bin"})
    assert list(read_corpus(folder).by_id) == ["a"]


def test_a_bare_folder_gives_every_image_in_sorted_order(folder):
    for name in ("z.GIF", "sub/deep/c.webp", "10.bmp", "9.tiff"):
        save(folder / name)
    save(folder / ".hidden.png")
    save(folder / ".cache" / "d.png")
    (folder / "README.md").write_text("no image")
    corpus = read_corpus(folder)
    names = ["10.bmp", "9.tiff", "a.png", "sub/b.jpg", "sub/deep/c.webp", "z.GIF"]
    assert [record.file_name for record in corpus] == names
    assert [record.image_id for record in corpus] == ["10", "9", "a", "sub/b", "sub/deep/c", "z"]
    assert {record.captions for record in corpus} == {()}


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ico", "jp2", "ppm"])
def test_every_raster_format_is_found_and_read(tmp_path, suffix):
    save(tmp_path / f"x.{suffix}", size=(32, 32))
    assert len(read_corpus(tmp_path)) == 1


def test_a_relative_folder_gives_absolute_paths(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    corpus = read_corpus("images")
    assert all(record.path.is_absolute() and record.path.exists() for record in corpus)


def test_a_corpus_has_length_iteration_and_ids(folder):
    corpus = read_corpus(folder)
    assert len(corpus) == 2
    assert corpus.by_id["sub/b"] is list(corpus)[1]


def test_a_corpus_with_repeated_ids_is_an_error(folder):
    record = read_corpus(folder).records[0]
    with pytest.raises(DuplicateImage):
        Corpus(folder, (record, record))


def test_records_are_hashable_and_can_be_pickled(folder):
    """A data loader pickles records between its processes. No index is stored as a pickle."""
    write_jsonl(folder, {"file_name": "a.png", "year": 1999})
    (record,) = read_corpus(folder)
    assert pickle.loads(pickle.dumps(record)) == record
    assert len({record, record}) == 1


def test_progress_sees_every_row(folder):
    seen = []
    write_jsonl(folder, {"file_name": "a.png"}, {"file_name": "sub/b.jpg"})
    read_corpus(folder, progress=lambda rows: (seen.append(row) or row for row in rows))
    assert len(seen) == 2


def test_metadata_is_read_line_by_line(folder):
    """A broken first line is reported although the last line is not UTF-8, because it has not been read yet."""
    (folder / "metadata.jsonl").write_bytes(b"{broken\n" + b'{"file_name": "a.png"}\n' * 100_000 + b"\xff\n")
    with pytest.raises(MetadataError, match="line 1: not valid JSON"):
        read_corpus(folder)


def test_importing_the_module_stays_light():
    heavy = "{'torch', 'transformers', 'llama_index'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", f"import sys, llama_index_genret.corpus.imagefolder; sys.exit(bool({heavy}))"],
        check=True,
    )


# Errors of the folder and of the metadata file as a whole


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"nowhere does not exist"):
        read_corpus(tmp_path / "nowhere")


def test_a_file_in_place_of_the_folder_is_named(folder):
    with pytest.raises(CorpusError, match=r"a\.png is not a folder"):
        read_corpus(folder / "a.png")


def test_a_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "README.md").write_text("no image")
    with pytest.raises(CorpusError, match="no usable image: none is listed"):
        read_corpus(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("metadata.jsonl", "\n"), ("metadata.csv", "file_name,text\n")])
def test_empty_metadata_is_an_error(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(CorpusError, match="no usable image: none is listed"):
        read_corpus(folder)


def whole_file_errors() -> dict[str, tuple[dict[str, bytes], str]]:
    row = b'{"file_name": "a.png"}\n'
    return {
        "both": (
            {"metadata.jsonl": row, "metadata.csv": b"file_name\na.png\n"},
            r"both metadata\.jsonl and metadata\.csv",
        ),
        "jsonl not UTF-8": ({"metadata.jsonl": row + b'{"text": "K\xf6ln"}\n'}, r"metadata\.jsonl, line 2: not UTF-8"),
        "csv not UTF-8": ({"metadata.csv": b"file_name\na.png\nK\xf6ln\n"}, r"metadata\.csv, line 3: not UTF-8"),
        "UTF-16": ({"metadata.jsonl": row.decode().encode("utf-16")}, "line 1: not UTF-8"),
        "no file_name column": ({"metadata.csv": b"file,text\na.png,x\n"}, r"line 1: .*'file_name' is needed"),
        "empty csv": ({"metadata.csv": b""}, r"line 1: .*'file_name' is needed"),
        "repeated column": ({"metadata.csv": b"file_name,x,x\na.png,1,2\n"}, "line 1: .*needs its own name"),
        "unnamed column": ({"metadata.csv": b"file_name,\na.png,1\n"}, "line 1: .*needs its own name"),
        "questions in csv": ({"metadata.csv": b"file_name,questions\na.png,[]\n"}, r"'questions'.*metadata\.jsonl"),
        "open quote": ({"metadata.csv": b'file_name,text\na.png,x\nsub/b.jpg,"y\n'}, "line 3: not valid CSV"),
        "metadata further down": ({"sub/metadata.jsonl": row}, r"sub/metadata\.jsonl would not be read"),
        "parquet": ({"metadata.parquet": b"PAR1"}, r"metadata\.parquet would not be read"),
    }


@pytest.mark.parametrize("skip_broken", [False, True])
@pytest.mark.parametrize("case", whole_file_errors())
def test_skip_broken_does_not_skip_a_broken_metadata_file(folder, case, skip_broken):
    files, message = whole_file_errors()[case]
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(MetadataError, match=message):
        read_corpus(folder, skip_broken=skip_broken)


# Errors of one line

BROKEN_LINES = {
    "broken JSON": ('{"file_name": "a.png"', MetadataError, "not valid JSON"),
    "pretty-printed JSON": ("[", MetadataError, "one JSON object per line"),
    "not an object": ('["a.png"]', MetadataError, "a list, not an object"),
    "deep JSON": ("[" * 100_000, MetadataError, "not valid JSON"),
    "repeated key": ('{"file_name": "a.png", "text": "x", "text": "y"}', MetadataError, "given twice.*'text'"),
    "NaN": ('{"file_name": "a.png", "x": NaN}', MetadataError, "not valid JSON"),
    "infinite number": ('{"file_name": "a.png", "x": 1e999}', MetadataError, "not valid JSON"),
    "half a surrogate pair": (r'{"file_name": "a.png", "text": "\ud800"}', MetadataError, "not valid JSON"),
    "no file_name": ({"text": "x"}, MetadataError, "file_name must be text"),
    "empty file_name": ({"file_name": ""}, MetadataError, "file_name must be text"),
    "file_name null": ({"file_name": None}, MetadataError, "file_name must be text"),
    "file_name a number": ({"file_name": 7}, MetadataError, "file_name must be text.*7"),
    "text a number": ({"file_name": "a.png", "text": 7}, MetadataError, "text .*7"),
    "text an object": ({"file_name": "a.png", "text": {"en": "x"}}, MetadataError, "text .*'en'"),
    "text a list of numbers": ({"file_name": "a.png", "text": ["x", 7]}, MetadataError, "text .*7"),
    "empty text": ({"file_name": "a.png", "text": ""}, MetadataError, "text .*not empty"),
    "blank caption": ({"file_name": "a.png", "text": ["x", " \n"]}, MetadataError, "text .*not empty"),
    "image_id a number": ({"file_name": "a.png", "image_id": 7}, MetadataError, "image_id must be text.*7"),
    "empty image_id": ({"file_name": "a.png", "image_id": " "}, MetadataError, "image_id must be text"),
    "questions an object": ({"file_name": "a.png", "questions": {}}, MetadataError, "questions must be a list"),
    "questions of text": ({"file_name": "a.png", "questions": ["x?"]}, MetadataError, "questions must be a list"),
    "question unanswered": ({"file_name": "a.png", "questions": [{"question": "x?"}]}, MetadataError, "'answer'"),
    "question with more": (
        {"file_name": "a.png", "questions": [{"question": "x?", "answer": "y", "by": "z"}]},
        MetadataError,
        "'by'",
    ),
    "empty answer": (
        {"file_name": "a.png", "questions": [{"question": "x?", "answer": ""}]},
        MetadataError,
        "an answer must be text",
    ),
    "nested metadata": ({"file_name": "a.png", "exif": {"iso": 100}}, MetadataError, "'exif' is a dict.*Flatten"),
    "listed metadata": ({"file_name": "a.png", "tags": ["x"]}, MetadataError, "'tags' is a list.*Flatten"),
    "missing file": ({"file_name": "gone.png"}, ImageError, r"gone\.png is missing"),
    "a folder": ({"file_name": "sub"}, ImageError, r"sub is missing or not a regular file"),
    "the folder itself": ({"file_name": "."}, ImageError, "not a regular file"),
    "name too long": ({"file_name": "x" * 5000}, ImageError, "cannot be (read|opened)"),
    "parent folder": ({"file_name": "../images/a.png"}, UnsafePath, "leads out of the image folder"),
    "there and back": ({"file_name": "sub/../a.png"}, UnsafePath, "leads out of the image folder"),
    "parent folder, Windows": ({"file_name": r"..\a.png"}, UnsafePath, "leads out of the image folder"),
    "absolute": ({"file_name": "/etc/passwd"}, UnsafePath, "leads out of the image folder"),
    "absolute, Windows": ({"file_name": r"C:\a.png"}, UnsafePath, "leads out of the image folder"),
    "network share": ({"file_name": r"\\host\share\a.png"}, UnsafePath, "leads out of the image folder"),
    "NUL": ({"file_name": "a.png\0.jpg"}, UnsafePath, "leads out of the image folder"),
}


@pytest.mark.parametrize("case", BROKEN_LINES)
def test_a_broken_line_is_an_error_with_file_and_line(folder, case):
    row, error, message = BROKEN_LINES[case]
    metadata = write_jsonl(folder, {"file_name": "sub/b.jpg"}, "", row)
    with pytest.raises(CorpusError, match=rf"(?s)^{re.escape(str(metadata))}, line 3: .*{message}") as raised:
        read_corpus(folder)
    assert type(raised.value) is error


@pytest.mark.parametrize("case", BROKEN_LINES)
def test_skip_broken_lists_skipped_files_with_reasons(folder, case):
    row, _, message = BROKEN_LINES[case]
    write_jsonl(folder, row, {"file_name": "sub/b.jpg"})
    corpus = read_corpus(folder, skip_broken=True)
    assert list(corpus.by_id) == ["sub/b"]
    (skipped,) = corpus.skipped
    file_name = isinstance(row, dict) and row.get("file_name")
    assert (skipped.file_name, skipped.line) == (str(file_name) if file_name else "metadata.jsonl", 1)
    assert re.search(message, skipped.reason, re.DOTALL)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.png", "1 cells for 2 columns"),
        ("a.png,red, flat", "3 cells for 2 columns"),
        (",red", "file_name must be text"),
        ("a.png, ", "text .*not empty"),
        ("gone.png,x", "is missing"),
    ],
)
def test_a_broken_csv_row_is_reported_at_its_first_line(folder, row, message):
    (folder / "metadata.csv").write_text(f'file_name,text\nsub/b.jpg,"two\nlines"\n\n{row}\n')
    with pytest.raises(CorpusError, match=rf"metadata\.csv, line 5: .*{message}"):
        read_corpus(folder)
    (skipped,) = read_corpus(folder, skip_broken=True).skipped
    assert skipped.line == 5


def test_a_two_line_column_name_keeps_line_numbers(folder):
    (folder / "metadata.csv").write_text('file_name,"two\nlines"\ngone.png,x\n')
    with pytest.raises(ImageError, match=r"metadata\.csv, line 3: .*is missing"):
        read_corpus(folder)


def test_a_duplicate_id_names_both_lines(folder):
    rows = [{"file_name": "a.png", "image_id": "x"}, "", {"file_name": "sub/b.jpg", "image_id": "x"}]
    write_jsonl(folder, *rows)
    with pytest.raises(DuplicateImage, match=r"line 3: 'sub/b\.jpg' has the image_id 'x', which line 1 \('a\.png'\)"):
        read_corpus(folder)


def test_a_duplicate_id_in_a_bare_folder_names_both_files(folder):
    save(folder / "a.jpg")
    with pytest.raises(DuplicateImage, match=r"'a\.png' has the image_id 'a', which 'a\.jpg' already has"):
        read_corpus(folder)


def test_skip_broken_keeps_the_first_of_two_equal_ids(folder):
    write_jsonl(folder, *[{"file_name": name, "image_id": "x"} for name in ("gone.png", "a.png", "sub/b.jpg")])
    corpus = read_corpus(folder, skip_broken=True)
    assert [record.file_name for record in corpus] == ["a.png"]
    assert [(s.file_name, s.line) for s in corpus.skipped] == [("gone.png", 1), ("sub/b.jpg", 3)]


def test_an_intact_folder_has_no_skipped_images(folder):
    assert read_corpus(folder, skip_broken=True).skipped == ()


def test_a_folder_with_only_broken_images_is_an_error(folder):
    write_jsonl(folder, {"file_name": "gone.png"}, {"file_name": "lost.png"})
    with pytest.raises(CorpusError, match=r"all 2 are broken, the first: .*gone\.png is missing"):
        read_corpus(folder, skip_broken=True)


def test_a_broken_file_of_a_bare_folder_has_no_line_number(folder):
    (folder / "c.png").write_bytes(b"")
    (skipped,) = read_corpus(folder, skip_broken=True).skipped
    assert (skipped.file_name, skipped.line) == ("c.png", None)
    assert str(folder / "c.png") in skipped.reason
    assert isinstance(skipped, SkippedImage)


# Links


@needs_links
@pytest.mark.parametrize("listed", [True, False])
def test_a_link_out_of_the_folder_is_unsafe(folder, listed):
    (folder / "link.png").symlink_to(save(folder.parent / "secret.png"))
    if listed:
        write_jsonl(folder, {"file_name": "link.png"})
    with pytest.raises(UnsafePath, match=r"'link\.png' is a link out of the folder"):
        read_corpus(folder)


@needs_links
@pytest.mark.parametrize("listed", [True, False])
def test_a_linked_folder_out_of_the_folder_is_unsafe(folder, listed):
    save(folder.parent / "images-private" / "secret.png")
    (folder / "link").symlink_to(folder.parent / "images-private")
    if listed:
        write_jsonl(folder, {"file_name": "link/secret.png"})
    with pytest.raises(UnsafePath, match="is a link out of the folder"):
        read_corpus(folder)


@needs_links
def test_a_link_within_the_folder_is_an_image(folder):
    (folder / "link.png").symlink_to("sub/b.jpg")
    assert list(read_corpus(folder).by_id) == ["a", "link", "sub/b"]


@needs_links
def test_a_linked_folder_within_the_folder_is_read_once(folder):
    (folder / "sub" / "loop").symlink_to(folder)
    assert list(read_corpus(folder).by_id) == ["a", "sub/b"]


@needs_links
def test_a_link_to_itself_is_a_broken_image(folder):
    (folder / "loop.png").symlink_to("loop.png")
    with pytest.raises(ImageError, match=r"loop\.png"):
        read_corpus(folder)


@needs_links
def test_the_folder_itself_may_be_a_link(folder):
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert list(read_corpus(link).by_id) == ["a", "sub/b"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse the name")
def test_a_file_name_that_is_not_utf_8_is_named(folder):
    os.rename(folder / "a.png", os.fsencode(folder) + b"/K\xf6ln.png")  # noqa: PTH104
    with pytest.raises(ImageError, match=r"K\\udcf6ln\.png"):
        read_corpus(folder)


def test_an_unreadable_subfolder_is_an_error(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # CI often runs as root, which may read every folder
    with pytest.raises(CorpusError, match=r"cannot be listed.*Permission denied"):
        read_corpus(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_a_pipe_is_an_error_and_does_not_block(folder):
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe\.png is missing or not a regular file"):
        read_corpus(folder)


names = st.lists(st.from_regex(r"[a-zé ]{0,9}[a-z]", fullmatch=True), min_size=1, max_size=3).map("/".join)
