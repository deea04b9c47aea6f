"""What comes with an environment: the licences of its packages, and a CycloneDX bill of materials.

python -m integration.supply PYTHON OUT    writes OUT/licences.md and OUT/sbom.json

Knows pip-licenses and cyclonedx-py, which read the environment of another interpreter.
"""

import subprocess
import sys
from pathlib import Path

COMPATIBLE = (
    "Apache",
    "MIT",
    "BSD",
    "ISC",
    "PSF",
    "Python Software Foundation",
    "Mozilla Public License 2.0",
    "MPL-2.0",
)
"""A package under Apache-2.0 may depend on these; MPL-2.0 binds only who changes the files that are under it."""
INCOMPATIBLE = ("GPL", "GNU", "Proprietary", "Commons Clause", "SSPL", "UNKNOWN")


def list_licences(python: Path, out: Path) -> None:
    """Write a Markdown table of name, version and licence of each package.

    Raises:
        subprocess.CalledProcessError: a licence is none of COMPATIBLE, or names one of INCOMPATIBLE.
    """
    options = ["--allow-only", ";".join(COMPATIBLE), "--fail-on", ";".join(INCOMPATIBLE), "--partial-match"]
    run("piplicenses", "--python", python, "--format", "markdown", "--output-file", out, *options)


def write_bill_of_materials(python: Path, out: Path, *options: str) -> None:
    """Write CycloneDX JSON, the same for the same environment.

    Args:
        options: of cyclonedx-py; without `--no-validate` the file is held against the schema, which takes a while.
    """
    project = Path(__file__).parents[1] / "pyproject.toml"
    run("cyclonedx_py", "environment", "--pyproject", project, "--output-reproducible", *options, "-o", out, python)


def run(module: str, *arguments: str | Path) -> None:
    """Run a tool of this environment."""
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)


def main(python: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    list_licences(python, out / "licences.md")
    write_bill_of_materials(python, out / "sbom.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
