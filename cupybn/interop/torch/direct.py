"""The usual step of one process on the CPU, by the shortest way.

The checks around a small batch take as long as its arithmetic. So if a signature is bound, its
loops are compiled, and all tensors are dense in memory as usual, this calls a backend's
``local_forward`` and ``local_backward`` on that memory at once. All else goes through
``passes.py``; both give the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.autograd.graph import increment_version

from ...arrays import Array, Bytes, memory_of
from ...backends import by_type
from ...forward_backward import Bound, Saved
from ...statistics import Transform
from .checkpoint import is_usual
from .tensors import PLAIN, WIDE, Tensor


class Dense:
    """Tensors of one shape and dtype that fill their memory, as arrays of another shape."""

    def __init__(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: torch.dtype,
        seen: tuple[tuple[int, ...], Any],
    ) -> None:
        self.shape, self.strides, self.dtype, self.seen = shape, strides, dtype, seen

    def view(self, tensor: Tensor) -> Array | None:
        """The tensor's memory, which the caller keeps alive; None for another kind of tensor."""
        if (
            type(tensor) in PLAIN
            and tensor.is_cpu
            and tensor.dtype is self.dtype
            and tensor.shape == self.shape
            and tensor.stride() == self.strides
            and not tensor.is_neg()
            and (address := tensor.data_ptr())
        ):
            shape, dtype = self.seen
            return np.ndarray(shape, dtype, Bytes.from_address(address))  # as memory_of
        return None

    def new(self) -> tuple[Tensor, Array]:
        """A new tensor, and its memory."""
        tensor = torch.empty_strided(self.shape, self.strides, dtype=self.dtype)
        return tensor, memory_of(tensor, *self.seen)


class Direct:
    """A bound call with all that a usual step needs besides its tensors."""

    def __init__(self, bound: Bound, x: Tensor) -> None:
        layout, (dtype, shape, _) = bound.layout, bound.expected
        self.bound, self.usual = bound, bound.on_host and bound.ranks == 1 and bound.updates
        self.usual &= bound.count > 1  # an empty batch and a single value are cases of their own
        self.data = Dense(bound.shape, layout.strides, x.dtype, (bound.shape3, bound.dtype))
        self.channels = Dense(shape, (1,), WIDE[x.dtype], (shape, dtype))
        self.counter = Dense((), (), torch.int64, ((), np.dtype(np.int64)))

    def forward(self, x: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Saved] | None:
        """As ``passes.run_forward``; None, with nothing done, if something is unusual."""
        bound, backend, view = self.bound, by_type[np.ndarray], self.channels.view
        if not (self.usual and bound.prepared.get("forward") is backend and is_usual()):
            return None
        w, b, running_mean, running_var, batches = tensors
        if (weight := view(w)) is None or (bias := view(b)) is None:
            return None
        if (mean := view(running_mean)) is None or (var := view(running_var)) is None:
            return None
        if (counter := self.counter.view(batches)) is None or (x3 := self.data.view(x)) is None:
            return None
        y, y3 = self.data.new()
        states = {"running": (mean, var), "batches": counter, "factor": bound.factor}
        mean_of_x, invstd = backend.local_forward(x3, y3, weight, bias, bound.eps, **states)
        increment_version(tensors[2:])
        return y, Saved(bound, None, None, None, mean_of_x, invstd, bound.count)

    def backward(
        self, saved: Saved, dy: Tensor, x: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """As ``passes.run_backward``; None, with nothing done, if something is unusual."""
        backend = by_type[np.ndarray]
        if self.bound.prepared.get("backward") is not backend:
            return None
        x3, dy3, of_weight = self.data.view(x), self.data.view(dy), self.channels.view(weight)
        if x3 is None or dy3 is None or of_weight is None:
            return None
        dx, dx3 = self.data.new()
        dweight, into_weight = self.channels.new()
        dbias, into_bias = self.channels.new()
        into_weight.fill(0)
        into_bias.fill(0)
        backend.local_backward(
            dy3,
            x3,
            dx3,
            Transform(saved.mean, saved.invstd, of_weight),
            count=saved.count,
            dweight=into_weight,
            dbias=into_bias,
        )
        return dx, dweight, dbias
