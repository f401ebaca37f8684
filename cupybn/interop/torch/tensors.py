"""PyTorch tensors as arrays of NumPy and CuPy, over the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ...arrays import DATA_TYPES, Array, array_of_tensor, cupy_for, memory_of
from ...errors import DeviceError, DTypeError, ShapeError
from ...forward_backward import Bound

Tensor = Any

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Tensors of these types are arrays in memory, and not something that stands for one."""
HOST = nullcontext()
# Private to PyTorch, which has no public names for these; looked up here, so that importing this
# module fails with a version that lacks them.
_modes, _is_tracing = torch._C._len_torch_dispatch_stack, torch._C._is_tracing
_transforms = torch._C._functorch.peek_interpreter_stack
WIDE = {getattr(torch, name): getattr(torch, kind.arithmetic) for name, kind in DATA_TYPES.items()}
"""The dtype of the arithmetic, and of what is per channel, for data of a dtype."""


def array_of(tensor: Tensor, what: str = "input") -> Array:
    """The tensor's memory as a NumPy or CuPy array."""
    if not isinstance(tensor, torch.Tensor):
        raise DTypeError(f"{what} must be a torch.Tensor, got {type(tensor).__name__}")
    return array_of_tensor(tensor, what)


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Raises unless the mask has a value for each position of x; reads no values."""
    if not isinstance(mask, torch.Tensor):
        raise DTypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, torch.uint8):
        raise DTypeError(
            f"mask is {mask.dtype}, expected torch.bool or torch.uint8, nonzero where x is valid"
        )
    if mask.shape != (expected := (x.shape[0], *x.shape[2:])):
        raise ShapeError(f"mask has shape {tuple(mask.shape)}, expected {tuple(expected)}")
    if mask.device != x.device:
        raise DeviceError(f"mask is on {mask.device}, but the input is on {x.device}")


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
    tensor = torch.empty_strided(bound.shape, layout.strides, dtype=x.dtype, device=x.device)
    if bound.on_host:
        return tensor, memory_of(tensor, bound.shape3, bound.dtype)
    return tensor, layout.view(array_of_tensor(tensor))


def on_stream_of(tensor: Tensor) -> Any:
    """A context in which CuPy works on the tensor's device and PyTorch's current stream there."""
    return _on_stream(tensor) if getattr(tensor, "is_cuda", False) else HOST


@contextmanager
def _on_stream(tensor: Tensor) -> Iterator[None]:
    device = tensor.device
    cupy = cupy_for("the tensor")
    stream = torch.cuda.current_stream(device).cuda_stream
    with (
        torch.cuda.device(device),  # PyTorch does not hand the tensor over otherwise
        cupy.cuda.Device(device.index),
        cupy.cuda.ExternalStream(stream, device.index),
    ):
        yield


def stands_for_another(x: Tensor, watched: bool = True) -> bool:
    """Whether x is not an array in memory, or something records operators.

    A tensor without values (meta, fake), of a subclass, of a transform of ``torch.func``, or of
    several gradients at once. With `watched` also where there is a mode that records, counts or
    replaces what PyTorch computes (``make_fx``, ``FakeTensorMode``), ``torch.jit.trace``, or
    forward-mode differentiation.
    """
    if type(x) not in PLAIN or x.is_meta:
        return True
    try:
        x.data_ptr()
    except RuntimeError:
        return True
    return watched and (
        _modes() > 0 or _transforms() is not None or _is_tracing() or forward_ad._current_level >= 0
    )


def is_transformed(x: Tensor, module: torch.nn.Module) -> bool:
    """Whether a transform of ``torch.func`` is at work, or forward-mode differentiation."""
    if _transforms() is not None:
        return True
    if forward_ad._current_level < 0:
        return False
    tensors = (x, *module.parameters())
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_recorded() -> bool:
    """Whether operators go into a graph: ``make_fx``, ``torch.export``, ``torch.jit.trace``."""
    return get_proxy_mode() is not None or _is_tracing()


def is_without_values(x: Tensor) -> bool:
    """Whether x has a shape, a dtype and nothing more."""
    return x.is_meta or isinstance(x, FakeTensor)
