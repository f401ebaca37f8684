"""Messages over MPI with their times; the last rank is slow."""

import time

import numpy as np
from mpi4py import MPI

from cupybn import SyncBatchNorm, distributed
from cupybn.communicators import Timed

timed = Timed()
assert timed.comm.mpi_comm == MPI.COMM_WORLD
assert timed.size == MPI.COMM_WORLD.size
layer = SyncBatchNorm(3, comm=timed, name="bn")
for _ in range(3):
    if timed.rank == timed.size - 1:
        time.sleep(0.2)
    layer.backward(layer.forward(np.full((4, 3), timed.rank, np.float32)))
distributed.verify_sync(layer)  # not over this communicator
distributed.allreduce_gradients(layer, timed)
timed.report()
