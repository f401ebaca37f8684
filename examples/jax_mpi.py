"""A JAX step over MPI ranks.

mpiexec -n 2 python -m mpi4py examples/jax_mpi.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from mpi4py import MPI

from cupybn.interop.jax import batch_norm, ordered_value_and_grad, updated_running

comm = MPI.COMM_WORLD
rng = np.random.default_rng(comm.rank)
x = rng.standard_normal((8 + comm.rank, 6)).astype(np.float32)  # batches need not be equal
params = {"matrix": jnp.full((6, 4), 0.1), "weight": jnp.ones(4), "bias": jnp.zeros(4)}
running = jnp.zeros(4), jnp.ones(4)


def loss(params, running, x):
    y, statistics = batch_norm(
        x @ params["matrix"], params["weight"], params["bias"], comm=comm, name="bn"
    )
    running = updated_running(*running, statistics, momentum=0.1)
    return (jax.nn.relu(y) ** 2).sum(), running


step = jax.jit(ordered_value_and_grad(loss, has_aux=True))
(value, running), grads = step(params, running, x)
assert grads["matrix"].shape == (6, 4)
