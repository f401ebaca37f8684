"""Trains a small Flax network on scikit-learn's digits, with a share of each batch on every rank.

    mpiexec -n 2 python -m mpi4py examples/flax_digits.py

``SyncBatchNorm`` below is ``flax.nnx.BatchNorm`` with the statistics of all ranks: the same
arguments, the same names in the state. The ranks' states are compared with the one of a single
process that trains the same network, with Flax's own batch norm, on the whole batches; and with
ranks that do not synchronise.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # Before NumPy and JAX are imported: several ranks share this machine's CPU.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_ENABLE_X64", "1")

import argparse
from typing import Any

import numpy as np

try:
    import jax
    import jax.numpy as jnp
    from flax import nnx
except ImportError as error:
    raise SystemExit("JAX or Flax is missing: pip install jax flax") from error
from mpi4py import MPI

from cupybn.communicators import Communicator, MpiCommunicator, SelfCommunicator
from cupybn.interop.jax import batch_norm, ordered_value_and_grad

RATE, BATCH = 0.05, 32
WORLD = MPI.COMM_WORLD


class SyncBatchNorm(nnx.BatchNorm):
    """``nnx.BatchNorm`` over the ranks of `comm`; `name` is the layer's, equal on all ranks.

    A mask has x's shape without its channels, and y is 0 where x is masked.
    """

    def __init__(self, num_features: int, *, comm: Communicator, name: str, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.comm, self.name = comm, name

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: Any = None
    ) -> jax.Array:
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average:
            return super().__call__(x, True)
        weight, bias = (p if p is None else p[...] for p in (self.scale, self.bias))
        y, statistics = batch_norm(
            x, weight, bias, comm=self.comm, name=self.name,
            eps=self.epsilon, channel_axis=self.axis, mask=mask,
        )  # fmt: skip
        # As Flax does, with the biased variance.
        for running, new in ((self.mean, statistics.mean), (self.var, statistics.var)):
            running[...] = self.momentum * running[...] + (1 - self.momentum) * new
        return y


class Network(nnx.Module):
    """(N, 8, 8, 1) images to (N, 10) logits; two branches side by side."""

    def __init__(self, comm: Communicator | None, rngs: nnx.Rngs) -> None:
        def norm(name: str) -> nnx.BatchNorm:
            options = {"momentum": 0.9, "param_dtype": float, "rngs": rngs}
            if comm is None:
                layer = nnx.BatchNorm(16, **options)
            else:
                layer = SyncBatchNorm(16, comm=comm, name=name, **options)
            # Flax makes them in float32 whatever the parameters are.
            layer.mean, layer.var = nnx.BatchStat(jnp.zeros(16)), nnx.BatchStat(jnp.ones(16))
            return layer

        conv = {"strides": 2, "use_bias": False, "param_dtype": float, "rngs": rngs}
        self.wide = nnx.Conv(1, 16, (5, 5), **conv)
        self.narrow = nnx.Conv(1, 16, (3, 3), **conv)
        self.wide_norm, self.narrow_norm = norm("wide"), norm("narrow")
        self.last = nnx.Linear(16 * 16, 10, param_dtype=float, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.wide_norm(self.wide(x)) + self.narrow_norm(self.narrow(x))
        return self.last(jax.nn.relu(y).reshape(len(x), -1))


def load_data() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return (images[order] / 8 - 1).reshape(-1, 8, 8, 1), labels[order]


def train(comm: Communicator, sync: Communicator | None, steps: int) -> Any:
    """The state after some steps; each takes a share of a batch on every rank of `comm`."""
    images, labels = load_data()
    graph, params, rest = nnx.split(Network(sync, nnx.Rngs(0)), nnx.Param, ...)

    def loss(params: Any, rest: Any, x: jax.Array, y: jax.Array) -> Any:
        network = nnx.merge(graph, params, rest, copy=True)
        entropy = -jax.nn.log_softmax(network(x))[jnp.arange(len(x)), y]
        return entropy.sum() / BATCH, nnx.state(network, nnx.BatchStat)

    # Messages of all ranks in one order, forward and backward: nothing else is different.
    step = jax.jit(ordered_value_and_grad(loss, has_aux=True))
    for number in range(steps):
        batch = np.arange(number * BATCH, (number + 1) * BATCH) % len(images)
        mine = np.array_split(batch, comm.size)[comm.rank]
        (_, rest), grads = step(params, rest, images[mine], labels[mine])
        # The gradients of weights are each rank's own: added up over the ranks here.
        leaves, tree = jax.tree.flatten(grads)
        message = np.concatenate([np.ravel(leaf) for leaf in leaves])
        total = np.split(comm.allreduce(message), np.cumsum([leaf.size for leaf in leaves])[:-1])
        pooled = [part.reshape(leaf.shape) for part, leaf in zip(total, leaves, strict=True)]
        grads = jax.tree.unflatten(tree, pooled)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
    return nnx.to_pure_dict(nnx.merge_state(params, rest))


def largest_difference(state: Any, expected: Any) -> float:
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
    return max(float(abs(a - b).max()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Flax over MPI ranks with synchronised batch norm")
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    comm = MpiCommunicator(WORLD)
    together = train(comm, comm, steps)
    apart = train(comm, None, steps)
    if comm.rank == 0:
        alone = train(SelfCommunicator(), None, steps)
        print(f"{steps} steps of {BATCH} images; the state's largest difference to one process:")
        print(f"  {comm.size} ranks, synchronised      {largest_difference(together, alone):.1e}")
        print(f"  {comm.size} ranks, not synchronised  {largest_difference(apart, alone):.1e}")


if __name__ == "__main__":
    main()
