"""Rebuild `llama_index_genret/cli/demo/data`: 100 emoji images with captions, questions and held-out queries.

    python -m integration.demo_corpus [FOLDER]

Needs npm for the download, Pillow and numpy. The same packages and the same Pillow give the same bytes.
Depends on npm packages, pixels and words; independent of identifiers, models and training. `demo_questions` words the
questions.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from integration.demo_questions import Kind, answer_tests, trained_questions, untrained_colors
from llama_index_genret.errors import CorpusError

DEMO_DATA = Path(__file__).resolve().parents[1] / "llama_index_genret" / "cli" / "demo" / "data"
SIDE = 160
TRAINED_TAGS = 2
FITS_AT_MOST = 4  # a word that fits more images than this is no query for any of them
TAG_QUERIES_PER_PICTURE = 3

PICTURES = {
    "animal": "🐶 🐈 🦊 🐘 🐧 🦉 🐢 🐙 🦋 🐸",
    "food": "🍕 🍔 🌮 🍣 🍩 🎂 🥐 🍿 🧀 🍦",
    "fruit": "🍎 🍌 🍇 🍉 🍓 🍍",
    "drink": "☕ 🍺 🍹 🍷",
    "vehicle": "🚒 🚕 🚲 🚂 🚁 🚀 ⛵ 🚜 ✈ 🛵",
    "place": "🏰 🏠 🗽 🎡 🌋 🏝 🎪 ⛩ 🕌 🏭",
    "plant": "🌻 🌵 🌹 🍀 🍁",
    "weather": "☀ 🌈 🌪 ❄ 🌩",
    "sport": "⚽ 🏀 🏈 🎾 🥊 🎳 🏓 ⛸ 🎣 🤿",
    "object": "⏰ 📷 ✂ 🔑 💡 📚 🔭 🧲 ☂ 💻",
    "instrument": "🎸 🎻 🎺 🥁 🎹 🪗",
    "clothing": "👗 👖 🎩 🧦",
    "face": "😎 😭 😴 🤠",
    "person": "🧑‍🚀 🧑‍🍳 🕵",
    "creature": "👻 👽 🧜‍♀",
}
# The label of emojibase if the image shows something else, or if nobody would use that label.
LABELS = {"🐶": "dog", "🎾": "tennis racket", "🎳": "bowling pins", "🏓": "ping pong paddle", "🤠": "cowboy"}
# Images whose most frequent hue is not the color that a person would give.
COLORS_BY_EYE = {
    emoji: color
    for color, emojis in {
        "red": "🍿 🚲 🎪 🍁 🤿 ✂ 🎸 🥁 🪗",
        "orange": "🦋 ⛵ 🏀",
        "yellow": "🍌 🍺 🎺 😎 😭 😴 🤠",
        "brown": "🐶 🍩",
        "pink": "🐙",
        "purple": "🍷",
        "black": "🚂 🎹 🎩",
        "gray": "🏰",
        "multicolored": "🌈 📚",
    }.items()
    for emoji in emojis.split()
}
# Tags and keywords that do not describe the image, repeat another one, are misspelt, or do not fit the art.
UNUSED_WORDS_TEXT = """
accordian activity adorbs big black booze bowl box bro ca chadder class club colada comic contact department dionysus
disaster drama drive eat entertainment et excited external extraterrestrial eye fairy fast feature friend fun gang gay
genderqueer glbt glbtq gold good heart heels hot hrs human hungry instructment kod lesbian lgbtqia londoneye mai major
mojito negative new ny open or paul personal photo pina play positive potassium private resort restaurant roflcopter
sasha serve service shape side smallest snap spin spring staffmode strat super tai tale tbt ten th trip u vegetable
waiting weird whatever york
"""
UNUSED_WORDS = frozenset(UNUSED_WORDS_TEXT.split())
# Training uses "{}", "a picture of {}", "find {}" and "image: {}". These templates are never trained.
CARRIERS = (
    "show me the {}",
    "I'm looking for a photo of the {}",
    "could you find the {} please",
    "where is the image with the {}?",
    "which picture shows the {}?",
    "I would like to see the {}",
    "do you have anything with the {} in it?",
    "please bring up the {}",
)


@dataclass(frozen=True)
class Package:
    """One version of one npm package. `sha256` is the checksum of the packed tarball."""

    name: str
    version: str
    sha256: str


ART = Package("@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58")
LABELS_AND_TAGS = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)
KEYWORDS = Package("emojilib", "4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303")


@dataclass(frozen=True)
class Picture:
    """One emoji: its artwork and every word that the two word packages have for it."""

    emoji: str
    label: str
    kind: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    keywords: tuple[str, ...]
    artwork: Image.Image

    @property
    def file_name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-") + ".webp"

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.tags + self.keywords))

    @cached_property
    def color(self) -> str:
        return COLORS_BY_EYE.get(plain(self.emoji)) or main_color(self.artwork)

    @property
    def answers(self) -> dict[Kind, str]:
        return {"what": self.label, "kind": self.kind, "color": self.color}


def plain(emoji: str) -> str:
    """Remove variation selectors, which the packages set differently."""
    return emoji.replace("\ufe0f", "")


def clean(words: Iterable[str]) -> tuple[str, ...]:
    """Normalise words: lower case, spaces for underscores. Smileys, numbers and empty words are left out."""
    spaced = (re.sub(r"[_\s]+", " ", word).strip().lower() for word in words)
    return tuple(dict.fromkeys(word for word in spaced if re.fullmatch(r"[a-z][a-z -]+", word)))


# --- packages -------------------------------------------------------------------------------------------------------


def download(package: Package, folder: Path) -> tarfile.TarFile:
    """Raise CorpusError unless the tarball is the one that this script was written for."""
    spec = f"{package.name}@{package.version}"
    command = ["npm", "pack", spec, "--silent", "--pack-destination", str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    path = folder / output.split()[-1]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 != package.sha256:
        raise CorpusError(f"{spec} has sha256 {sha256}, expected {package.sha256}: the registry serves another file.")
    return tarfile.open(path)


def read(package: tarfile.TarFile, path: str) -> bytes:
    member = package.extractfile(f"package/{path}")
    if member is None:
        raise CorpusError(f"package/{path} is a folder, a file was expected.")
    return member.read()


def read_pictures(art: tarfile.TarFile, emojibase: tarfile.TarFile, emojilib: tarfile.TarFile) -> list[Picture]:
    entries = {plain(entry["emoji"]): entry for entry in json.loads(read(emojibase, "en/data.json"))}
    messages = json.loads(read(emojibase, "en/messages.json"))
    groups = {group["order"]: group["message"] for group in messages["groups"]}
    # The message of the subgroup "food-marine" shares its order with "food-sweet"; none of ours is seafood.
    subgroups = {subgroup["order"]: subgroup["message"] for subgroup in messages["subgroups"]}
    keywords = {plain(emoji): words for emoji, words in json.loads(read(emojilib, "dist/emoji-en-US.json")).items()}
    artworks = {name.replace("-fe0f", ""): name for name in (path.removeprefix("package/") for path in art.getnames())}

    def picture(emoji: str, kind: str) -> Picture:
        entry = entries[emoji]
        codes = "-".join(f"{ord(character):04x}" for character in emoji)
        webp = read(art, artworks[f"assets/{codes}.webp"])
        return Picture(
            emoji=entry["emoji"],
            label=LABELS.get(emoji, entry["label"]),
            kind=kind,
            group=groups[entry["group"]],
            subgroup=subgroups[entry["subgroup"]],
            tags=clean(entry.get("tags", ())),
            keywords=clean(keywords[emoji]),
            artwork=Image.open(BytesIO(webp)).convert("RGBA"),
        )

    return [picture(emoji, kind) for kind, emojis in PICTURES.items() for emoji in emojis.split()]


# --- pixels ---------------------------------------------------------------------------------------------------------


def on_white(artwork: Image.Image) -> Image.Image:
    white = Image.new("RGBA", artwork.size, "white")
    white.alpha_composite(artwork)
    return white.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main_color(artwork: Image.Image) -> str:
    """Return the color word that most of the opaque pixels vote for. The background has no vote."""
    rgba = np.asarray(artwork)
    opaque = rgba[..., 3] > 127
    hue, saturation, value = np.moveaxis(np.asarray(artwork.convert("RGB").convert("HSV"))[opaque], -1, 0) / 255.0
    hue = hue * 360
    votes = np.select(
        [
            value < 0.28,
            (saturation < 0.16) & (value > 0.82),
            saturation < 0.16,
            ((hue < 40) | (hue > 340)) & (value < 0.62),
            (hue < 14) | (hue >= 342),
            hue < 38,
            hue < 66,
            hue < 168,
            hue < 256,
            hue < 300,
        ],
        ["black", "white", "gray", "brown", "red", "orange", "yellow", "green", "blue", "purple"],
        default="pink",
    )
    return str(Counter(votes.tolist()).most_common(1)[0][0])


# --- words ----------------------------------------------------------------------------------------------------------


def overlaps(word: str, text: str) -> bool:
    """Return True if `text` has a part of `word` in it. "taxicab" matches "taxi", "bike" not "bicycle"."""
    parts, known = re.findall(r"[a-z]+", word.lower()), re.findall(r"[a-z]+", text.lower())
    return any(part in other or (len(other) > 2 and other in part) for part in parts for other in known)


def captions(picture: Picture, shared: Counter[str]) -> list[str]:
    """Return the label, then the label with the tags that most other images share. Rarer tags stay held out."""
    words = [word for word in picture.words if word not in UNUSED_WORDS and not overlaps(word, picture.label)]
    special = [word for word in words if shared[word] < 2]
    tags = [word for word in words if word in picture.tags and (word not in special or len(special) > TRAINED_TAGS)]
    chosen = sorted(tags, key=lambda tag: (-shared[tag], tag))[:TRAINED_TAGS] or [picture.kind]
    return [picture.label, ", ".join([picture.label, *chosen])]


def training_captions(pictures: list[Picture]) -> dict[str, list[str]]:
    shared = Counter(word for picture in pictures for word in picture.words)
    return {picture.file_name: captions(picture, shared) for picture in pictures}


def tag_queries(pictures: list[Picture], trained: dict[str, list[str]]) -> Iterator[dict[str, object]]:
    """Return words of the two packages that are in no caption of any image, with all the images that they fit."""
    taken = {part for texts in trained.values() for text in texts for part in text.lower().split(", ")}
    taken |= {word for part in taken for word in part.split()} | UNUSED_WORDS | set(PICTURES)
    taken |= {picture.color for picture in pictures}
    fits: dict[str, list[str]] = {}
    for picture in pictures:
        for word in picture.words:
            fits.setdefault(word, []).append(picture.file_name)

    def usable(word: str) -> bool:
        given_away = any(overlaps(word, " ".join(trained[name])) for name in fits[word])
        return word not in taken and not given_away and len(fits[word]) <= FITS_AT_MOST

    used: set[str] = set()
    for picture in pictures:
        words = sorted((word for word in picture.words if usable(word)), key=lambda word: len(fits[word]))
        for word in words[:TAG_QUERIES_PER_PICTURE]:
            if word not in used:
                used.add(word)
                names = fits[word]
                yield {"query": word, "file_name": names if len(names) > 1 else names[0], "kind": "tag"}


def phrasing_queries(pictures: list[Picture]) -> Iterator[dict[str, object]]:
    for place, picture in enumerate(pictures):
        query = CARRIERS[place % len(CARRIERS)].format(picture.label)
        yield {"query": query, "file_name": picture.file_name, "kind": "phrasing"}


# --- files ----------------------------------------------------------------------------------------------------------


def metadata(picture: Picture, text: list[str], questions: list[dict[str, str]]) -> dict[str, object]:
    return {
        "file_name": picture.file_name,
        "text": text,
        "group": picture.group,
        "subgroup": picture.subgroup,
        "emoji": picture.emoji,
        "questions": questions,
    }


def write_lines(path: Path, rows: Iterable[dict[str, object]] | Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def licenses(emojibase: tarfile.TarFile, emojilib: tarfile.TarFile) -> str:
    """Write the licence.

    The art package ships no licence text, so the words of the MIT licence are emojibase's copy.
    """
    words, keywords = read(emojibase, "LICENSE").decode(), read(emojilib, "LICENSE").decode()
    permission = words[words.index("Permission is hereby granted") :].strip()
    copyrights = [next(line for line in text.splitlines() if "Copyright" in line) for text in (words, keywords)]
    return f"""The pictures in images/ are Microsoft Fluent Emoji, taken from the npm package {ART.name} {ART.version}
(MIT, Copyright (c) 2023 LobeHub), scaled to {SIDE}x{SIDE} on white.

MIT License

Copyright (c) Microsoft Corporation.

{permission}

----------------------------------------------------------------------------------------------------------------

The words in images/metadata.jsonl, queries.jsonl and grounding.jsonl come from two packages under the same licence,
the MIT License, whose permission notice above applies to each:

{LABELS_AND_TAGS.name} {LABELS_AND_TAGS.version} (labels, tags, groups): {copyrights[0]}
{KEYWORDS.name} {KEYWORDS.version} (keywords): {copyrights[1]}
"""


def readme(pictures: list[Picture], tags: int, tests: int) -> str:
    untrained = ", ".join(picture.label for picture in untrained_colors(pictures))
    note = (
        "Each image has three of seven wordings of a question. Three more wordings are in `grounding.jsonl` only. "
        f"No question is trained about the colors of: {untrained}."
    )
    n_images = len(pictures)
    return f"""# The demo's pictures
Generated by `python -m integration.demo_corpus` (needs npm); do not edit by hand.

| file | what |
|---|---|
| `images/` | {n_images} emoji, {SIDE}x{SIDE} WebP, with `metadata.jsonl`: captions, group, questions with answers |
| `queries.jsonl` | {tags} tags and {n_images} phrasings, held out: nothing here is ever trained |
| `grounding.jsonl` | {tests} questions, held out by wording, image or both, with another image and its answer |

{textwrap.fill(note, 120)}

| npm package | version | licence | gives |
|---|---|---|---|
| `{ART.name}` | {ART.version} | MIT | the art: Microsoft Fluent Emoji, MIT |
| `{LABELS_AND_TAGS.name}` | {LABELS_AND_TAGS.version} | MIT | labels, tags, groups |
| `{KEYWORDS.name}` | {KEYWORDS.version} | MIT | keywords of another community, for held-out queries |

`LICENSE-fluent-emoji.txt` has the licence text and the copyright lines. A few labels were reworded to fit the art.
"""


def build(folder: Path, downloads: Path) -> None:
    with (
        download(ART, downloads) as art,
        download(LABELS_AND_TAGS, downloads) as emojibase,
        download(KEYWORDS, downloads) as emojilib,
    ):
        pictures = read_pictures(art, emojibase, emojilib)
        license_text = licenses(emojibase, emojilib)
    trained = training_captions(pictures)
    tags = list(tag_queries(pictures, trained))
    images = folder / "images"
    images.mkdir(parents=True)
    for picture in pictures:
        on_white(picture.artwork).save(images / picture.file_name, quality=90, method=6)
    questions = trained_questions(pictures)
    rows = (metadata(picture, trained[picture.file_name], questions[picture.file_name]) for picture in pictures)
    write_lines(images / "metadata.jsonl", rows)
    write_lines(folder / "queries.jsonl", [*tags, *phrasing_queries(pictures)])
    tests = list(answer_tests(pictures))
    write_lines(folder / "grounding.jsonl", tests)
    (folder / "LICENSE-fluent-emoji.txt").write_text(license_text, encoding="utf-8")
    (folder / "README.md").write_text(readme(pictures, len(tags), len(tests)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the demo's pictures, captions and held-out queries.")
    parser.add_argument("folder", nargs="?", type=Path, default=DEMO_DATA, help="folder to replace")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch) / "data", Path(scratch))
        if folder.exists():
            shutil.rmtree(folder)
        shutil.move(Path(scratch) / "data", folder)


if __name__ == "__main__":
    main()
