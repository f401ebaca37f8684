"""The functions over MPI ranks: parameters and statistics are the caller's own.

mpiexec -n 2 python -m mpi4py examples/functions_mpi.py
"""

import numpy as np
from mpi4py import MPI

from cupybn import functional

comm = MPI.COMM_WORLD
rng = np.random.default_rng(comm.rank)
x = rng.standard_normal((8 + comm.rank, 3, 5, 5), np.float32)  # batches need not be equal
weight, bias = np.ones(3, np.float32), np.zeros(3, np.float32)
running_mean, running_var = np.zeros(3, np.float32), np.ones(3, np.float32)

y, saved = functional.batch_norm_forward(x, weight, bias, comm=comm, name="block1.bn")
functional.update_running(running_mean, running_var, saved, momentum=0.1)
grads = functional.batch_norm_backward(y / saved.count, saved)  # dx, dweight, dbias

# dweight and dbias are this rank's sums, for your own reduction of gradients:
comm.Allreduce(MPI.IN_PLACE, grads.dweight)
comm.Allreduce(MPI.IN_PLACE, grads.dbias)
weight -= 0.1 * grads.dweight
bias -= 0.1 * grads.dbias

evaluated = functional.batch_norm_inference(x, running_mean, running_var, weight, bias)
assert saved.count == 25 * sum(8 + rank for rank in range(comm.size))
