"""The documentation pages: README, the README of each folder with figures, and the texts of the notebooks.

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
"""Paths in the order in which a reader of README and its links runs their commands."""


@dataclass(frozen=True)
class Page:
    """One page.

    path: its file, relative to the repository.
    content: its Markdown.
    """

    path: Path
    content: str

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        """Return language and text of each fenced block."""
        return FENCED.findall(self.content)

    def of_language(self, language: str) -> list[str]:
        """Return the texts of all blocks of one language."""
        return [block for each, block in self.blocks if each == language]

    @cached_property
    def prose(self) -> str:
        """Return the text outside the fenced blocks."""
        return FENCED.sub("", self.content)

    @cached_property
    def inline(self) -> list[str]:
        """Return the code between backticks in the prose."""
        return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", self.prose)]

    @cached_property
    def shell(self) -> list[list[str]]:
        """Return the words of each command in the shell blocks."""
        lines = "".join(self.of_language("sh")).replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    @cached_property
    def anchors(self) -> set[str]:
        """Return the anchors of the headings, in GitHub's form."""
        headings = [line.lstrip("# ").lower() for line in self.prose.splitlines() if line.startswith("#")]
        return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}

    def target(self, address: str) -> Path:
        """Return the file of a relative address, relative to the repository."""
        return (ROOT / self.path.parent / address).resolve().relative_to(ROOT)


def read_page(path: str | Path) -> Page:
    """Read one page. The Markdown cells of a notebook are joined."""
    content = (ROOT / path).read_text(encoding="utf-8")
    if str(path).endswith(".ipynb"):
        cells = json.loads(content)["cells"]
        content = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return Page(Path(path), content)


PAGES = [read_page(path) for path in PATHS]
README, *OTHERS = PAGES
