"""Runs every check of torch_checks.py over MPI.COMM_WORLD; rank 0 prints their names."""

import torch
from mpi4py import MPI
from torch_checks import CHECKS

from cupybn.communicators import MpiCommunicator

torch.set_num_threads(1)
comm = MpiCommunicator(MPI.COMM_WORLD)
for name, check in CHECKS.items():
    results = MPI.COMM_WORLD.allgather(check(comm))
    assert all(result == results[0] for result in results), name
    if comm.rank == 0:
        print(name, flush=True)
