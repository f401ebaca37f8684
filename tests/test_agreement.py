"""Between the ranks of a new communicator, over real MPI: protocols, timeouts; who may send."""

from __future__ import annotations

from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "mpi"
pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("case", ["another protocol", "frozen", "timeouts"])
def test_agreement(mpirun, n, case):
    mpirun(n, PROGRAMS / "agreement.py", case)


@pytest.mark.parametrize("case", ["forked", "threads", "subprocess alone", "pickled"])
def test_misuse(mpirun, case):
    mpirun(2, PROGRAMS / "misuse.py", case, env={"CUPYBN_TIMEOUT": "30"})


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("case", ["not initialised", "finalised"])
def test_mpi_that_is_not_running(mpirun, n, case):
    mpirun(n, PROGRAMS / "misuse.py", case, aborting=case != "not initialised")


def test_threads_that_meet_at_random_never_end_the_process(mpirun):
    process = mpirun(2, PROGRAMS / "misuse.py", "threads at random", check=False)
    assert process.stdout.count("is there") == 2
