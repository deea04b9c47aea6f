"""Check the licences of an environment's packages, and write a CycloneDX bill of materials.

python -m integration.supply PYTHON OUT    writes OUT/licences.md and OUT/sbom.json

Depends on pip-licenses and cyclonedx-py, which read the environment of another interpreter.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

COMPATIBLE = (
    *(
        "Apache",
        "Apache Software License",
        "Apache-2.0",
        "MIT",
        "MIT-0",
        "MIT-CMU",
        "HPND",
        "BSD",
        "0BSD",
        "ISC",
        "ISCL",
    ),
    *("PSF", "PSF-2.0", "Python Software Foundation", "CNRI-Python", "Zlib", "CC0-1.0", "Unlicense", "BSL-1.0"),
    *("Mozilla Public License 2.0", "MPL-2.0", "Academic Free License"),
)
"""A package under Apache-2.0 may depend on these. MPL-2.0 binds only those who change the files under it."""
INCOMPATIBLE = ("GPL", "GNU", "Proprietary", "Commons Clause", "SSPL", "UNKNOWN", "Non-Commercial", "NonCommercial")


class IncompatibleLicence(Exception):
    """The licence of a dependency is incompatible or missing."""


def is_compatible(licence: str) -> bool:
    """Return True if each part is one of COMPATIBLE, in whole words, and none contains one of INCOMPATIBLE.

    Args:
        licence: as pip-licenses prints it: an SPDX expression, of whose `OR` one side is enough; names with `;`;
            or a whole text, whose first line has the name.
    """
    if re.search("|".join(INCOMPATIBLE), licence, re.IGNORECASE):
        return False
    known = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, COMPATIBLE))})(?!\w)")
    return all(known.search(part) for part in re.split(r"\bAND\b|;", licence.partition("\n")[0]))


def list_licences(python: Path, out: Path) -> None:
    """Write a Markdown table of name, version and licence of each package.

    Raises:
        IncompatibleLicence: some of them are not compatible. The message lists all.
    """
    run("piplicenses", "--python", python, "--format", "markdown", "--output-file", out)
    command = [sys.executable, "-m", "piplicenses", "--python", str(python), "--format", "json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    wrong = {one["Name"]: one["License"] for one in listed if not is_compatible(one["License"])}
    if wrong:
        raise IncompatibleLicence(f"not compatible with Apache-2.0, or without a licence: {wrong}.")


def write_bill_of_materials(python: Path, out: Path, *options: str) -> None:
    """Write CycloneDX JSON, the same for the same environment.

    Args:
        options: of cyclonedx-py. Without `--no-validate` it validates the file against the schema, which takes a while.
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
