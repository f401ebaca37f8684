"""Runs every check of rank_checks.py over MPI.COMM_WORLD; rank 0 prints what it returned."""

import sys

from mpi4py import MPI
from rank_checks import CHECKS

from cupybn.communicators import MpiCommunicator

comm = MpiCommunicator(MPI.COMM_WORLD)
for name, check in CHECKS.items():
    if len(sys.argv) < 2 or name in sys.argv[1:]:
        result = check(comm)
        if comm.rank == 0:
            print(name, result, flush=True)
