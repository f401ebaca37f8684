"""What every rank sees when one of them does something wrong. Real MPI jobs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "mpi" / "failures.py"
pytestmark = pytest.mark.mpi

OWN_ERROR = {
    "three channels": ("ShapeError", "expected 4 channels on axis 1, got 3"),
    "a list": ("DTypeError", "got list"),
    "integers": ("DTypeError", "unsupported dtype int64"),
    "None": ("DTypeError", "got NoneType"),
    "float64": ("DTypeError", "input is float64"),
    "one dimension": ("ShapeError", "expected at least 2D input (got 1D input)"),
    "dy": ("ShapeError", "dy has shape"),
    "backward without forward": ("RuntimeError", "backward without a saved forward"),
}
MISMATCH = {
    "swapped": ("forward of 'first'", "forward of 'second'"),
    "swapped, neighbouring C": ("forward of 'first': C=4", "forward of 'second': C=5"),
    "forward meets backward": ("backward of 'first'", "forward of 'first'"),
    "eps": ("eps=1e-05", "eps=0.001"),
    "momentum": ("momentum=0.1", "momentum=0.2"),
    "another dtype": ("float32", "float64"),
    "gradients of another tree": ("4 arrays with 16 values", "2 arrays with 8 values"),
}


def run(mpirun, n, case, **options):
    began = time.monotonic()
    process = mpirun(n, PROGRAM, case, timeout=20, **options)
    lines = [line.split("|") for line in process.stdout.splitlines() if line.count("|") == 3]
    return sorted(lines), time.monotonic() - began


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("case", list(OWN_ERROR))
def test_the_rank_raises_its_own_error_and_the_others_peer_error(mpirun, n, case):
    lines, seconds = run(mpirun, n, case)
    first = [line for line in lines if line[1] != "went on"]
    name, message = OWN_ERROR[case]
    assert [line[1] for line in first] == ["PeerError"] * (n - 1) + [name]
    assert [line[2] for line in first] == ["unchanged"] * n
    assert message in first[-1][3]
    direction = "backward" if case in ("dy", "backward without forward") else "forward"
    assert all(f"{direction} of 'first': rank {n - 1} failed" in line[3] for line in first[:-1])
    if case in ("a list", "dy"):
        assert sum(line[1] == "went on" for line in lines) == n
    assert seconds < 10


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("case", list(MISMATCH))
def test_every_rank_raises_mismatch_and_says_what_each_did(mpirun, n, case):
    lines, seconds = run(mpirun, n, case)
    first = [line for line in lines if not line[1].startswith("closed")]
    assert [line[1] for line in first] == ["CollectiveMismatchError"] * n
    assert [line[2] for line in first] == ["unchanged"] * n
    ranks = "rank 0" if n == 2 else "ranks 0, 1, 2"
    theirs, culprits = MISMATCH[case]
    for line in first:
        rows = line[3].split("\\n")
        assert any(ranks in row and theirs in row for row in rows), rows
        assert any(f"rank {n - 1}: " in row and culprits in row for row in rows), rows
    if case == "swapped":
        closed = [line for line in lines if line[1] == "closed CollectiveMismatchError"]
        assert len(closed) == n
        assert all("this communicator is closed" in line[3] for line in closed)
    assert seconds < 10


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("case", ["user code raises", "exits", "sleeps"])
def test_the_watchdog_ends_the_job_and_says_where_it_waited(mpirun, n, case):
    began = time.monotonic()
    options = {"env": {"CUPYBN_TIMEOUT": "3"}, "check": False, "aborting": False}
    process = mpirun(n, PROGRAM, case, timeout=20, **options)
    seconds = time.monotonic() - began
    assert process.returncode != 0
    assert seconds < 15
    layer = "second" if case == "sleeps" else "first"
    assert f"rank 0 of {n}, forward of '{layer}', message " in process.stderr
    assert "waited 3." in process.stderr
    assert "failures.py" in process.stderr  # the Python stack


def test_the_watchdog_ends_the_job_even_if_it_cannot_say_why(mpirun):
    """Standard error is closed: writing to it raises in the watchdog's thread."""
    options = {"env": {"CUPYBN_TIMEOUT": "3"}, "check": False, "aborting": False}
    process = mpirun(2, PROGRAM, "sleeps, nobody listens", timeout=20, **options)
    assert process.returncode != 0


@pytest.mark.parametrize("case", ["user code raises", "killed"])
def test_the_launcher_ends_the_job(mpirun, case):
    """Under ``python -m mpi4py`` an exception ends the job at once; so does a killed rank."""
    began = time.monotonic()
    process = mpirun(4, PROGRAM, case, timeout=20, check=False)
    assert process.returncode != 0
    assert time.monotonic() - began < 10
    if case == "user code raises":
        assert "a bug in the user's own code" in process.stderr
