"""Batch norm as a function of PyTorch tensors that can be differentiated twice.

The context of a forward keeps x, weight and bias where autograd wants them, among its saved
tensors, so that checkpointing, hooks on saved tensors and the check for changes in place work; and
the statistics beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ...arrays import DATA_TYPES, Array, as_array, cupy_for
from ...collective import CollectiveCall
from ...double_backward import double_backward, double_backward_call
from ...errors import DTypeError
from ...forward_backward import Saved

Tensor = Any

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Tensors of these types are arrays in memory, and not something that stands for one."""
_HOST = nullcontext()
WIDE = {getattr(torch, name): getattr(torch, kind.arithmetic) for name, kind in DATA_TYPES.items()}
"""The dtype of the arithmetic, and of what is per channel, for data of a dtype."""


def array_of(tensor: Tensor, what: str = "input", dtype: torch.dtype | None = None) -> Array:
    """The tensor's memory as a NumPy or CuPy array.

    With `dtype` what may be absent, None, is, and a tensor of another dtype is converted.
    """
    if dtype is not None:
        if tensor is None:
            return None
        if tensor.dtype is not dtype:  # a call of tensor.to takes long
            tensor = tensor.to(dtype)
    if type(tensor) in PLAIN and tensor.dtype is not torch.bfloat16 and not tensor.is_cuda:
        try:
            return tensor.detach().numpy()
        except (RuntimeError, TypeError):  # a pending negation, a wrapper of torch.func, ...
            pass
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


def on_stream_of(tensor: Tensor) -> Any:
    """A context in which CuPy works on the tensor's device and PyTorch's current stream there."""
    return _on_stream(tensor) if getattr(tensor, "is_cuda", False) else _HOST


@contextmanager
def _on_stream(tensor: Tensor) -> Iterator[None]:
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
    """``y = Normalise.apply(x, weight, bias, module, backward)``, by ``module.normalise``.

    Its context comes without arrays like x or the parameters: autograd keeps those.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, module: Any, backward: bool
    ) -> Tensor:
        y, saved = module.normalise(x, weight, bias, backward)
        ctx.save_for_backward(x, weight, bias)
        ctx.statistics = saved
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        bound = ctx.statistics.bound
        call = CollectiveCall(bound.comm, *bound.backward_call) if bound.ranks > 1 else None
        try:
            # Unpacking raises where a tensor was changed in place, or was given up by an earlier
            # backward, and runs a checkpoint's recomputation.
            return (*Gradients.apply(dy, *ctx.saved_tensors, ctx.statistics, call), None, None)
        except Exception as error:
            bound.leave(call, "backward", error)
            raise


class Gradients(torch.autograd.Function):
    """(dx, dweight, dbias) of :class:`Normalise`, inside the joint call of its backward."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, saved: Saved, call: Any
    ) -> tuple[Tensor, ...]:
        bound, layout, wide = saved.bound, saved.bound.layout, WIDE[x.dtype]
        with on_stream_of(x):
            dx = torch.empty_strided(layout.shape, layout.strides, dtype=x.dtype, device=x.device)
            dx3 = array_of(dx)
            dx3 = dx3.reshape(layout.shape3) if bound.in_order else layout.view(dx3)
            dweight = None if weight is None else torch.zeros_like(weight, dtype=wide)
            dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
            bound.backward(
                call,
                array_of(dy, "dy"),
                _complete(saved, x, weight, bias),
                dx3=dx3,
                dweight=array_of(dweight, dtype=wide),
                dbias=array_of(dbias, dtype=wide),
            )
        ctx.save_for_backward(dy, x, weight, bias)
        ctx.statistics = saved
        return (
            dx,
            dweight if dweight is None or weight.dtype is wide else dweight.to(weight.dtype),
            dbias if dbias is None or bias.dtype is wide else dbias.to(bias.dtype),
        )

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, ddx: Tensor, ddweight: Tensor, ddbias: Tensor) -> tuple[Tensor, ...]:
        with double_backward_call(ctx.statistics) as call:
            dy, x, weight, bias = ctx.saved_tensors
            wide = WIDE[x.dtype]
            with on_stream_of(x):
                saved = _complete(ctx.statistics, x, weight, bias)
                grads = double_backward(
                    call,
                    array_of(ddx, "ddx"),
                    array_of(ddweight, "ddweight", wide),
                    array_of(ddbias, "ddbias", wide),
                    saved,
                    array_of(dy, "dy"),
                )
                ddy, dx, dweight = map(tensor_of, grads)
        return ddy, dx, None if weight is None else dweight.to(weight.dtype), None, None, None


def _complete(saved: Saved, x: Tensor, weight: Tensor, bias: Tensor) -> Saved:
    """The context with its arrays; a hook may have put x into another memory order since."""
    layout, wide, array = saved.bound.layout, WIDE[x.dtype], array_of(x)
    in_order = saved.bound.in_order and array.flags.c_contiguous
    return saved._replace(
        x3=array.reshape(layout.shape3) if in_order else layout.view(array),
        weight=array_of(weight, "weight", wide),
        bias=array_of(bias, "bias", wide),
    )
