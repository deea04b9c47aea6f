"""The pages that people read: README, the README of each folder with figures, the texts of the notebooks.

Depends on files only; independent of the package.
"""

import json
import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PATHS = (
    "README.md",
    "notebooks/06_your_own_model.ipynb",
    "notebooks/05_changing_corpora.ipynb",
    "notebooks/04_rag_pipelines.ipynb",
    "notebooks/02_identifiers.ipynb",
    "integration/recall/README.md",
    "integration/bench/README.md",
    "integration/deploy/README.md",
    "integration/faults/README.md",
)
"""In the order in which a reader of README and its links runs their commands."""


@dataclass(frozen=True)
class Page:
    """One page. path: its file, relative to the repository. content: its Markdown."""

    path: Path
    content: str

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        """Language and text of each fenced block."""
        return FENCED.findall(self.content)

    def of_language(self, language: str) -> list[str]:
        """The texts of all blocks of one language."""
        return [block for each, block in self.blocks if each == language]

    @cached_property
    def prose(self) -> str:
        """Everything outside the fenced blocks."""
        return FENCED.sub("", self.content)

    @cached_property
    def inline(self) -> list[str]:
        """The code between backticks in the prose."""
        return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", self.prose)]

    @cached_property
    def shell(self) -> list[list[str]]:
        """The words of each command in a block of shell."""
        lines = "".join(self.of_language("sh")).replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    @cached_property
    def anchors(self) -> set[str]:
        """The addresses of the headings, as GitHub makes them."""
        headings = [line.lstrip("# ").lower() for line in self.prose.splitlines() if line.startswith("#")]
        return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}

    def target(self, address: str) -> Path:
        """The file that a relative address leads to, relative to the repository."""
        return (ROOT / self.path.parent / address).resolve().relative_to(ROOT)


def read_page(path: str | Path) -> Page:
    """Read one page; the Markdown cells of a notebook are one text."""
    content = (ROOT / path).read_text(encoding="utf-8")
    if str(path).endswith(".ipynb"):
        cells = json.loads(content)["cells"]
        content = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return Page(Path(path), content)


PAGES = [read_page(path) for path in PATHS]
README, *OTHERS = PAGES
