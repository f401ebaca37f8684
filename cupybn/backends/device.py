"""Launching on the data's device and the caller's stream: prepared launches, and scratch.

Works on NumPy arrays as well, with the kernels of the host build.
"""

from __future__ import annotations

import sys
import threading
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from ..arrays import Array, is_cupy
from ..statistics import Moments
from . import source
from .launch import LaunchPlan, plan_launch

HOST_MULTIPROCESSORS = 132  # for NumPy arrays: plan as for an H100
NULL = np.uint64(0)

_Function = TypeVar("_Function", bound=Any)


def on_its_device(primitive: _Function) -> _Function:
    """Allocates and launches on the device of the first argument, an array or Moments."""

    @wraps(primitive)
    def there(first: Any, *args: Any, **kwargs: Any) -> Any:
        array = first.mean if isinstance(first, Moments) else first
        if not is_cupy(array):
            return primitive(first, *args, **kwargs)
        with array.device:
            return primitive(first, *args, **kwargs)

    return cast(_Function, there)


class Launch(NamedTuple):
    """A kernel with everything but its arrays."""

    kernel: Any
    plan: LaunchPlan
    grid: tuple[int, int]
    block: tuple[int]
    sizes: tuple[np.int64, ...]

    def __call__(self, *arguments: Any) -> None:
        given = tuple(NULL if argument is None else argument for argument in arguments)
        self.kernel(self.grid, self.block, given + self.sizes)


def prepare(
    kernel: str, x3: Array, tensors: tuple[Array, ...], whole_bytes: bool = False
) -> Launch:
    """The launch of a kernel over tensors of the shape and dtype of x3."""
    first = _address(tensors[0])
    aligned = differ = 16
    for tensor in tensors:
        address = _address(tensor)
        aligned |= address
        differ |= address ^ first
    multiprocessors = _multiprocessors(x3.device.id) if is_cupy(x3) else HOST_MULTIPROCESSORS
    return _launch(
        kernel, x3.shape, x3.dtype, aligned & -aligned, differ & -differ, multiprocessors,
        whole_bytes,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _launch(
    kernel: str,
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    alignment: int,
    congruence: int,
    multiprocessors: int,
    whole_bytes: bool,
) -> Launch:
    plan = plan_launch(shape, dtype.itemsize, alignment, congruence, multiprocessors, whole_bytes)
    scalar = source.SCALARS[dtype.name]
    if plan.flat:
        compiled = source.get_kernel(f"{kernel}_flat", SCALAR=scalar)
        more: tuple[int, ...] = ()
    else:
        compiled = source.get_kernel(
            kernel,
            SCALAR=scalar,
            ROWS=int(plan.rows),
            VECTOR=plan.vector,
            RAGGED_VECTORS=int(plan.ragged),
        )
        more = plan.span, plan.group, plan.fold
    sizes = tuple(map(np.int64, (*shape, *more)))
    return Launch(compiled, plan, plan.grid, (plan.threads,), sizes)


@lru_cache(maxsize=64)
def over_channels(kernel: str, dtype: np.dtype[Any] | None = None) -> Any:
    """A kernel of one thread a channel, for parameters of a dtype where they matter."""
    scalar = {} if dtype is None else {"SCALAR": source.SCALARS[dtype.name]}
    return source.get_kernel(kernel, **scalar)


def clear_caches() -> None:
    """Forgets plans, kernels and this thread's scratch."""
    _launch.cache_clear()
    over_channels.cache_clear()
    source.clear()
    _kept.scratch.clear()
    _kept.outgrown.clear()


class _Kept(threading.local):
    """Scratch of one thread, by device and stream."""

    def __init__(self) -> None:
        self.scratch: dict[tuple[int, int], tuple[Array, Array]] = {}
        # A captured graph may still point at scratch that was outgrown. Sizes double, so that
        # this holds no more than the scratch in use.
        self.outgrown: list[tuple[Array, Array]] = []


_kept = _Kept()


def scratch_for(x3: Array, plan: LaunchPlan) -> tuple[Array | None, Array | None]:
    """Partials and counters for a launch: of this thread, device and stream alone.

    Counters are 0 between launches; a kernel sets them back itself.
    """
    if plan.slices == 1:
        return None, None
    key = (0, 0)
    if is_cupy(x3):
        key = (x3.device.id, sys.modules["cupy"].cuda.get_current_stream().ptr)
    size, tiles = 2 * x3.shape[1] * plan.slices, plan.grid[0]
    held = _kept.scratch.get(key)
    if held is not None and held[0].size >= size and held[1].size >= tiles:
        return held
    if held is not None:
        _kept.outgrown.append(held)
        size, tiles = max(size, 2 * held[0].size), max(tiles, 2 * held[1].size)
    xp = namespace(x3)
    made = xp.empty(max(size, 4096)), xp.zeros(max(tiles, 1024), np.uint32)
    _kept.scratch[key] = made
    return made


def namespace(x: Array) -> Any:
    return sys.modules["cupy"] if is_cupy(x) else np


def _address(x: Array) -> int:
    return int(x.data.ptr if is_cupy(x) else x.__array_interface__["data"][0])


@lru_cache(maxsize=64)
def _multiprocessors(device: int) -> int:
    cupy = sys.modules["cupy"]
    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])
