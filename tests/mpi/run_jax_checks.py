"""Runs the named checks of jax_checks.py over MPI.COMM_WORLD; rank 0 prints their names."""

import sys

from jax_checks import CHECKS
from mpi4py import MPI

from cupybn.communicators import MpiCommunicator

comm = MpiCommunicator(MPI.COMM_WORLD)
for name, check in CHECKS.items():
    if len(sys.argv) < 2 or name in sys.argv[1:]:
        results = MPI.COMM_WORLD.allgather(check(comm))
        assert all(result == results[0] for result in results), (name, results)
        if comm.rank == 0:
            print(name, flush=True)
