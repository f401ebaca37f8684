"""Flax in one process, to compare with ``flax_after.py``: ``python examples/flax_before.py``."""

import jax
from flax import nnx


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.norm(self.first(x))))


graph, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)
x = jax.random.normal(jax.random.key(1), (32, 6))
target = jax.numpy.tanh(x[:, :1])
count = len(x)


def loss(params, rest):
    network = nnx.merge(graph, params, rest, copy=True)
    error = network(x) - target
    return (error**2).sum() / count, nnx.state(network, nnx.BatchStat)


step = jax.jit(jax.value_and_grad(loss, has_aux=True))
for _ in range(20):
    (value, rest), gradients = step(params, rest)
    params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradients)

print(f"loss {value:.6f}")
