"""The emoji of one artist with the words of three communities.

Depends on the layouts of the npm packages; independent of models. The images are Fluent emoji (MIT). Labels and tags
are emojibase's (MIT), keywords are emojilib's (MIT). The same emoji by other artists, with other tags, are OpenMoji's
(CC BY-SA 4.0).
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from integration.demo_corpus import ART, KEYWORDS, LABELS_AND_TAGS, Package, download, plain, read
from integration.recall.pixels import on_white, rendered

OPENMOJI = Package("openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68")
FLAGS = "flags"
FEWEST_WORDS = 2


@dataclass(frozen=True)
class Emoji:
    """One emoji: its image, and every word that the packages have for it."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: str
    keywords: tuple[str, ...]
    openmoji_tags: tuple[str, ...]
    picture: bytes
    openmoji_picture: bytes
    """Return the image as SVG."""

    @property
    def image_id(self) -> str:
        return self.hexcode.lower()

    def keyword_query(self) -> str | None:
        """Return emojilib's keywords that are neither label nor tag, if there are two or more."""
        known = {spaced(word) for word in (self.label, *self.tags)}
        return joined(word for word in dict.fromkeys(map(spaced, self.keywords)) if word not in known)

    def tag_query(self) -> str | None:
        """Return the tags that are no word of the label, if there are two or more."""
        known = spaced(self.label).split()
        return joined(tag for tag in map(spaced, self.tags) if tag not in known)

    def openmoji_query(self) -> str | None:
        """Return the tags of OpenMoji. Flags have none, since their tags are the name of the country."""
        return ", ".join(self.openmoji_tags) or None if self.group != FLAGS else None


def spaced(word: str) -> str:
    """Return the words in lower case, with spaces for underscores."""
    return re.sub(r"[_\s]+", " ", word).strip().lower()


def joined(words: Iterable[str]) -> str | None:
    """Join words into one query, or return an empty text if they are too few to identify one image."""
    found = list(words)
    return ", ".join(found) if len(found) >= FEWEST_WORDS else None


def read_emoji(downloads: Path) -> list[Emoji]:
    """Return every emoji without a skin tone that Fluent has drawn and emojibase has described."""
    with (
        download(ART, downloads) as art,
        download(LABELS_AND_TAGS, downloads) as emojibase,
        download(KEYWORDS, downloads) as emojilib,
        download(OPENMOJI, downloads) as openmoji,
    ):
        groups = {row["order"]: row["key"] for row in json.loads(read(emojibase, "en/messages.json"))["groups"]}
        keywords = {plain(key): words for key, words in json.loads(read(emojilib, "dist/emoji-en-US.json")).items()}
        others = {plain(row["emoji"]): row for row in json.loads(read(openmoji, "data/openmoji.json"))}
        names = (path.removeprefix("package/") for path in art.getnames())
        artworks = {name.replace("-fe0f", ""): name for name in names}
        found = []
        for row in json.loads(read(emojibase, "en/data.json")):
            emoji = plain(row["emoji"])
            artwork = artworks.get("assets/" + "-".join(f"{ord(character):04x}" for character in emoji) + ".webp")
            if artwork is None:
                continue
            other = others[emoji]
            found.append(
                Emoji(
                    hexcode=row["hexcode"],
                    label=row["label"],
                    tags=tuple(row.get("tags", ())),
                    group=groups[row["group"]],
                    keywords=tuple(keywords[emoji]),
                    openmoji_tags=tuple(tag.strip() for tag in other["openmoji_tags"].split(",") if tag.strip()),
                    picture=read(art, artwork),
                    openmoji_picture=read(openmoji, f"color/svg/{other['hexcode']}.svg"),
                )
            )
    return found


def write_pictures(emoji: Iterable[Emoji], fluent: Path, openmoji: Path) -> None:
    """Write both images of each emoji as PNG on white, ID.png in either folder."""
    for one in emoji:
        on_white(Image.open(BytesIO(one.picture))).save(fluent / f"{one.image_id}.png")
        rendered(one.openmoji_picture).save(openmoji / f"{one.image_id}.png")


def metadata(emoji: Iterable[Emoji], *, tags: bool) -> Iterator[dict[str, Any]]:
    """Return the rows of metadata.jsonl: the label as caption, then each tag if `tags`."""
    for one in emoji:
        text = [one.label, *one.tags] if tags else [one.label]
        yield {"file_name": f"{one.image_id}.png", "text": text, "group": one.group, "hexcode": one.hexcode}
