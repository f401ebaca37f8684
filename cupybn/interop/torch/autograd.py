"""Batch norm as a function of PyTorch tensors that can be differentiated twice.

The context of a forward keeps x, weight and bias where autograd wants them, among its saved
tensors, so that checkpointing, hooks on saved tensors and the check for changes in place work; and
the statistics beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ...arrays import Array, as_array, cupy_for
from ...double_backward import double_backward_call, double_backward_pass
from ...errors import DTypeError
from ...layout import layout_of
from ...passes import Saved, backward_pass, joint_pass

Tensor = Any
Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Saved]]


def array_of(tensor: Tensor, what: str = "input") -> Array:
    """The tensor's memory as a NumPy or CuPy array."""
    if not isinstance(tensor, torch.Tensor):
        raise DTypeError(f"{what} must be a torch.Tensor, got {type(tensor).__name__}")
    return as_array(tensor.detach(), what)


def tensor_of(array: Array | None) -> Tensor:
    """A tensor over the memory of a new array; None for None."""
    if array is None:
        return None
    if array.dtype.name == "bfloat16":
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def wide_dtype(x: Tensor) -> Any:
    """The dtype of the arithmetic, and of what is per channel, for data like x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def like(x: Tensor, array: Array) -> Tensor:
    """A new tensor of x's shape and memory order; rows where x is in no order. `array` is x's."""
    layout = layout_of(array, 1)
    if layout.columns and x.ndim > 2:
        n, c, *spatial = x.shape
        return torch.empty((n, *spatial, c), dtype=x.dtype, device=x.device).movedim(-1, 1)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@contextmanager
def on_stream_of(tensor: Tensor) -> Iterator[None]:
    """CuPy works on the tensor's device and on PyTorch's current stream there."""
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cuda":
        yield
        return
    device = tensor.device
    cupy = cupy_for("the tensor")
    stream = torch.cuda.current_stream(device).cuda_stream
    with (
        torch.cuda.device(device),  # without which PyTorch does not hand the tensor over
        cupy.cuda.Device(device.index),
        cupy.cuda.ExternalStream(stream, device.index),
    ):
        yield


class Normalise(torch.autograd.Function):
    """``y = Normalise.apply(x, weight, bias, run)`` with ``run(x, weight, bias) -> (y, saved)``.

    `saved` comes without arrays like x or the parameters.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, run: Run) -> Tensor:
        y, saved = run(x, weight, bias)
        ctx.save_for_backward(x, weight, bias)
        ctx.statistics = saved
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.statistics
        # Unpacking raises where a tensor was changed in place, or was given up by an earlier
        # backward, and runs a checkpoint's recomputation.
        with joint_pass(saved.comm, "backward", saved.name, saved.layout.channels) as call:
            tensors = ctx.saved_tensors
            return (*Gradients.apply(dy, *tensors, saved, call), None)


class Gradients(torch.autograd.Function):
    """(dx, dweight, dbias) of :class:`Normalise`, inside the joint call of its backward."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, saved: Saved, call: Any
    ) -> tuple[Tensor, ...]:
        with on_stream_of(x):
            saved = _complete(saved, x, weight, bias)
            dx = like(x, array_of(x))
            sums = [
                None if p is None else torch.zeros_like(p, dtype=wide_dtype(x))
                for p in (weight, bias)
            ]
            dweight, dbias = (None if total is None else array_of(total) for total in sums)
            backward_pass(
                call, array_of(dy, "dy"), saved, out=array_of(dx), dweight=dweight, dbias=dbias
            )
        ctx.save_for_backward(dy, x, weight, bias)
        ctx.statistics = replace(saved, x3=None, weight=None, bias=None)
        return dx, *(_as(total, p) for total, p in zip(sums, (weight, bias), strict=True))

    @staticmethod
    def _backward(ctx: Any, ddx: Tensor, ddweight: Tensor, ddbias: Tensor) -> tuple[Tensor, ...]:
        with double_backward_call(ctx.statistics) as call:
            dy, x, weight, bias = ctx.saved_tensors
            with on_stream_of(x):
                saved = _complete(ctx.statistics, x, weight, bias)
                grads = double_backward_pass(
                    call,
                    array_of(ddx, "ddx"),
                    _per_channel(ddweight, weight, x, "ddweight"),
                    _per_channel(ddbias, bias, x, "ddbias"),
                    saved,
                    array_of(dy, "dy"),
                )
                ddy, dx, dweight = map(tensor_of, grads)
        return ddy, dx, _as(dweight, weight), None, None, None

    backward = staticmethod(once_differentiable(_backward))


def _complete(saved: Saved, x: Tensor, weight: Tensor, bias: Tensor) -> Saved:
    """The context with its arrays; a hook may have put x into another memory order since."""
    return replace(
        saved,
        x3=saved.layout.view(array_of(x)),
        weight=_per_channel(weight, weight, x, "weight"),
        bias=_per_channel(bias, bias, x, "bias"),
    )


def _per_channel(values: Tensor, parameter: Tensor, x: Tensor, what: str) -> Array | None:
    """Values of a parameter's shape in the dtype of the arithmetic; None without the parameter."""
    return None if parameter is None else array_of(values.to(wide_dtype(x)), what)


def _as(total: Tensor, parameter: Tensor) -> Tensor:
    return None if parameter is None else total.to(parameter.dtype)
