"""The five primitives on CuPy arrays: chooses the launch, allocates the outputs, launches.

Same names and meanings as in ``backends/numpy.py``. Nothing here waits for the device, and nothing
is allocated but outputs and scratch, which is kept. Arrays are allocated through the namespace of
the data and kernels come from ``source.py``, so that the tests run this module on NumPy arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import numpy as np

from ..arrays import Array
from ..statistics import BackwardSums, Moments, Transform
from . import numpy as reference
from .composed import Statistics, compose
from .device import NULL, Launch, namespace, on_its_device, over_channels, prepare, scratch_for

_THREADS_PER_CHANNEL_BLOCK = 128
_FLOAT64 = np.dtype(np.float64)
_FORMS = ("local", "pooled", "recentred", "running")  # as in finalize_moments.cu


@on_its_device
def batch_moments(x3: Array, *, payload: Array | None = None) -> Moments:
    """Count, mean and m2 of each channel of an (N, C, L) array.

    `payload`, float64, takes this rank's part of the first message: (2C,) for ``count * mean`` and
    ``m2 + count * mean**2``, or (C,) for the first of them alone.
    """
    xp = namespace(x3)
    n, c, length = x3.shape
    if x3.size == 0:
        if payload is not None:
            payload[...] = 0
        zeros = xp.zeros((2, c))
        return Moments(n * length, zeros[0], zeros[1])
    mean, m2 = xp.empty(c), xp.empty(c)  # apart: the mean is kept for the backward
    weighted, about_zero = _halves(payload, c)
    launch = prepare("batch_moments", x3, (x3,))
    partials, counters = scratch_for(x3, launch.plan)
    launch(mean, m2, weighted, about_zero, partials, counters, x3)
    return Moments(n * length, mean, m2)


@on_its_device
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
    xp = namespace(moments.mean)
    c = moments.mean.size
    first, second = _dense(moments.mean), _dense(moments.m2)
    number = _FORMS.index(form)
    mean = xp.empty(c) if number else moments.mean
    var, invstd = xp.empty(c), xp.empty(c)
    dtype = _FLOAT64 if running is None else running[0].dtype
    states = [_dense(state) for state in running or ()]
    over_channels("finalize_moments", dtype)(*_channel_grid(c), (
        mean, var, invstd, *(states or (NULL, NULL)), first, second,
        np.float64(moments.count), np.float64(eps), np.float64(factor), np.int64(number),
        np.int64(c),
    ))  # fmt: skip
    _copy_back(running or (), states)
    return mean, var, invstd


@on_its_device
def given_statistics(mean: Array, var: Array, eps: float) -> tuple[Array, Array, Array]:
    """(mean, variance, invstd), (C,) float64 each, of a given mean and variance."""
    c = mean.size
    xp = namespace(mean)
    outputs = xp.empty(c), xp.empty(c), xp.empty(c)
    zero = np.float64(0)
    over_channels("finalize_moments", mean.dtype)(*_channel_grid(c), (
        *outputs, _dense(mean), _dense(var), NULL, NULL, zero, np.float64(eps), zero,
        np.int64(_FORMS.index("running")), np.int64(c),
    ))  # fmt: skip
    return outputs


update_running = on_its_device(reference.update_running)


@on_its_device
def recentre_moments(local: Moments, weighted: Array, count: int, payload: Array) -> None:
    """Writes ``m2 + local.count * (mean - weighted / count)**2`` into `payload`, (C,) float64.

    The second message of float64 data; `weighted` and `count` are what came back of the first.
    """
    c = local.mean.size
    totals = (np.float64(local.count), np.float64(count), np.int64(c))
    arguments = (payload, local.mean, local.m2, weighted, *totals)
    over_channels("recentre_moments")(*_channel_grid(c), arguments)


@on_its_device
def normalize(
    x3: Array,
    transform: Transform,
    *,
    relu: bool = False,
    residual3: Array | None = None,
    out3: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """``activation((x - mean) * invstd * weight + bias + residual)``, (N, C, L).

    `mask`, a uint8 array of ceil(size / 8) values, takes one bit for every y above 0.
    """
    y3 = namespace(x3).empty_like(x3) if out3 is None else out3
    if x3.size == 0:
        return y3
    launch = _normalize_launch(x3, y3, residual3, mask)
    channels = map(_dense, transform)
    launch(y3, mask, x3, residual3, *channels, np.int64(relu))
    return y3


@on_its_device
def backward_reduce(
    dy3: Array,
    x3: Array,
    transform: Transform,
    *,
    relu: bool = False,
    mask: Array | None = None,
    payload: Array | None = None,
) -> BackwardSums:
    """The sums of dy and of dy * (x - mean), after the activation's backward, per channel.

    Where y passed a ReLU is read from `mask` if given, else computed again from x. `payload`,
    (2C,) float64, takes a copy of both for the message.
    """
    xp = namespace(x3)
    c = x3.shape[1]
    if x3.size == 0:
        if payload is not None:
            payload[...] = 0
        return BackwardSums(*xp.zeros((2, c)))
    sums = BackwardSums(*xp.empty((2, c)))
    launch = prepare("backward_reduce", x3, (dy3, x3))
    scratch = scratch_for(x3, launch.plan)
    channels = map(_dense, transform)
    launch(*sums, *_halves(payload, c), *scratch, dy3, x3, mask, *channels, np.int64(relu))
    return sums


@on_its_device
def backward_input(
    dy3: Array,
    x3: Array,
    transform: Transform,
    *,
    sums: BackwardSums | None = None,
    count: int = 0,
    relu: bool = False,
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
    dx3 = namespace(x3).empty_like(x3) if out3 is None else out3
    if x3.size == 0:  # then the local sums are 0 and add nothing
        return dx3
    gradients = [None if local is None else g for g in (dweight, dbias)]
    dense = [_dense(g) for g in gradients]
    pooled = (None, None) if sums is None else map(_dense, sums)
    own = (None, None) if local is None else local
    channels = map(_dense, transform)
    launch = _backward_input_launch(dy3, x3, dx3, dresidual3)
    launch(
        dx3, dresidual3, *dense, dy3, x3, mask, *channels, *pooled, *own,
        np.float64(1 / max(count, 1)), np.int64(relu),
    )  # fmt: skip
    _copy_back(gradients, dense)
    return dx3


_finish_forward, local_forward, local_backward = compose(sys.modules[__name__])


@on_its_device
def finish_forward(
    moments: Moments,
    form: str,
    x3: Array,
    y3: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    *,
    relu: bool = False,
    residual3: Array | None = None,
    mask: Array | None = None,
    running: tuple[Array, Array] | None = None,
    factor: float = 0.0,
) -> Statistics:
    """``finalize_moments`` and ``normalize`` into y3: (mean, invstd).

    In one launch after the second message of float64 data, which took one more before it.
    """
    if form != "recentred" or x3.size == 0:
        return _finish_forward(
            moments, form, x3, y3, weight, bias, eps, relu=relu, residual3=residual3,
            mask=mask, running=running, factor=factor,
        )  # fmt: skip
    xp, c = namespace(x3), x3.shape[1]
    mean, var, invstd = xp.empty(c), xp.empty(c), xp.empty(c)
    states = [_dense(state) for state in running or ()]
    launch = _normalize_launch(x3, y3, residual3, mask, "normalize_recentred")
    launch(
        y3, mask, mean, var, invstd, *(states or (None, None)), x3, residual3,
        _dense(moments.mean), _dense(moments.m2), _dense(weight), _dense(bias),
        np.float64(moments.count), np.float64(eps), np.float64(factor), np.int64(relu),
    )  # fmt: skip
    _copy_back(running or (), states)
    return mean, invstd


@on_its_device
def prepare_forward(
    x3: Array,
    y3: Array,
    *,
    residual3: Array | None = None,
    mask: Array | None = None,
    relu: bool = False,
    running_dtype: str | None = None,
    ranks: int = 1,
) -> None:
    """Compiles what comes after the first message of a forward, to fail before it, if at all.

    With one rank there is none, and nothing may fail at all.
    """
    recentred = x3.dtype == _FLOAT64 and ranks > 1
    if recentred:
        over_channels("recentre_moments")
    if not (recentred and x3.size):
        over_channels("finalize_moments", np.dtype(running_dtype or "float64"))
    if x3.size:
        _normalize_launch(
            x3, y3, residual3, mask, "normalize_recentred" if recentred else "normalize"
        )
        if ranks == 1:
            scratch_for(x3, prepare("batch_moments", x3, (x3,)).plan)


@on_its_device
def prepare_backward(
    dy3: Array,
    x3: Array,
    dx3: Array,
    *,
    dresidual3: Array | None = None,
    mask: Array | None = None,
    relu: bool = False,
    constant: bool = False,
    ranks: int = 1,
) -> None:
    """As :func:`prepare_forward`, for a backward."""
    if x3.size:
        _backward_input_launch(dy3, x3, dx3, dresidual3)
        if ranks == 1:
            scratch_for(x3, prepare("backward_reduce", x3, (dy3, x3)).plan)


def _normalize_launch(
    x3: Array, y3: Array, residual3: Array | None, mask: Array | None, kernel: str = "normalize"
) -> Launch:
    tensors = (x3, y3) if residual3 is None else (x3, y3, residual3)
    return prepare(kernel, x3, tensors, whole_bytes=mask is not None)


def _backward_input_launch(dy3: Array, x3: Array, dx3: Array, dresidual3: Array | None) -> Launch:
    tensors = (dy3, x3, dx3) if dresidual3 is None else (dy3, x3, dx3, dresidual3)
    return prepare("backward_input", x3, tensors)


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


def _copy_back(given: Iterable[Array], written: Iterable[Array]) -> None:
    for target, values in zip(given, written, strict=True):
        if values is not target:
            target[...] = values
