"""`make test-fast` stays light: its tests are collected where torch and its like cannot be imported."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_fast_tests_are_collected_without_torch():
    command = [sys.executable, "-m", "pytest", "--fast", "tests", "--collect-only", "-p", "no:xdist"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = re.search(r"^(\d+)/\d+ tests collected", done.stdout, re.MULTILINE)
    assert found
    assert int(found[1]) > 800
