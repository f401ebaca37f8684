"""The script that compares two versions bit for bit finds what differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from recording import differences

ROOT = Path(__file__).resolve().parent.parent
CASE = "numpy | 2 ranks | layer | float32 | NC | residual, ReLU"


def run(command, file):
    script = [sys.executable, str(ROOT / "tests" / "recording.py"), command, str(file)]
    options = ["--backends=numpy", "--ranks=2", f"--only={CASE}"]
    env = os.environ | {"PYTHONPATH": ""}
    return subprocess.run([*script, *options], cwd=ROOT, env=env, capture_output=True, text=True)


def test_a_version_is_compared_with_itself_and_another(tmp_path):
    file = tmp_path / "recorded.json"
    recorded = run("record", file)
    assert recorded.returncode == 0, recorded.stderr
    assert str(ROOT / "cupybn") in recorded.stderr
    same = run("compare", file)
    assert (same.returncode, same.stdout) == (0, "0 differences\n"), same.stderr
    content = json.loads(file.read_text())
    items = content["digests"][CASE]
    kinds = {name.partition(" step 3 ")[2].partition(" ")[0] for name in items} - {""}
    assert kinds == {"y", "dx", "dresidual", "parameter", "gradient", "buffer", "messages"}
    items["rank 1, step 2 dx"] = "another"
    file.write_text(json.dumps(content))
    other = run("compare", file)
    assert other.returncode == 1
    line, *rest = other.stdout.splitlines()
    assert line.startswith(f"{CASE}, rank 1, step 2 dx: another before, float32 [8, 6] by [24, 4]")
    assert rest == ["1 in numpy | 2 ranks | layer", "1 differences"]


def test_what_is_on_one_side_only():
    before = {"a | 1 | x": {"y": "1", "dx": "2"}, "gone | 1 | x": {"y": "1"}}
    now = {"a | 1 | x": {"y": "1", "dw": "3"}, "new | 1 | x": {"y": "1"}}
    assert differences(before, now) == [
        "a | 1 | x, dx: 2 before, nothing now",
        "a | 1 | x, dw: nothing before, 3 now",
        "gone | 1 | x: is missing now",
        "new | 1 | x: not recorded before",
    ]
