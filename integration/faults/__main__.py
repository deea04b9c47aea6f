"""Kill, fill the disk and cut the power at every point where a command changes files.

python -m integration.faults                          all commands, all points; minutes
python -m integration.faults --command add --few      one command; of repeated calls only the first and the last
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from integration.faults.commands import Workshop
from integration.faults.trials import KINDS, Trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--command", action="append", help="a command that changes files; may be repeated")
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--few", action="store_true", help="only the first and the last of repeated calls")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures, failures = [], []
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder).resolve())
        for name in arguments.command or workshop.commands:
            trials = Trials(workshop, workshop.commands[name], few=arguments.few)
            for kind in arguments.kind or KINDS:
                start = time.monotonic()
                found = KINDS[kind](trials)
                row = {"command": name, "kind": kind, **found.figures, "seconds": round(time.monotonic() - start, 1)}
                print(json.dumps(row), flush=True)
                for failure in found.failures:
                    print(f"  {failure}", flush=True)
                figures.append(row)
                failures += found.failures
    print(f"{sum(row['points'] for row in figures)} points, {len(failures)} failures")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
