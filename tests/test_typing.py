"""Mistakes that a type checker should find, and uses that it should not complain of."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "tests" / "typing_cases.py"


def mypy(*files):
    """The errors in these files by file and line, with the settings of this project: strict."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--no-pretty",
        "--hide-error-context",
        *map(str, files),
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode in (0, 1), process.stderr
    found = re.findall(r"^(.+?):(\d+): error: (.*?)\s+\[([\w-]+)\]$", process.stdout, re.MULTILINE)
    assert len(found) == process.stdout.count(" error: "), process.stdout
    names = {file.name for file in files}  # others are the package's, which `make types` checks
    errors = {(Path(file).name, int(line), code): text for file, line, text, code in found}
    return {key: text for key, text in errors.items() if key[0] in names}


@pytest.mark.timeout(600)  # without a cache of mypy's, on a busy machine
def test_right_and_wrong_uses(tmp_path):
    """And the README's programs, which are right."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    programs = [tmp_path / f"readme_{number}.py" for number in range(len(blocks))]
    for program, block in zip(programs, blocks, strict=True):
        program.write_text(block)
    found = mypy(CASES, *programs, ROOT / "examples" / "quickstart.py")
    expected = {
        (CASES.name, number, code)
        for number, line in enumerate(CASES.read_text().splitlines(), 1)
        for code in re.findall(r"# error: ([\w-]+)$", line)
    }
    assert len(expected) == 40
    assert {key: text for key, text in found.items() if key not in expected} == {}
    assert expected - found.keys() == set()
