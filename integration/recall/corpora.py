"""Downloads the pictures, words and queries of the recall table.

    python -m integration.recall.corpora [--out FOLDER]

Needs npm, and apt of Debian for openclipart. The last line of stdout is the folder, which holds

    emoji/            Fluent emoji; captions: the label, then each tag
    emoji-labels/     the same pictures; caption: the label
    openclipart/      drawings with a title of their own, without flags; caption: the title
    openmoji/         the emoji by other artists: what image queries show
    queries/          NAME.jsonl, and its parts NAME-validation.jsonl (an eighth of the pictures) and NAME-test.jsonl

    emoji-keywords, emoji-openmoji-tags, emoji-images   ask emoji/
    emoji-labels-tags                                   asks emoji-labels/
    openclipart-keywords, openclipart-descriptions      ask openclipart/

Choices are made on the validation parts; the table shows the test parts.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from integration.recall import emoji as emojis
from integration.recall import openclipart
from integration.recall.split import write_lines, write_queries

Item = TypeVar("Item", emojis.Emoji, openclipart.Clipart)
RECEIPT = "receipt.json"


def build(folder: Path, downloads: Path) -> None:
    """Write everything into `folder`, which does not exist yet."""
    _say("emoji: downloading four npm packages (27 MB)")
    emoji = emojis.read_emoji(downloads)
    for name in ("emoji", "emoji-labels", "openmoji", "queries"):
        (folder / name).mkdir(parents=True)
    _say(f"emoji: drawing {len(emoji)} twice")
    emojis.write_pictures(emoji, folder / "emoji", folder / "openmoji")
    for path in (folder / "emoji").glob("*.png"):
        os.link(path, folder / "emoji-labels" / path.name)
    write_lines(folder / "emoji/metadata.jsonl", emojis.metadata(emoji, tags=True))
    write_lines(folder / "emoji-labels/metadata.jsonl", emojis.metadata(emoji, tags=False))
    _write(folder, "emoji-keywords", emoji, emojis.Emoji.keyword_query)
    _write(folder, "emoji-openmoji-tags", emoji, emojis.Emoji.openmoji_query)
    _write(folder, "emoji-labels-tags", emoji, emojis.Emoji.tag_query)
    images = ({"image": f"../openmoji/{e.image_id}.png", "image_id": e.image_id, "kind": "image"} for e in emoji)
    write_queries(folder / "queries", "emoji-images", images)

    _say("openclipart: downloading two Debian packages (156 MB)")
    clipart = openclipart.read_clipart(openclipart.download(downloads))
    _say(f"openclipart: scaling {len(clipart)}")
    openclipart.write_pictures(clipart, folder / "openclipart")
    write_lines(folder / "openclipart/metadata.jsonl", openclipart.metadata(clipart))
    _write(folder, "openclipart-keywords", clipart, openclipart.Clipart.keyword_query)
    _write(folder, "openclipart-descriptions", clipart, openclipart.Clipart.description_query)


def _write(folder: Path, name: str, items: Iterable[Item], query: Callable[[Item], str | None]) -> None:
    pairs = [(query(item), item.image_id) for item in items]
    rows = [{"query": text, "image_id": image_id, "kind": name} for text, image_id in pairs if text]
    write_queries(folder / "queries", name, rows)
    _say(f"{name}: {len(rows)} queries")


def digest() -> str:
    """Return a key that changes with the text of the modules that decide the content."""
    modules = ("corpora.py", "emoji.py", "openclipart.py", "pixels.py", "split.py")
    return hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in modules)).hexdigest()[:16]


def default_folder() -> Path:
    """Return the folder where the corpora are cached."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "llama-index-genret" / f"recall-corpora-{digest()}"


def make_corpora(folder: Path) -> Path:
    """Build the corpora in `folder`, unless they are there. The folder appears complete or not at all.

    Raises:
        FileExistsError: the folder holds something else, or the corpora of other code.
        CorpusError: a package differs from the one this was written for.
        subprocess.CalledProcessError: npm or apt failed, and has said why on stderr.
    """
    receipt = folder / RECEIPT
    if receipt.is_file() and json.loads(receipt.read_text())["digest"] == digest():
        return folder
    if folder.exists():
        raise FileExistsError(f"{folder} exists and holds other corpora. Remove it, or choose another --out.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".recall-corpora-") as scratch:
        downloads, building = Path(scratch, "downloads"), Path(scratch, "corpora")
        downloads.mkdir()
        build(building, downloads)
        (building / RECEIPT).write_text(json.dumps({"digest": digest()}))
        shutil.move(building, folder)
    return folder


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to write (default: in the user's cache)")
    print(make_corpora(parser.parse_args().out or default_folder()).resolve())


if __name__ == "__main__":
    main()
