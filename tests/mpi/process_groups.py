"""What ends a message over a process group: each rank prints a line for what it got.

    mpiexec -n 2 python process_groups.py CASE PATH

PATH is a file that is not there yet. The last rank is gone, late, or of another version; or sends a
message of another length.
"""

import os
import sys
import time
from datetime import timedelta

import numpy as np
import torch
from mpi4py import MPI
from torch import distributed

from cupybn.interop.torch import ProcessGroupCommunicator, SyncBatchNorm, groups

case, path = sys.argv[1:]
rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
distributed.init_process_group(
    "gloo", init_method=f"file://{path}", rank=rank, world_size=size, timeout=timedelta(seconds=3)
)
comm = ProcessGroupCommunicator()
module = SyncBatchNorm(3, comm=comm, name="features.bn")
x = torch.full((4, 3), float(rank))
culprit = rank == size - 1
if case == "version" and culprit:
    groups.PROTOCOL += 1
if case != "version":
    module(x)
before = module.running_mean.tolist()
if culprit and case == "gone":
    distributed.destroy_process_group()
    MPI.COMM_WORLD.Barrier()
    os._exit(0)
if culprit and case == "late":
    time.sleep(4)
if culprit and case == "length":
    comm.allreduce(np.zeros(1000))
try:
    module(x)
except Exception as error:
    text = " ".join(str(error).split())
    print(f"rank {rank}: {type(error).__name__}: {text}\n", end="", flush=True)
assert module.running_mean.tolist() == before
assert module.num_batches_tracked == (0 if case == "version" else 1)
MPI.COMM_WORLD.Barrier()
os._exit(0)
