"""Drawings by many authors with a title, keywords and sometimes a description, all in the public domain.

Depends on the layout of two Debian packages and the RDF in their drawings; independent of models.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from integration.recall.debian import unpacked
from integration.recall.pixels import on_white, rendered

VERSION = "1:0.18+dfsg-19"
PACKAGES = {
    "openclipart-svg": "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    "openclipart-png": "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
}
"""Packages, each with the sha256 of its file."""
LARGEST_PNG_BYTES = 1_000_000  # a few have hundreds of megapixels
FEWEST_KEYWORDS, FEWEST_DESCRIBING_WORDS = 3, 4
_DC, _RDF = "{http://purl.org/dc/elements/1.1/}", "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


@dataclass(frozen=True)
class Clipart:
    """One drawing and its author's words. A missing text is ""."""

    image_id: str
    title: str
    description: str
    keywords: tuple[str, ...]
    svg: Path
    png: Path
    """Return the package's own rendering."""

    @property
    def is_flag(self) -> bool:
        return "flags/" in self.image_id or "flag" in self.keywords

    def keyword_query(self) -> str | None:
        """Return the keywords that are not the title, if there are three or more."""
        words = [word.replace("_", " ") for word in dict.fromkeys(self.keywords) if plain(word) != plain(self.title)]
        return ", ".join(words) if len(words) >= FEWEST_KEYWORDS else None

    def description_query(self) -> str | None:
        """Return the description if it adds words to the title and has no address in it, else None."""
        words = plain(self.description).split()
        says_more = set(words) - set(plain(self.title).split())
        describes = len(words) >= FEWEST_DESCRIBING_WORDS and says_more and not re.search(r"@|://", self.description)
        return self.description if describes else None


def plain(text: str) -> str:
    """Reduce a title to letters and digits in lower case. Titles with equal results are the same."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def download(downloads: Path) -> Path:
    """Return the folder that holds `svg` and `png`.

    Raises:
        CorpusError, subprocess.CalledProcessError: see `debian.unpacked`.
    """
    return unpacked(PACKAGES, VERSION, downloads) / "usr/share/openclipart"


def read_clipart(folder: Path) -> list[Clipart]:
    """Return every drawing with a title of its own, in the order of their paths, without flags."""
    drawings = [path for path in sorted((folder / "svg").rglob("*.svg")) if not path.is_symlink()]
    found = [clipart for path in drawings if (clipart := _read(path, folder)).title and clipart.png.exists()]
    titles = Counter(plain(clipart.title) for clipart in found)
    return [clipart for clipart in found if titles[plain(clipart.title)] == 1 and not clipart.is_flag]


def _read(path: Path, folder: Path) -> Clipart:
    image_id = path.relative_to(folder / "svg").with_suffix("").as_posix()
    # The drawing holds several resources; the first is the drawing itself.
    work = next(
        (node for node in ElementTree.parse(path).iter() if node.tag.endswith("}Work")), ElementTree.Element("")
    )
    subjects = [item.text for subject in work.findall(f"{_DC}subject") for item in subject.iter(f"{_RDF}li")]
    return Clipart(
        image_id,
        _without_author(_line(work.findtext(f"{_DC}title"))),
        _line(work.findtext(f"{_DC}description")),
        tuple(line.lower() for line in map(_line, subjects) if line),
        path,
        folder / "png" / f"{image_id}.png",
    )


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _without_author(title: str) -> str:
    return re.sub(r"^Clipart by .*? - ", "", title)


def write_pictures(clipart: Iterable[Clipart], folder: Path) -> None:
    """Write each drawing as PNG on white."""
    for one in clipart:
        path = folder / f"{one.image_id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = one.png.stat().st_size <= LARGEST_PNG_BYTES
        (on_white(Image.open(one.png)) if small else rendered(one.svg.read_bytes())).save(path)


def metadata(clipart: Sequence[Clipart]) -> Iterator[dict[str, Any]]:
    """Return the rows of metadata.jsonl: the title as caption."""
    for one in clipart:
        yield {"file_name": f"{one.image_id}.png", "text": [one.title], "group": one.image_id.split("/")[0]}
