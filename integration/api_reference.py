"""The API reference: a page for each module, made from its docstrings by pdoc.

python -m integration.api_reference build/api    then open build/api/index.html

Fails where pdoc warns, and where a docstring names something that is not there. ruff holds that everything has one.
A package that lists its public names has one page, of those.
"""

import ast
import builtins
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pdoc

import llama_index_genret as package

PREFIX = f"{package.__name__}."
NOT_READ = ("vllm", "fastapi", "prometheus_client")
"""pdoc reads only the docstring of a module that needs a vLLM server's packages, installed or not."""
ELSEWHERE = {
    "AutoModelForImageTextToText", "IngestionPipeline", "OpenAILike", "RecallMiddleware", "SamplingParams",
    "VllmOfflineScorer", "vllm",
}  # fmt: skip
"""Targets that docstrings may mention although pdoc does not read them: other packages, and skipped modules."""
CODE = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)*)(?:\(\))?`")
CLASS = re.compile(r"[A-Z]+[a-z]\w*$")
FILE = re.compile(r"\.(jsonl?|txt|md|csv|npy|html|png)$")


def all_modules() -> dict[str, ModuleType]:
    """Return every module of the package by its full name. A module that cannot be imported has its docstring only."""
    sys.modules.update(dict.fromkeys(NOT_READ))  # as if they were not installed
    modules: dict[str, ModuleType] = {}
    unread = set(NOT_READ)
    for name in (PREFIX[:-1], *(found.name for found in pkgutil.walk_packages(package.__path__, PREFIX))):
        if name.endswith(".__main__"):  # a command, which would run
            continue
        try:
            modules[name] = import_module(name)
        except ImportError as error:
            missing = getattr(error.__cause__ or error, "name", None) or ""
            if not {missing, missing.partition(".")[0]} & unread:
                raise
            unread.add(name)
            modules[name] = sys.modules[name] = ModuleType(name, docstring_in_source(name))
    return modules


def docstring_in_source(name: str) -> str:
    """Return a stand-in with the docstring of a module that is not imported, and a note that says so."""
    spec = find_spec(name)
    source = Path((spec and spec.origin) or "").read_text(encoding="utf-8")
    return f"{ast.get_docstring(ast.parse(source))}\n\nIt needs a vLLM server's packages: see its source."


def write_reference(out: Path) -> None:
    """Write the pages.

    Raises:
        UserWarning: what pdoc has to say of a module that it cannot read.
    """
    for name in package.__all__:  # pdoc uses dir(), and these load on first use
        setattr(package, name, getattr(package, name))
    children = [child.name for child in pkgutil.iter_modules(package.__path__) if not child.name.startswith("_")]
    package.__all__ = [*package.__all__, *children]  # else pdoc takes them for private
    pdoc.render.configure(docformat="google", show_source=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"pdoc\.")
        # mypy checks annotations. pdoc resolves those of a NamedTuple in a module that does not exist.
        warnings.filterwarnings("ignore", message="Error parsing type annotation ForwardRef", module=r"pdoc\.doc_types")
        pdoc.pdoc(package.__name__, output_directory=out)


def broken_references(modules: dict[str, ModuleType]) -> Iterator[str]:
    """Return (place, reference) for each class or dotted path in the backticks of a docstring that does not exist.

    A reference is looked up in its module, in the package, and among all classes and functions of the package. A path
    that starts with a variable, as in `rows.token_ids`, is skipped.
    """
    known = {name: value for module in modules.values() for name, value in own_names(module)}
    known |= {name.rpartition(".")[2]: module for name, module in modules.items()}
    for module in modules.values():
        for place, docstring in docstrings(module):
            for name in CODE.findall(docstring):
                head, _, tail = name.partition(".")
                if FILE.search(name) or head in ELSEWHERE or not (tail or CLASS.match(name)):
                    continue
                found = [names[head] for names in (vars(module), known, vars(builtins)) if head in names]
                if (found or CLASS.match(name)) and not any(has(value, tail) for value in found):
                    yield f"{place}: `{name}`"


def own_names(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Return the classes and functions that a module defines."""
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) == module.__name__ and callable(value):
            yield name, value


def docstrings(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Return the docstrings of a module, of its classes and functions, and of their methods."""
    yield module.__name__, module.__doc__ or ""
    for name, value in own_names(module):
        yield f"{module.__name__}.{name}", value.__doc__ or ""
        for member, function in vars(value).items() if inspect.isclass(value) else ():
            text = getattr(function, "__doc__", None)
            yield f"{module.__name__}.{name}.{member}", text if isinstance(text, str) else ""


def has(value: Any, path: str) -> bool:
    """Return True if a dotted path resolves. Attributes that a class only annotates, or sets on `self`, count."""
    head, _, tail = path.partition(".")
    if not head or hasattr(value, head):
        return not head or has(getattr(value, head), tail)
    return inspect.isclass(value) and any(
        re.search(rf"^\s+(self\.)?{head}\b.*[:=]", inspect.getsource(cls), re.MULTILINE)
        for cls in value.__mro__
        if cls.__module__.startswith(PREFIX)
    )


def main(out: Path) -> None:
    """Write the reference, then fail if a reference in it is broken."""
    modules = all_modules()
    write_reference(out)
    broken = sorted(set(broken_references(modules)))
    if broken:
        sys.exit("docstrings name what is not there:\n" + "\n".join(broken))
    print(out / "index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
