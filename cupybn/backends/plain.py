"""Arrays as compiled loops and kernels take them; others are copied, and what is written, back.

Kernels on a device take C-contiguous arrays. Numba's loops take those that are aligned and
writeable too, which is ``flags.carray``: any other array is another type to Numba, which would
compile for seconds. So whoever calls a backend's function makes its arrays plain.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np

from ..arrays import is_cupy

_Result = TypeVar("_Result")
NO_COUNTER = np.zeros((), np.int64)
"""Counts batches for nobody."""


def plain(value: Any) -> Any:
    """The array, or the arrays of a tuple: themselves, over the same memory, or copies."""
    if isinstance(value, tuple):
        arrays = [plain(array) for array in value]
        return type(value)(*arrays) if hasattr(value, "_fields") else tuple(arrays)
    if is_cupy(value):
        return value if value.flags.c_contiguous else value.copy()
    if not isinstance(value, np.ndarray) or value.flags.carray:
        return value
    if not (value.flags.c_contiguous and value.flags.aligned):
        return value.copy(order="C")
    interface = value.__array_interface__  # of a read-only array; the kernels do not write to it
    interface["data"] = interface["data"][0], False
    alias = np.asarray(SimpleNamespace(__array_interface__=interface, owner=value))
    return alias.view(value.dtype)  # the interface knows no bfloat16


def copy_back(given: Any, taken: Any) -> None:
    """Writes what a kernel left in the arrays that `plain` gave out to the arrays it was given."""
    if isinstance(given, tuple):
        for target, values in zip(given, taken, strict=True):
            copy_back(target, values)
    elif taken is not given:
        given[...] = taken


def call_plainly(
    function: Callable[..., _Result], written: tuple[str, ...], /, **arguments: Any
) -> _Result:
    """``function(**arguments)`` with plain arrays; those named `written` take the results."""
    taken = {name: plain(value) for name, value in arguments.items()}
    result = function(**taken)
    for name in written:
        copy_back(arguments[name], taken[name])
    return result
