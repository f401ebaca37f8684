"""``flax_before.py`` over MPI ranks: ``mpiexec -n 2 python -m mpi4py examples/flax_after.py``."""

import jax
import numpy as np
from flax import nnx
from flax_digits import SyncBatchNorm  # twenty lines, to be copied
from mpi4py import MPI

from cupybn.communicators import MpiCommunicator
from cupybn.interop.jax import ordered_value_and_grad

comm = MPI.COMM_WORLD


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(6, 16, rngs=rngs)
        self.norm = SyncBatchNorm(
            16, momentum=0.9, rngs=rngs, comm=MpiCommunicator(comm), name="norm"
        )
        self.last = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.norm(self.first(x))))


graph, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)
x = jax.random.normal(jax.random.key(1), (32, 6))
target = jax.numpy.tanh(x[:, :1])
count = len(x)  # of all ranks
x, target = (jax.numpy.array_split(whole, comm.size)[comm.rank] for whole in (x, target))


def loss(params, rest):
    network = nnx.merge(graph, params, rest, copy=True)
    error = network(x) - target
    return (error**2).sum() / count, nnx.state(network, nnx.BatchStat)


def summed(array):
    """Over the ranks."""
    return comm.allreduce(np.asarray(array))


step = jax.jit(ordered_value_and_grad(loss, has_aux=True))
for _ in range(20):
    (value, rest), gradients = step(params, rest)
    value, gradients = summed(value), jax.tree.map(summed, gradients)
    params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradients)

if comm.rank == 0:
    print(f"loss {value:.6f}")
