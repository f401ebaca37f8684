"""Layers over ranks: every check of rank_checks.py, over threads and over real MPI."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_checks import CHECKS

from cupybn.testing import run_ranks

MPI = Path(__file__).parent / "mpi"


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("name", list(CHECKS))
def test_over_threads(name, n):
    results = run_ranks(n, CHECKS[name], timeout=60)
    assert len(set(results)) == 1


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_over_mpi(mpirun, n):
    printed = mpirun(n, MPI / "run_checks.py", timeout=240).stdout
    assert [line.split()[0] for line in printed.splitlines()] == list(CHECKS)


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_two_runs_have_the_same_bits(mpirun, n):
    runs = {mpirun(n, MPI / "run_checks.py", "check_same_bits").stdout for _ in range(2)}
    assert len(runs) == 1
    assert len(runs.pop().split()[1]) == 64
