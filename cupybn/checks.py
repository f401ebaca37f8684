"""Checks of arguments: what was wrong, where, and what was expected."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Array, as_array, device_of, overlap, parameter_dtype, same_memory
from .errors import DeviceError, DTypeError, ShapeError
from .layout import Layout

_NUMBERS = (int, float, np.number)


def check_momentum(momentum: float) -> None:
    """Raises ValueError unless momentum is a number from 0 to 1."""
    if not isinstance(momentum, _NUMBERS) or not 0 <= momentum <= 1:
        raise ValueError(f"momentum must lie in [0, 1], got {momentum!r}")


def check_eps(eps: float) -> None:
    """Raises ValueError unless eps is a positive finite number."""
    if not isinstance(eps, _NUMBERS) or not 0 < eps < float("inf"):
        raise ValueError(f"eps must be positive, got {eps!r}")


def check_layer_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype of a layer's parameters; raises DTypeError unless it is float32 or float64."""
    chosen: np.dtype[Any] = np.dtype(dtype)
    if chosen not in (np.float32, np.float64):
        raise DTypeError(f"dtype of a layer must be float32 or float64, got {chosen}")
    return chosen


def is_relu(activation: str | None) -> bool:
    """Whether the activation is ReLU. The one place that knows activations by their names.

    Raises:
        ValueError: activation is neither None nor "relu".
    """
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu', got {activation!r}")
    return activation is not None


def check_array(what: str, array: Array, x: Array, shape: tuple[int, ...], dtype: Any) -> None:
    """Raises unless the array has this shape and dtype, and the device of x."""
    if device_of(array) != device_of(x):
        raise DeviceError(f"{what} is on {device_of(array)}, but the input is on {device_of(x)}")
    if array.shape != shape:
        raise ShapeError(f"{what} has shape {array.shape}, expected {shape}")
    if array.dtype != dtype:
        raise DTypeError(f"{what} is {array.dtype}, expected {np.dtype(dtype)}")


def check_parameter(what: str, parameter: Array, x: Array, layout: Layout) -> None:
    """Raises unless the per-channel array has the device, shape and dtype that go with x."""
    check_array(what, parameter, x, layout.per_channel, parameter.dtype)
    dtype = parameter_dtype(x.dtype)
    if parameter.dtype != dtype:
        raise DTypeError(
            f"{what} is {parameter.dtype}, but {x.dtype} input goes with {dtype} parameters"
        )


def check_written(what: str, array: Array, x: Array, layout: Layout) -> None:
    """Raises unless results per channel of x can be written to the array."""
    check_writeable(what, array)
    check_parameter(what, array, x, layout)


def check_writeable(what: str, array: Array) -> None:
    """Raises DTypeError if it is not an array, ValueError if it is read-only."""
    if not getattr(as_array(array, what).flags, "writeable", True):  # CuPy's have no such flag
        raise ValueError(f"{what} is read-only")


def check_like(what: str, array: Array, x: Array, layout: Layout) -> None:
    """Raises unless the array has the shape of the layout and the dtype and device of x."""
    if array.shape != layout.shape:
        raise ShapeError(f"{what} has shape {array.shape}, expected {layout.shape}")
    if array.dtype != x.dtype:
        raise DTypeError(f"{what} is {array.dtype}, expected {x.dtype} like the input")
    if device_of(array) != device_of(x):
        raise DeviceError(f"{what} is on {device_of(array)}, but the input is on {device_of(x)}")


def check_mask(mask: Array, x: Array, positions: tuple[int, ...]) -> None:
    """Raises unless the mask has a value for each position of x, on the device of x."""
    check_array("mask", mask, x, positions, mask.dtype)
    if mask.dtype not in (np.bool_, np.uint8):
        raise DTypeError(f"mask is {mask.dtype}, expected bool or uint8, nonzero where x is valid")


def check_out(out: Array, x: Array, layout: Layout) -> None:
    """Raises unless out can take a result like x."""
    if device_of(out) != device_of(x):
        raise DeviceError(f"out is on {device_of(out)}, but the input is on {device_of(x)}")
    if not isinstance(out, type(x)):
        raise DTypeError(f"out must be a {type(x).__name__}, got {type(out).__name__}")
    check_like("out", out, x, layout)
    check_writeable("out", out)


def check_overlap(out: Array, array: Array, what: str, may_be_same: bool) -> None:
    """Raises ValueError if out overlaps the array, unless it is the array and may be."""
    if overlap(out, array) and not (may_be_same and same_memory(out, array)):
        hint = f"pass {what} itself or another array" if may_be_same else "pass another array"
        raise ValueError(f"out overlaps {what}; {hint}")
