"""Draw the README's figure of the parts and of the data between them, for light and dark pages.

python -m integration.architecture_picture integration/architecture.svg
"""

import sys
from base64 import b64encode
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

WIDTH, HEIGHT = 960, 560
STYLE = """
text { font: 13px system-ui, -apple-system, 'Segoe UI', 'Noto Sans', 'DejaVu Sans', sans-serif; fill: #3d4450; }
.title { font-weight: 600; font-size: 15px; fill: #14171c; }
.code { font-family: ui-monospace, 'SF Mono', Consolas, 'DejaVu Sans Mono', monospace; font-size: 12px; }
.lane { fill: #eef1f5; } .lane-name { font-weight: 600; fill: #5b6472; }
image { clip-path: inset(0 round 7px); }
.page { fill: #ffffff; } .box rect { fill: #ffffff; stroke: #b9c1cc; stroke-width: 1.2; }
.model rect { fill: #dcebff; stroke: #2f6fdb; stroke-width: 2; }
.arrow { fill: none; stroke: #5b6472; stroke-width: 1.6; marker-end: url(#head); } #head path { fill: #5b6472; }
.both { marker-start: url(#head); }
@media (prefers-color-scheme: dark) {
  text { fill: #c3cad4; } .title { fill: #f2f4f7; } .page { fill: #0f1318; } .lane { fill: #1a2028; }
  .lane-name { fill: #98a2b0; } .box rect { fill: #242c36; stroke: #4b5563; }
  .model rect { fill: #17355f; stroke: #6ea8ff; } .arrow { stroke: #98a2b0; } #head path { fill: #98a2b0; }
}
"""


@dataclass(frozen=True)
class Box:
    """A part: its title, lines below (monospace after a `$`), and demo emoji along its bottom edge."""

    x: int
    y: int
    width: int
    height: int
    title: str
    lines: tuple[str, ...] = ()
    emoji: tuple[str, ...] = ()
    kind: str = "box"

    def svg(self) -> str:
        """Return the SVG group of the part."""
        left = self.x + 14
        texts = [f'<text class="title" x="{left}" y="{self.y + 25}">{escape(self.title)}</text>']
        for row, line in enumerate(self.lines):
            letters = ' class="code"' if line.startswith("$") else ""
            texts.append(f'<text{letters} x="{left}" y="{self.y + 46 + 18 * row}">{escape(line.lstrip("$"))}</text>')
        top = self.y + 42 + 18 * len(self.lines)
        pictures = [picture(name, left + 42 * place, top) for place, name in enumerate(self.emoji)]
        frame = f'<rect x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="8"/>'
        return f'<g class="{self.kind}">{frame}{"".join(texts + pictures)}</g>'


@dataclass(frozen=True)
class Arrow:
    """An arrow along points, with `label` at a position of its own."""

    points: tuple[tuple[int, int], ...]
    label: str = ""
    at: tuple[int, int] = (0, 0)
    both: bool = False

    def svg(self) -> str:
        """Return the SVG of the line with one arrowhead, or two."""
        way = " L".join(f"{x} {y}" for x, y in self.points)
        x, y = self.at
        text = f'<text x="{x}" y="{y}">{escape(self.label)}</text>' if self.label else ""
        return f'<path class="arrow{" both" if self.both else ""}" d="M{way}"/>{text}'


def picture(name: str, x: int, y: int) -> str:
    """Return a demo emoji as an SVG image."""
    content = (files("llama_index_genret") / "cli" / "demo" / "data" / "images" / f"{name}.webp").read_bytes()
    data = b64encode(content).decode()
    return f'<image x="{x}" y="{y}" width="36" height="36" href="data:image/webp;base64,{data}"/>'


LANES = (
    (16, 152, "Once: genret index, genret train"),
    (206, 140, "genret serve: vLLM; or one process"),
    (384, 160, "Each query: LlamaIndex, without torch"),
)
BOXES = (
    Box(32, 52, 192, 102, "Your images", ("captions, metadata",), ("dog", "fox", "taxi", "pizza")),
    Box(258, 52, 194, 102, "Identifiers", ("$<g0_17><g1_5>", "codes of image features:", "alike for alike images")),
    Box(
        486, 52, 232, 102, "Training", ("LoRA: image → identifier,", "query → identifier,", "image, question → answer")
    ),
    Box(752, 52, 176, 102, "Index folder", ("trie, records,", "identifiers, adapter")),
    Box(32, 242, 420, 88, "Search", ("beam or exact, inside the trie: only images", "that exist and pass the filters")),
    Box(
        612,
        242,
        316,
        88,
        "Multimodal LLM",
        ("one set of weights: it recalls images,", "and it looks at them"),
        kind="box model",
    ),
    Box(32, 420, 192, 108, "Query", ("“the dog at the sea”", "a text, a picture, or both", "$album == 2024")),
    Box(252, 420, 216, 108, "Retriever", ("$GenerativeImageRetriever", "scores in (0, 1],", "metadata, file")),
    Box(496, 420, 164, 108, "Recalled", ("images, best first",), ("dog", "fox", "cat")),
    Box(688, 420, 240, 108, "Answer", ("$image_query_engine", "The model looks at them:", "“It plays with a ball.”")),
)
ARROWS = (
    Arrow(((224, 103), (256, 103))),
    Arrow(((452, 103), (484, 103))),
    Arrow(((718, 103), (750, 103))),
    Arrow(((880, 154), (880, 240)), "weights", (820, 192)),
    Arrow(((790, 154), (790, 187), (400, 187), (400, 240)), "trie, records", (412, 204)),
    Arrow(((454, 286), (610, 286)), "prefixes, log p", (484, 277), True),
    Arrow(((224, 474), (250, 474))),
    Arrow(((468, 474), (494, 474))),
    Arrow(((660, 474), (686, 474))),
    Arrow(((400, 332), (400, 418)), "POST /v1/recall", (412, 371), True),
    Arrow(((880, 332), (880, 418)), "pictures and question", (728, 371), True),
)


def svg() -> str:
    """Return the whole figure: lanes, then arrows, then boxes."""
    lanes = [
        f'<rect class="lane" x="16" y="{y}" width="928" height="{height}" rx="12"/>'
        f'<text class="lane-name" x="32" y="{y + 22}">{escape(name)}</text>'
        for y, height, name in LANES
    ]
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0 L8 4 L0 8 z"/></marker>'
    )
    parts = [*lanes, *(arrow.svg() for arrow in ARROWS), *(box.svg() for box in BOXES)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Images become identifiers, a model learns them, a search lets it generate only those">'
        f"<style>{STYLE}</style><defs>{head}</defs>"
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="14"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(svg(), encoding="utf-8")
