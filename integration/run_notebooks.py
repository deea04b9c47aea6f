"""Execute the notebooks, each from top to bottom in a kernel of its own, and keep their outputs.

    python -m integration.run_notebooks [NAME ...] [--out FOLDER]

It writes in place, or into --out. A notebook is not written if an output has an error, a warning, or a path of this
machine. Progress bars are not kept, because they only help the reader of a running notebook.

Depends on Jupyter; independent of the package under test.
"""

import argparse
import hashlib
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
STARTUP_S, TIMEOUT_S = 300, 1800
BAR = re.compile(r"\d+%\||\d+(batch|step|it)? \[\d\d:\d\d")
LOCAL = re.compile(r"(?<![\w.:/<])/(?:home|root|tmp|work|usr|opt|Users|var)/\S*")
HARMLESS = re.compile(r"\[transformers\] Model config: pad_token_id .* got 128002")
"""Idefics3's configuration class warns about its own defaults, whatever the model's are."""

ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # where `genret` is
    "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",  # where `integration` and `tests` are
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TERM": "dumb",  # no colors in tables
    "PYTHONWARNINGS": "ignore:IProgress not found",  # of tqdm, which then draws its bars as text
}


class BadOutput(Exception):
    """A notebook ran, but has an output that no reader should see."""


def execute(source: Path, target: Path) -> float:
    """Run one notebook and write it with its outputs. Returns seconds.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed. BadOutput: see there.
    """
    started = time.monotonic()
    notebook = nbformat.read(source, 4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        kernel_name="python3",
        record_timing=False,
        startup_timeout=STARTUP_S,
        extra_arguments=["--log-level=ERROR"],  # it warns that 127.0.0.1 is not encrypted
        resources={"metadata": {"path": str(source.parent)}},
    )
    client.execute(env={**os.environ, **ENVIRONMENT})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := _kept(output, source.name, cell.source))]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "executed": digest([cell.source for cell in notebook.cells if cell.cell_type == "code"]),
    }
    nbformat.validate(notebook)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)
    return time.monotonic() - started


def digest(sources: list[str]) -> str:
    """Return a hash of the code that made a notebook's outputs."""
    return hashlib.sha256("\n\n".join(sources).encode()).hexdigest()


def _kept(output: Any, name: str, code: str) -> Any:
    """Return the output without progress bars, or None if nothing is left.

    Raises:
        BadOutput: stderr has something else, or a path of this machine is in the output.
    """
    if output.output_type == "stream" and output.name == "stderr":
        lines = [line for line in re.split(r"[\r\n]+", output.text) if line.strip()]
        lines = [line for line in lines if not BAR.search(line) and not HARMLESS.search(line)]
        if lines:
            raise BadOutput(f"{name} writes to stderr:\n{code}\n---\n" + "\n".join(lines))
        return None
    shown = {"text/plain": output.text} if output.output_type == "stream" else output.get("data", {})
    for kind, text in shown.items():
        if not kind.startswith("image/") and (found := LOCAL.search(str(text))):
            raise BadOutput(f"{name} shows {found.group()!r}, a path of this machine:\n{code}")
    return output


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks, without .ipynb (default: all)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write (default: in place)")
    options = parser.parse_args()
    sources = [FOLDER / f"{name}.ipynb" for name in options.names] or sorted(FOLDER.glob("*.ipynb"))
    for source in sources:
        seconds = execute(source, options.out / source.name)
        print(f"{source.name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
