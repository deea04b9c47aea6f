"""The modules of the package as syntax trees, for tests of the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import llama_index_genret

PACKAGE = Path(llama_index_genret.__file__).parent


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield the path of each module below the package, and its tree."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))
