"""Runs every check of torch_checks.py over all ranks; rank 0 prints their names.

Over MPI.COMM_WORLD under mpiexec; over the default process group under torchrun, without mpi4py.
"""

import sys

import torch
from torch import distributed
from torch_checks import CHECKS

from cupybn.communicators import MpiCommunicator
from cupybn.interop.torch import ProcessGroupCommunicator, SyncBatchNorm

torch.set_num_threads(1)
if distributed.is_torchelastic_launched():
    sys.modules["mpi4py"] = None  # its import raises
    distributed.init_process_group("gloo")
    comm = ProcessGroupCommunicator()

    def gather(result):
        results = [None] * comm.size
        distributed.all_gather_object(results, result)
        return results

    module = SyncBatchNorm(2)
    assert "comm=default process group (cpu:gloo" in repr(module)
    module(torch.full((2, 2), float(comm.rank)))
    assert f"comm=ProcessGroupCommunicator(rank {comm.rank} of {comm.size}, " in repr(module)
    assert torch.allclose(module.running_mean, torch.tensor(0.1 * (comm.size - 1) / 2))
else:
    from mpi4py import MPI

    comm = MpiCommunicator(MPI.COMM_WORLD)
    gather = MPI.COMM_WORLD.allgather
for name, check in CHECKS.items():
    results = gather(check(comm))
    assert all(result == results[0] for result in results), name
    if comm.rank == 0:
        print(name, flush=True)
if distributed.is_initialized():
    distributed.destroy_process_group()
