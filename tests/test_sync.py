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
@pytest.mark.parametrize("n", [1, 3, 4])  # two ranks of MPI are in many other tests
def test_over_mpi(mpirun, n):
    """And two runs have the same bits."""
    printed = mpirun(n, MPI / "run_checks.py", timeout=240).stdout.splitlines()
    assert [line.split()[0] for line in printed] == list(CHECKS)
    (again,) = mpirun(n, MPI / "run_checks.py", "check_same_bits").stdout.splitlines()
    assert again in printed
    assert len(again.split()[1]) == 64
