"""Batch norm as a function of PyTorch tensors that can be differentiated twice.

The context of a forward keeps x, weight and bias where autograd wants them, among its saved
tensors, so that checkpointing, hooks on saved tensors and the check for changes in place work; and
the statistics beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...arrays import DATA_TYPES, Array, array_of_tensor, cupy_for
from ...collective import CollectiveCall
from ...double_backward import double_backward, double_backward_call
from ...errors import DTypeError
from ...forward_backward import Bound, Saved

Tensor = Any

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Tensors of these types are arrays in memory, and not something that stands for one."""
HOST = nullcontext()
WIDE = {getattr(torch, name): getattr(torch, kind.arithmetic) for name, kind in DATA_TYPES.items()}
"""The dtype of the arithmetic, and of what is per channel, for data of a dtype."""


def array_of(tensor: Tensor, what: str = "input") -> Array:
    """The tensor's memory as a NumPy or CuPy array."""
    if not isinstance(tensor, torch.Tensor):
        raise DTypeError(f"{what} must be a torch.Tensor, got {type(tensor).__name__}")
    return array_of_tensor(tensor, what)


def arrays_of(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Array]:
    """The memory of tensors as arrays; None for None, and a tensor of another dtype converted."""
    arrays = []
    for tensor in tensors:
        if tensor is not None and tensor.dtype is not dtype:  # a call of tensor.to takes long
            tensor = tensor.to(dtype)
        arrays.append(None if tensor is None else array_of_tensor(tensor, "a tensor per channel"))
    return arrays


def new_array_like(bound: Bound, x: Tensor) -> tuple[Tensor, Array]:
    """A new tensor for a y or dx of an x, and its memory as (N, C, L)."""
    layout = bound.layout
    tensor = torch.empty_strided(layout.shape, layout.strides, dtype=x.dtype, device=x.device)
    array = array_of_tensor(tensor)
    return tensor, array.reshape(layout.shape3) if bound.in_order else layout.view(array)


def on_stream_of(tensor: Tensor) -> Any:
    """A context in which CuPy works on the tensor's device and PyTorch's current stream there."""
    return _on_stream(tensor) if getattr(tensor, "is_cuda", False) else HOST


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
        bound, wide = saved.bound, WIDE[x.dtype]
        dweight = None if weight is None else torch.zeros_like(weight, dtype=wide)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        with on_stream_of(x) if x.is_cuda else HOST:
            dx, dx3 = new_array_like(bound, x)
            of_weight, of_bias = arrays_of((dweight, dbias), wide)
            bound.backward(
                call,
                array_of_tensor(dy, "dy"),
                _complete(saved, x, [weight]),  # only the ReLU asks for a bias
                dx3=dx3,
                dweight=of_weight,
                dbias=of_bias,
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
            with on_stream_of(x) if x.is_cuda else HOST:
                saved = _complete(ctx.statistics, x, [weight, bias])
                of_weight, of_bias = arrays_of((ddweight, ddbias), WIDE[x.dtype])
                ddx, dy = array_of_tensor(ddx, "ddx"), array_of_tensor(dy, "dy")
                grads = double_backward(call, ddx, of_weight, of_bias, saved, dy)
                (ddy, ddy3), (dx, dx3) = (new_array_like(saved.bound, x) for _ in "yx")
                dweight = None if weight is None else torch.empty_like(weight, dtype=WIDE[x.dtype])
                for target, values in zip((ddy3, dx3), grads[:2], strict=True):
                    target[...] = saved.layout.view(values)
                if dweight is not None:
                    array_of_tensor(dweight)[...] = grads.dweight
                    dweight = dweight.to(weight.dtype)
        return ddy, dx, dweight, None, None, None


def _complete(saved: Saved, x: Tensor, parameters: list[Tensor]) -> Saved:
    """The context with its arrays; a hook may have put x into another memory order since."""
    layout, array = saved.bound.layout, array_of_tensor(x)
    in_order = saved.bound.in_order and array.flags.c_contiguous
    weight, *bias = arrays_of(parameters, WIDE[x.dtype])
    x3 = array.reshape(layout.shape3) if in_order else layout.view(array)
    return saved._replace(x3=x3, weight=weight, bias=bias[0] if bias else None)
