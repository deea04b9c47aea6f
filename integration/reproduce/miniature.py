"""A few dozen drawn images in the files of Karpathy's split, for both datasets. The tests run the experiment on them.

    python -m integration.reproduce.miniature --out DIR

writes DIR/flickr30k and DIR/coco, each with dataset_NAME.json, images/ and pseudo_queries.jsonl. An image shows a
colored shape beside or above another. No two images show the same, and no caption fits two.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLORS = {"red": "#dc1e1e", "green": "#14a03c", "blue": "#1e3cdc", "yellow": "#f0d228", "black": "#141414"}
SHAPES = ("circle", "square", "triangle", "bar")
PLACES = {"left": ((4, 20), (36, 20)), "above": ((20, 4), (20, 36))}
"""Positions of the first and the second shape, each of 24 pixels, in an image of 64."""

SPLITS = {
    "flickr30k": {"train": 20, "val": 4, "test": 8},
    "coco": {"train": 14, "restval": 6, "val": 4, "test": 8},
}
"""Number of images of each split."""

CAPTIONS = (
    "A {0} {1} {4} a {2} {3}.",
    "There is a {0} {1}; it is {4} a {2} {3}.",
    "Two shapes: a {1} that is {0}, {4} a {3} that is {2}.",
    "The {0} {1} is drawn {4} the {2} {3}",
    "a picture of a {0} {1} that stands {4} a {2} {3}",
)
PSEUDO_QUERIES = ("{0} {1} and {2} {3}", "a {0} thing {4} a {2} {3}")


@dataclass(frozen=True)
class Scene:
    """Two shapes, each with a color. The first is left of or above the second."""

    color: str
    shape: str
    other_color: str
    other_shape: str
    place: str

    def say(self, template: str) -> str:
        """Describe the scene in words."""
        words = "left of" if self.place == "left" else "above"
        return template.format(self.color, self.shape, self.other_color, self.other_shape, words)

    def draw(self) -> Image.Image:
        """Draw the scene in 64 x 64 pixels."""
        image = Image.new("RGB", (64, 64), "white")
        draw = ImageDraw.Draw(image)
        first, second = PLACES[self.place]
        for (x, y), color, shape in ((first, self.color, self.shape), (second, self.other_color, self.other_shape)):
            fill, box = COLORS[color], (x, y, x + 24, y + 24)
            if shape == "circle":
                draw.ellipse(box, fill=fill)
            elif shape == "square":
                draw.rectangle(box, fill=fill)
            elif shape == "triangle":
                draw.polygon([(x, y + 24), (x + 24, y + 24), (x + 12, y)], fill=fill)
            else:
                draw.rectangle((x, y + 8, x + 24, y + 15), fill=fill)
        return image


def scenes(n: int, *, seed: int) -> list[Scene]:
    """Draw `n` scenes that differ."""
    every = [
        Scene(color, shape, other_color, other_shape, place)
        for color, other_color in permutations(COLORS, 2)
        for shape, other_shape, place in product(SHAPES, SHAPES, PLACES)
    ]
    return [every[row] for row in np.random.default_rng(seed).permutation(len(every))[:n]]


def write_miniature(out: Path) -> Path:
    """Write both datasets."""
    for seed, name in enumerate(SPLITS):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        splits = [split for split, count in SPLITS[name].items() for _ in range(count)]
        drawn = scenes(len(splits), seed=seed)
        images: list[dict[str, Any]] = []
        pseudo = []
        sentences = 0
        for number, (split, scene) in enumerate(zip(splits, drawn, strict=True)):
            place = _place(name, split, number)
            path = folder / "images" / place.get("filepath", "") / place["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            scene.draw().save(path, quality=95)
            said = [scene.say(template) for template in CAPTIONS]
            if name == "coco" and number == len(splits) - 1:  # some of its images have six
                said.append(scene.say("{0} {1} seen {4} one {2} {3}"))
            ids = list(range(sentences, sentences + len(said)))
            sentences += len(said)
            images.append(
                {**place, "imgid": number, "split": split, "sentids": ids, "sentences": _sentences(said, ids, number)}
            )
            if split == "test":
                pseudo.append(
                    {
                        "file_name": str(path.relative_to(folder / "images")),
                        "text": [scene.say(t) for t in PSEUDO_QUERIES],
                    }
                )
        content = {"images": images, "dataset": name}
        (folder / f"dataset_{name}.json").write_text(json.dumps(content), encoding="utf-8")
        (folder / "pseudo_queries.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in pseudo), encoding="utf-8"
        )
    return out


def _place(name: str, split: str, number: int) -> dict[str, Any]:
    """Return the keys that give the location of an image's file. In MS-COCO all but train are in val2014."""
    if name == "flickr30k":
        return {"filename": f"{1000092795 + number}.jpg"}
    folder = "train2014" if split == "train" else "val2014"
    return {"filepath": folder, "filename": f"COCO_{folder}_{number + 1:012}.jpg", "cocoid": number + 1}


def _sentences(said: Sequence[str], ids: Sequence[int], imgid: int) -> list[dict[str, Any]]:
    return [
        {
            "tokens": text.lower().replace(".", "").replace(",", "").split(),
            "raw": text,
            "imgid": imgid,
            "sentid": sentid,
        }
        for text, sentid in zip(said, ids, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the datasets, and print the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m integration.reproduce.miniature", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", required=True, type=Path)
    print(write_miniature(parser.parse_args(arguments).out))


if __name__ == "__main__":
    main()
