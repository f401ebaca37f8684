"""The five primitives on CuPy arrays: chooses the launch, allocates the outputs, launches.

Same names and meanings as in ``backends/numpy.py``. Nothing here waits for the device, and nothing
is allocated but outputs and scratch, which is kept. Arrays are allocated through the namespace of
the data and kernels come from ``source.py``, so that the tests run this module on NumPy arrays.
"""

from __future__ import annotations

import sys
import threading
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array, is_cupy
from ..statistics import BackwardSums, Moments
from . import source
from .launch import LaunchPlan, plan_launch

HOST_MULTIPROCESSORS = 132  # for NumPy arrays: plan as for an H100
_NULL = np.uint64(0)
_THREADS_PER_CHANNEL_BLOCK = 128


def batch_moments(x3: Array, *, payload: Array | None = None) -> Moments:
    """Count, mean and m2 of each channel of an (N, C, L) array.

    `payload`, float64, takes this rank's part of the first message: (2C,) for ``count * mean`` and
    ``m2 + count * mean**2``, or (C,) for the first of them alone.
    """
    xp = _namespace(x3)
    n, c, length = x3.shape
    if x3.size == 0:
        if payload is not None:
            payload[...] = 0
        zeros = xp.zeros((2, c))
        return Moments(n * length, zeros[0], zeros[1])
    mean, m2 = xp.empty((2, c))
    weighted, about_zero = _halves(payload, c)
    with _device_of(x3):
        launch = _prepare("batch_moments", (), x3, (x3,))
        partials, counters = _scratch(x3, launch.plan)
        launch(mean, m2, weighted, about_zero, partials, counters, x3)
    return Moments(n * length, mean, m2)


def finalize_moments(
    moments: Moments,
    eps: float,
    *,
    running: tuple[Array, Array] | None = None,
    factor: float = 0.0,
    form: str = "local",
) -> tuple[Array, Array, Array]:
    """(mean, biased variance, invstd), (C,) float64 each; updates `running` in place.

    `form` says what `moments.mean` and `moments.m2` hold: themselves (``"local"``); the sums over
    the ranks of both halves of the message (``"pooled"``); the pooled first half, and the pooled
    result of :func:`recentre_moments` (``"recentred"``).
    """
    xp = _namespace(moments.mean)
    c = moments.mean.size
    first, second = _dense(moments.mean), _dense(moments.m2)
    number = ("local", "pooled", "recentred").index(form)
    outputs = xp.empty((3 if number else 2, c))
    mean = outputs[2] if number else moments.mean
    dtype = "float64" if running is None else running[0].dtype.name
    states = [_dense(state) for state in running or ()]
    with _device_of(moments.mean):
        kernel = source.get_kernel("finalize_moments", SCALAR=source.SCALARS[dtype], FORM=number)
        arguments = (
            mean, outputs[0], outputs[1], *(states or (_NULL, _NULL)), first, second,
            np.float64(moments.count), np.float64(eps), np.float64(factor), np.int64(c),
        )  # fmt: skip
        kernel(*_channel_grid(c), arguments)
    for state, dense in zip(running or (), states, strict=True):
        if dense is not state:
            state[...] = dense
    return mean, outputs[0], outputs[1]


def recentre_moments(local: Moments, weighted: Array, count: int, payload: Array) -> None:
    """Writes ``m2 + local.count * (mean - weighted / count)**2`` into `payload`, (C,) float64.

    The second message of float64 data; `weighted` and `count` are what came back of the first.
    """
    c = local.mean.size
    with _device_of(local.mean):
        kernel = source.get_kernel("recentre_moments", SCALAR="double", FORM=0)
        totals = (np.float64(local.count), np.float64(count), np.int64(c))
        kernel(*_channel_grid(c), (payload, local.mean, local.m2, weighted, *totals))


def normalize(
    x3: Array,
    mean: Array,
    invstd: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    residual3: Array | None = None,
    out3: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """``activation((x - mean) * invstd * weight + bias + residual)``, (N, C, L).

    `mask`, a uint8 array of ceil(size / 8) values, takes one bit for every y above 0.
    """
    y3 = _namespace(x3).empty_like(x3) if out3 is None else out3
    if x3.size == 0:
        return y3
    flags = (
        ("FLAT", 0),
        ("MASK", int(mask is not None)),
        ("RELU", int(activation == "relu")),
        ("RESIDUAL", int(residual3 is not None)),
    )
    tensors = (x3, y3) if residual3 is None else (x3, y3, residual3)
    with _device_of(x3):
        launch = _prepare("normalize", flags, x3, tensors, whole_bytes=mask is not None)
        launch(y3, mask, x3, residual3, *_channels(mean, invstd, weight, bias))
    return y3


def backward_reduce(
    dy3: Array,
    x3: Array,
    mean: Array,
    invstd: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    mask: Array | None = None,
    payload: Array | None = None,
) -> BackwardSums:
    """The sums of dy and of dy * (x - mean), after the activation's backward, per channel.

    Where y passed a ReLU is read from `mask` if given, else computed again from x. `payload`,
    (2C,) float64, takes a copy of both for the message.
    """
    xp = _namespace(x3)
    c = x3.shape[1]
    if x3.size == 0:
        if payload is not None:
            payload[...] = 0
        return BackwardSums(*xp.zeros((2, c)))
    sums = BackwardSums(*xp.empty((2, c)))
    with _device_of(x3):
        launch = _prepare("backward_reduce", _activation_flags(activation, mask), x3, (dy3, x3))
        scratch = _scratch(x3, launch.plan)
        channels = _channels(mean, invstd, weight, bias)
        launch(*sums, *_halves(payload, c), *scratch, dy3, x3, mask, *channels)
    return sums


def backward_input(
    dy3: Array,
    x3: Array,
    mean: Array,
    invstd: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    sums: BackwardSums | None = None,
    count: int = 0,
    activation: str | None = None,
    mask: Array | None = None,
    out3: Array | None = None,
    dresidual3: Array | None = None,
    local: BackwardSums | None = None,
    dweight: Array | None = None,
    dbias: Array | None = None,
) -> Array:
    """The gradient of x, (N, C, L); see ``backends/numpy.py``.

    `dweight` and `dbias` are added to in the same launch.
    """
    dx3 = _namespace(x3).empty_like(x3) if out3 is None else out3
    if x3.size == 0:  # then the local sums are 0 and add nothing
        return dx3
    flags = (
        *_activation_flags(activation, mask),
        ("CONSTANT", int(sums is None)),
        ("RESIDUAL", int(dresidual3 is not None)),
    )
    tensors = (dy3, x3, dx3) if dresidual3 is None else (dy3, x3, dx3, dresidual3)
    gradients = [None if local is None else g for g in (dweight, dbias)]
    dense = [_dense(g) for g in gradients]
    pooled = (None, None) if sums is None else map(_dense, sums)
    own = (None, None) if local is None else local
    channels = _channels(mean, invstd, weight, bias)
    with _device_of(x3):
        launch = _prepare("backward_input", flags, x3, tensors)
        launch(
            dx3, dresidual3, *dense, dy3, x3, mask, *channels, *pooled, *own,
            np.float64(max(count, 1)),
        )  # fmt: skip
    for gradient, written in zip(gradients, dense, strict=True):
        if written is not gradient:
            gradient[...] = written  # type: ignore[index]
    return dx3


class _Launch(NamedTuple):
    """A kernel with everything but its arrays."""

    kernel: Any
    plan: LaunchPlan
    grid: tuple[int, int]
    block: tuple[int]
    sizes: tuple[np.int64, ...]

    def __call__(self, *arguments: Any) -> None:
        given = tuple(_NULL if argument is None else argument for argument in arguments)
        self.kernel(self.grid, self.block, given + self.sizes)


def _prepare(
    kernel: str,
    flags: tuple[tuple[str, int], ...],
    x3: Array,
    tensors: tuple[Array, ...],
    whole_bytes: bool = False,
) -> _Launch:
    """The launch of a kernel over tensors of the shape and dtype of x3."""
    first = _address(tensors[0])
    aligned = differ = 16
    for tensor in tensors:
        address = _address(tensor)
        aligned |= address
        differ |= address ^ first
    multiprocessors = _multiprocessors(x3.device.id) if is_cupy(x3) else HOST_MULTIPROCESSORS
    return _launch(
        kernel, flags, x3.shape, x3.dtype.name, aligned & -aligned, differ & -differ,
        multiprocessors, whole_bytes,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _launch(
    kernel: str,
    flags: tuple[tuple[str, int], ...],
    shape: tuple[int, int, int],
    dtype: str,
    alignment: int,
    congruence: int,
    multiprocessors: int,
    whole_bytes: bool,
) -> _Launch:
    itemsize = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    plan = plan_launch(shape, itemsize, alignment, congruence, multiprocessors, whole_bytes)
    defines: dict[str, str | int] = dict(flags)
    if plan.flat:
        defines["FLAT"] = 1
    compiled = source.get_kernel(
        kernel,
        **defines,
        SCALAR=source.SCALARS[dtype],
        ROWS=int(plan.rows),
        VECTOR=plan.vector,
        RAGGED_VECTORS=int(plan.ragged),
    )
    sizes = (*shape, plan.span, plan.group, plan.fold)
    return _Launch(compiled, plan, plan.grid, (plan.threads,), tuple(map(np.int64, sizes)))


def clear_caches() -> None:
    """Forgets plans, kernels and this thread's scratch."""
    _launch.cache_clear()
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


def _scratch(x3: Array, plan: LaunchPlan) -> tuple[Array | None, Array | None]:
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
    xp = _namespace(x3)
    made = xp.empty(max(size, 4096)), xp.zeros(max(tiles, 1024), np.uint32)
    _kept.scratch[key] = made
    return made


def _activation_flags(activation: str | None, mask: Array | None) -> tuple[tuple[str, int], ...]:
    relu = activation is not None
    return ("MASK", int(relu and mask is not None)), ("RELU", int(relu))


def _channels(
    mean: Array, invstd: Array, weight: Array | None, bias: Array | None
) -> tuple[Array | None, ...]:
    return _dense(mean), _dense(invstd), _dense(weight), _dense(bias)


def _halves(payload: Array | None, c: int) -> tuple[Array | None, Array | None]:
    if payload is None:
        return None, None
    return payload[:c], payload[c:] if payload.size > c else None


def _channel_grid(c: int) -> tuple[tuple[int], tuple[int]]:
    threads = _THREADS_PER_CHANNEL_BLOCK
    return (-(-c // threads),), (threads,)


def _dense(array: Array) -> Array:
    """The array, or None, itself where its memory is contiguous; else a copy."""
    if array is None or array.flags.c_contiguous:
        return array
    return array.copy()


def _namespace(x: Array) -> Any:
    return sys.modules["cupy"] if is_cupy(x) else np


def _address(x: Array) -> int:
    return int(x.data.ptr if is_cupy(x) else x.__array_interface__["data"][0])


def _device_of(x: Array) -> Any:
    return x.device if is_cupy(x) else nullcontext()


@lru_cache(maxsize=64)
def _multiprocessors(device: int) -> int:
    cupy = sys.modules["cupy"]
    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])
