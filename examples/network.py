"""The other parts of a small network: convolution, linear, ReLU, a loss and SGD.

Layers of your own, or of another framework, fit between cupybn's in the same way: register the
parameters, return a context from ``compute_forward``, add to ``self.grads`` in
``compute_backward``. They compute in the namespace of their input arrays, so they take CuPy arrays
as well as NumPy's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import prod, sqrt
from typing import Any

import numpy as np

from cupybn import Layer

Array = Any


def array_namespace(x: Array) -> Any:
    """The module that x comes from, ``numpy`` or ``cupy``."""
    return sys.modules[type(x).__module__.partition(".")[0]]


class Conv2d(Layer):
    """Cross-correlation with a square kernel: (N, C, H, W) to (N, C_out, H_out, W_out).

    ``H_out = (H + 2 * padding - kernel) // stride + 1``, W_out likewise.
    Parameters: weight (C_out, C, kernel, kernel), and bias (C_out,) unless ``bias=False``.
    """

    def __init__(
        self,
        channels: int,
        channels_out: int,
        kernel: int = 3,
        *,
        rng: np.random.Generator,
        stride: int = 1,
        padding: int = 1,
        bias: bool = True,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride
        self.padding = padding
        shape = (channels_out, channels, kernel, kernel)
        self.register_parameter("weight", initial_weight(rng, shape, dtype))
        self.register_parameter("bias", np.zeros(channels_out, dtype) if bias else None)

    def _windows(self, height: int, width: int) -> Iterator[tuple[Any, slice, slice]]:
        """For each place in the kernel, the (H_out, W_out) padded pixels that it meets."""
        for i in range(self.kernel):
            for j in range(self.kernel):
                rows = slice(i, height - self.kernel + i + 1, self.stride)
                columns = slice(j, width - self.kernel + j + 1, self.stride)
                yield ..., rows, columns

    def compute_forward(self, x: Array) -> tuple[Array, Any]:
        xp = array_namespace(x)
        pad = (self.padding, self.padding)
        padded = xp.pad(x, ((0, 0), (0, 0), pad, pad))
        windows = self._windows(*padded.shape[2:])
        patches = xp.stack([padded[window] for window in windows], axis=2)
        n, channels, places, height, width = patches.shape
        columns = patches.reshape(n, channels * places, height * width)
        weight = self.weight.reshape(-1, channels * places)
        y = (weight @ columns).reshape(n, len(weight), height, width)
        if self.bias is not None:
            y += self.bias[:, None, None]
        return y, (columns, patches.shape, padded.shape)

    def compute_backward(self, dy: Array, context: Any) -> Array:
        columns, patches_shape, padded_shape = context
        xp = array_namespace(dy)
        n, channels_out = dy.shape[:2]
        if self.bias is not None:
            self.grads["bias"] += dy.sum(axis=(0, 2, 3))
        dy = dy.reshape(n, channels_out, prod(dy.shape[2:]))
        dweight = (dy @ columns.swapaxes(1, 2)).sum(axis=0)
        self.grads["weight"] += dweight.reshape(self.weight.shape)
        dcolumns = self.weight.reshape(channels_out, columns.shape[1]).T @ dy
        dpatches = dcolumns.reshape(patches_shape)
        dpadded = xp.zeros(padded_shape, dy.dtype)
        height, width = padded_shape[2:]
        for place, window in enumerate(self._windows(height, width)):
            dpadded[window] += dpatches[:, :, place]
        edge = self.padding
        return dpadded[:, :, edge : height - edge, edge : width - edge]


class Linear(Layer):
    """``y = x @ weight.T + bias``: (N, features) to (N, features_out).

    Parameters: weight (features_out, features), bias (features_out,).
    """

    def __init__(
        self,
        features: int,
        features_out: int,
        *,
        rng: np.random.Generator,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__()
        self.register_parameter("weight", initial_weight(rng, (features_out, features), dtype))
        self.register_parameter("bias", np.zeros(features_out, dtype))

    def compute_forward(self, x: Array) -> tuple[Array, Any]:
        return x @ self.weight.T + self.bias, x

    def compute_backward(self, dy: Array, context: Any) -> Array:
        self.grads["weight"] += dy.T @ context
        self.grads["bias"] += dy.sum(axis=0)
        return dy @ self.weight


class ReLU(Layer):
    """``max(x, 0)``, any shape. (A batch norm with ``activation="relu"`` does it in one go.)"""

    def compute_forward(self, x: Array) -> tuple[Array, Any]:
        positive = x > 0
        return x * positive, positive

    def compute_backward(self, dy: Array, context: Any) -> Array:
        return dy * context


class Flatten(Layer):
    """(N, ...) to (N, the product of the rest)."""

    def compute_forward(self, x: Array) -> tuple[Array, Any]:
        return x.reshape(len(x), prod(x.shape[1:])), x.shape

    def compute_backward(self, dy: Array, context: Any) -> Array:
        return dy.reshape(context)


def initial_weight(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    """Normal values with variance 2 / fan-in (He et al., 2015); outputs are the first axis."""
    return (rng.standard_normal(shape) * sqrt(2 / prod(shape[1:]))).astype(dtype)


def softmax_cross_entropy(logits: Array, labels: Array, count: int) -> tuple[Array, Array]:
    """The loss, summed over this rank's samples and divided by `count`, and its gradient.

    Args:
        logits: (N, classes); N may be 0.
        labels: (N,) integers.
        count: samples on all ranks together, so that the ranks' losses and gradients add up.

    Returns:
        (loss, dlogits): a scalar, and an array like logits.
    """
    xp = array_namespace(logits)
    rows = xp.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probability = shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))
    dlogits = xp.exp(log_probability)
    dlogits[rows, labels] -= 1
    return -log_probability[rows, labels].sum() / count, dlogits / count


class SGD:
    """Gradient descent with momentum: ``velocity = momentum * velocity + gradient``.

    Attributes:
        velocities: dict from the path of a parameter to its velocity.
    """

    def __init__(self, layer: Layer, rate: float, momentum: float = 0.9) -> None:
        self.layer = layer
        self.rate = rate
        self.momentum = momentum
        self.velocities = {
            path: array_namespace(parameter).zeros_like(parameter)
            for path, parameter in layer.named_parameters()
        }

    def step(self) -> None:
        """Changes the parameters in place; leaves the gradients as they are."""
        parameters = dict(self.layer.named_parameters())
        for path, gradient in self.layer.named_gradients():
            velocity = self.velocities[path]
            velocity *= self.momentum
            velocity += gradient
            parameters[path] -= self.rate * velocity
