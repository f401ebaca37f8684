"""Prepared launches: kernels, grids and constant arguments, found once for a signature; scratch.

A call looks up what is kept here, and launches. It looks up nothing by name, and enters no Python
function of this module but :func:`scratch_for`. The current device is the one of the arrays.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from ...arrays import DATA_TYPES, Array
from . import source
from .plan import VECTOR_BYTES, LaunchPlan, plan_launch, plan_resident

NULL = np.uint64(0)
NO_SCRATCH = NULL, NULL

_THREADS_PER_CHANNEL_BLOCK = 128
_REDUCTIONS = "batch_moments", "backward_reduce"
_KEPT = {"local_forward": 1, "local_backward": 2}  # tensors in shared memory
RESIDENT = "CUPYBN_RESIDENT"


class Launch(NamedTuple):
    """A kernel with everything that its calls have in common.

    Attributes:
        run: launches; takes the tuple of all arguments.
        sizes: the last arguments.
        empty: ``cupy.ndarray``, which allocates in a third of the time of ``cupy.empty_like``.
        partials, counters: how much scratch it needs; 0 where no channel is split.
    """

    run: Callable[[tuple[Any, ...]], None]
    sizes: tuple[np.int64, ...]
    empty: Any
    partials: int = 0
    counters: int = 0


@lru_cache(maxsize=4096)
def tensor_launch(
    kernel: str,
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    device: int,
    some: int,
    every: int,
    whole_bytes: bool = False,
    masked: bool = False,
) -> Launch:
    """The launch of a kernel over tensors of a shape and dtype.

    `some` has the bits that are set in the address of at least one tensor, `every` those that are
    set in all, up to 16 bytes; `whole_bytes` is for a kernel that writes ReLU bits, `masked` for
    one that takes a mask.
    """
    alignment, congruence = some | 16, some & ~every | 16
    plan = plan_launch(
        shape,
        dtype.itemsize,
        alignment & -alignment,
        congruence & -congruence,
        _multiprocessors(device),
        whole_bytes,
    )
    scalar = DATA_TYPES[dtype.name].cuda
    mask = {"MASK": mask_loads(plan, shape, dtype.itemsize)} if masked else {}
    if plan.flat:
        compiled = source.get_kernel(f"{kernel}_flat", SCALAR=scalar, **mask)
        return _launch_of(compiled, plan, shape)
    compiled = source.get_kernel(
        kernel,
        SCALAR=scalar,
        ROWS=int(plan.rows),
        VECTOR=plan.vector,
        RAGGED_VECTORS=int(plan.ragged),
        **mask,
    )
    reduces = kernel in _REDUCTIONS
    shared = plan.shared_bytes if reduces else 0
    plan = plan.over(_multiprocessors(device) * _resident(compiled, plan.threads, shared))
    sizes = (*shape, plan.slice_length, plan.tile_channels, plan.line_samples)
    if not reduces:
        return _launch_of(compiled, plan, sizes)
    options = {"shared_mem": shared} if shared else {}
    launch = _launch_of(compiled, plan, (*sizes, plan.group_slices), **options)
    if plan.slices == 1:
        return launch
    partials = 2 * shape[1] * (plan.slices + plan.groups)
    return launch._replace(partials=partials, counters=plan.tiles * (plan.groups + 1))


def mask_loads(plan: LaunchPlan, shape: tuple[int, int, int], itemsize: int) -> str:
    """How the mask of a vector is read, in the terms of ``cuda/mask.cuh``.

    Its elements have one position in columns. They have as many neighbouring ones, at a multiple
    of their number, where rows are whole vectors; of narrow vectors that is not worth a kernel.
    """
    length, vector = shape[2], plan.vector
    if vector == 1 or (length == 1 and plan.line_samples == 1):
        return "ONE_BYTE"
    wide = vector * itemsize == VECTOR_BYTES
    return "AT_ONCE" if wide and not plan.ragged and length % vector == 0 else "EACH_BYTE"


def _launch_of(compiled: Any, plan: LaunchPlan, sizes: tuple[int, ...], **options: int) -> Launch:
    return Launch(
        partial(compiled, plan.grid, (plan.threads,), **options),
        tuple(map(np.int64, sizes)),
        sys.modules["cupy"].ndarray,
    )


def _resident(compiled: Any, threads: int, shared: int) -> int:
    """Blocks of a kernel that a multiprocessor of the current device holds at once."""
    count = sys.modules["cupy"].cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor
    return max(1, int(count(compiled.kernel.ptr, threads, shared)))


@lru_cache(maxsize=4096)
def channel_launch(kernel: str, channels: int, dtype: np.dtype[Any] | None = None) -> Launch:
    """The launch of a kernel of one thread a channel; `dtype`: of its parameters, if it has any."""
    scalar = {} if dtype is None else {"SCALAR": DATA_TYPES[dtype.name].cuda}
    threads = _THREADS_PER_CHANNEL_BLOCK
    grid = (-(-channels // threads),)
    run = partial(source.get_kernel(kernel, **scalar), grid, (threads,))
    return Launch(run, (np.int64(channels),), sys.modules["cupy"].ndarray)


def resident_launch(
    kernel: str,
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    device: int,
    some: int,
    whole_bytes: bool = False,
) -> Launch | None:
    """The one launch for a direction of one rank, or None: then two launches stream.

    The plan decides, unless the environment variable ``CUPYBN_RESIDENT`` is 0 (never) or 1
    (wherever it fits). Arguments as for :func:`tensor_launch`.

    Raises:
        ValueError: the variable is neither auto, 0 nor 1.
    """
    setting = os.environ.get(RESIDENT) or "auto"
    if setting not in ("auto", "0", "1"):
        raise ValueError(f"{RESIDENT} must be auto, 0 or 1, got {setting!r}")
    alignment, shared = some | 16, _shared_memory(device)
    plan, _ = plan_resident(
        shape,
        dtype.itemsize,
        alignment & -alignment,
        _multiprocessors(device),
        shared,
        _KEPT[kernel],
        whole_bytes=whole_bytes,
        always=setting == "1",
    )
    if setting == "0" or plan is None:
        return None
    defines = {"ROWS": int(plan.rows), "VECTOR": plan.vector, "RAGGED_VECTORS": 0}
    compiled = source.get_kernel(kernel, SCALAR=DATA_TYPES[dtype.name].cuda, **defines)
    try:
        compiled.max_dynamic_shared_size_bytes = shared - plan.table_bytes
    except sys.modules["cupy"].cuda.driver.CUDADriverError:
        return None
    sizes = (*shape, plan.slice_length, plan.tile_channels, plan.line_samples, plan.kept_begin)
    kept = (plan.kept_vectors,) if kernel == "local_backward" else ()
    return _launch_of(compiled, plan, sizes + kept, shared_mem=plan.resident_bytes(_KEPT[kernel]))


@lru_cache(maxsize=4096)
def forward_launches(
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    device: int,
    x: int,
    some: int,
    every: int,
    whole_bytes: bool,
) -> tuple[Launch, Launch | None]:
    """The launches of ``local_forward``: statistics, and y; or one resident kernel, and None.

    Bits as for :func:`tensor_launch`: of x alone, and of all tensors.
    """
    resident = resident_launch("local_forward", shape, dtype, device, some, whole_bytes)
    if resident is not None:
        return resident, None
    return (
        tensor_launch("batch_moments", shape, dtype, device, x, x),
        tensor_launch("normalize", shape, dtype, device, some, every, whole_bytes),
    )


@lru_cache(maxsize=4096)
def backward_launches(
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    device: int,
    some_read: int,
    every_read: int,
    some: int,
    every: int,
) -> tuple[Launch, Launch | None]:
    """The launches of ``local_backward``: sums, and dx; or one resident kernel, and None."""
    resident = resident_launch("local_backward", shape, dtype, device, some)
    if resident is not None:
        return resident, None
    return (
        tensor_launch("backward_reduce", shape, dtype, device, some_read, every_read),
        tensor_launch("backward_input", shape, dtype, device, some, every),
    )


Scratch = tuple[Array, Array]


class _Kept(threading.local):
    """Scratch of one thread, by device and stream."""

    def __init__(self) -> None:
        self.scratch: dict[tuple[int, int], Scratch] = {}


_kept = _Kept()
# Scratch of launches in CUDA graphs is kept for good: nothing says when a graph is gone.
_captured: list[Scratch] = []


def scratch_for(launch: Launch, device: int) -> Scratch:
    """Partials and counters for a launch: of this thread, device and stream alone.

    Counters are 0 between launches; a kernel sets them back itself. A launch that is captured gets
    scratch of its own: its graph may be replayed beside other graphs and other work of the stream.
    """
    cupy = sys.modules["cupy"]
    stream = cupy.cuda.get_current_stream()
    partials, counters = launch.partials, launch.counters
    if stream.is_capturing():
        made = cupy.empty(partials), cupy.zeros(counters, np.uint32)
        _captured.append(made)
        return made
    key = device, stream.ptr
    held = _kept.scratch.get(key)
    if held is not None:
        if held[0].size >= partials and held[1].size >= counters:
            return held
        # scratch that is too small goes back to its stream, which reuses it only after this launch
        partials, counters = max(partials, 2 * held[0].size), max(counters, 2 * held[1].size)
    made = cupy.empty(max(partials, 4096)), cupy.zeros(max(counters, 1024), np.uint32)
    _kept.scratch[key] = made
    return made


@lru_cache(maxsize=64)
def _multiprocessors(device: int) -> int:
    return int(sys.modules["cupy"].cuda.Device(device).attributes["MultiProcessorCount"])


@lru_cache(maxsize=64)
def _shared_memory(device: int) -> int:
    """Bytes of shared memory that a block can have, if it asks for them."""
    return int(sys.modules["cupy"].cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])
