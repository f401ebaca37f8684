"""A layer with a parameter of its own, and one made of layers, over MPI ranks.

mpiexec -n 2 python -m mpi4py examples/own_layer.py
"""

import numpy as np

import cupybn
from cupybn.testing import check_gradients
from cupybn.typing import Array


class Scale(cupybn.Layer):
    factor: Array  # for type checkers: registered names are attributes

    def __init__(self):
        super().__init__()
        self.register_parameter("factor", np.ones((), np.float32))

    def compute_forward(self, x):
        return x * self.factor, x  # y, and what backward needs

    def compute_backward(self, dy, context):
        self.grads["factor"] += (dy * context).sum()  # gradients accumulate
        return dy * self.factor


class Block(cupybn.Layer):
    """A layer made of layers: relu(bn(factor * x) + x)."""

    def __init__(self, channels):
        super().__init__()
        self.scale = Scale()
        self.bn = cupybn.SyncBatchNorm(channels, activation="relu")

    def compute_forward(self, x, *, save_for_backward=True):
        h, of_scale = self.scale.run_forward(x, save_for_backward)
        y, of_bn = self.bn.run_forward(h, save_for_backward, residual=x)
        return y, (of_scale, of_bn)

    def compute_backward(self, dy, context):
        of_scale, of_bn = context
        dh, dx = self.bn.compute_backward(dy, of_bn)
        return dx + self.scale.compute_backward(dh, of_scale)


rng = np.random.default_rng(0)
x = rng.standard_normal((8, 64, 5, 5)).astype(np.float32)
block = Block(64)
y = block.forward(x)
dx = block.backward(y / y.size)
cupybn.distributed.allreduce_gradients(block)
print(f"{dx.shape} {[name for name, _ in block.named_parameters()]}")
check_gradients(Scale(), x[:2, :2, :2, 0])
