"""The backend's functions on CuPy arrays: they allocate, and launch what ``launch.py`` prepared.

Same names and meanings as in ``backends/numpy.py``. Callers make the device of the arrays current.
Nothing here but ``count_valid`` waits for the device. Only outputs and scratch (which is kept) are
allocated, all before the first launch, so that nothing fails after a write.

A kernel takes pointers: an array is passed for its address, ``NULL`` for an absent one. All arrays
are C-contiguous.

A `mask` is (N, L) bytes, nonzero where x is valid; `count` is the number of valid ones.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ...arrays import Array
from ...statistics import BackwardSums, Moments, Transform
from .. import numpy as reference
from ..plain import NO_COUNTER
from .launch import (
    NO_SCRATCH,
    NULL,
    Launch,
    backward_launches,
    channel_launch,
    forward_launches,
    scratch_for,
    tensor_launch,
)

_FLOAT64 = np.dtype(np.float64)
_NONE = None, None
_ZERO = np.float64(0)
_RELU = np.int64(0), np.int64(1)
# as in finalize.cuh
_FORMS = {name: np.int64(i) for i, name in enumerate(("local", "pooled", "recentred", "running"))}

update_running = reference.update_running


def count_valid(mask: Array) -> int:
    """The number of valid positions; the one function here that waits for the device."""
    total = sys.modules["cupy"].zeros(1, np.uint64)
    if mask.size:
        launch = channel_launch("count_valid", mask.size)
        launch.run((total, mask, *launch.sizes))
    return int(total[0])


def batch_moments(
    x3: Array,
    *,
    payload: Array | None = None,
    mask: Array | None = None,
    count: int | None = None,
) -> Moments:
    """Count, mean and m2 of each channel of an (N, C, L) array.

    `payload`, float64, takes this rank's part of the first message: (2C,) for ``count * mean`` and
    ``m2 + count * mean**2``, or (C,) for the first of them alone.
    """
    n, c, length = x3.shape
    count = n * length if count is None else count
    if x3.size == 0 or count == 0:
        return Moments(count, *_zeros(c, payload))
    weighted = NULL if payload is None else payload
    valid = () if mask is None else (_aligned(mask), np.float64(count))
    launch, scratch = _reduction("batch_moments", x3, masked=mask is not None)
    mean, m2 = launch.empty(c), launch.empty(c)
    both = payload is not None and payload.size > c
    about_zero = np.uint64(weighted.data.ptr + 8 * c) if both else NULL
    outputs = mean, m2, weighted, about_zero, NULL, NULL, NULL
    launch.run((*outputs, *scratch, x3, *valid, _ZERO, _ZERO, *launch.sizes))
    return Moments(count, mean, m2)


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
    c = moments.mean.size
    dtype = _FLOAT64 if running is None else running[0].dtype
    launch = channel_launch("finalize_moments", c, dtype)
    states = _pointers(*(running or _NONE))
    mean = moments.mean if form == "local" else launch.empty(c)
    var, invstd = launch.empty(c), launch.empty(c)
    numbers = np.float64(moments.count), np.float64(eps), np.float64(factor), _FORMS[form]
    inputs = moments.mean, moments.m2
    launch.run((mean, var, invstd, *states, *inputs, *numbers, *launch.sizes))
    return mean, var, invstd


def given_statistics(mean: Array, var: Array, eps: float) -> tuple[Array, Array, Array]:
    """(mean, variance, invstd), (C,) float64 each, of a given mean and variance."""
    c = mean.size
    launch = channel_launch("finalize_moments", c, mean.dtype)
    outputs = launch.empty(c), launch.empty(c), launch.empty(c)
    numbers = _ZERO, np.float64(eps), _ZERO, _FORMS["running"]
    launch.run((*outputs, mean, var, NULL, NULL, *numbers, *launch.sizes))
    return outputs


def recentre_moments(local: Moments, weighted: Array, count: int, payload: Array) -> None:
    """Writes ``m2 + local.count * (mean - weighted / count)**2`` into `payload`, (C,) float64.

    The second message of float64 data; `weighted` and `count` are the results of the first.
    """
    launch = channel_launch("recentre_moments", local.mean.size)
    counts = np.float64(local.count), np.float64(count)
    launch.run((payload, local.mean, local.m2, weighted, *counts, *launch.sizes))


def normalize(
    x3: Array,
    transform: Transform,
    *,
    relu: bool = False,
    residual3: Array | None = None,
    out3: Array | None = None,
    relu_bits: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """``activation((x - mean) * invstd * weight + bias + residual)``, (N, C, L).

    `relu_bits`, a uint8 array of ceil(size / 8) values, takes one bit for every y above 0.
    """
    y3 = sys.modules["cupy"].ndarray(x3.shape, x3.dtype) if out3 is None else out3
    if x3.size == 0:
        return y3
    residual = NULL if residual3 is None else residual3
    bits = NULL if relu_bits is None else relu_bits
    valid = () if mask is None else (_aligned(mask),)
    kind = relu_bits is not None, mask is not None
    launch = _launch("normalize", x3, y3, residual3, kind=kind)
    inputs = x3, residual, *_pointers(*transform), *valid
    launch.run((y3, bits, *inputs, _RELU[relu], *launch.sizes))
    return y3


def backward_reduce(
    dy3: Array,
    x3: Array,
    transform: Transform,
    *,
    relu: bool = False,
    relu_bits: Array | None = None,
    payload: Array | None = None,
    mask: Array | None = None,
) -> BackwardSums:
    """The sums of dy and of dy * (x - mean), after the activation's backward, per channel.

    Where y passed a ReLU is read from `relu_bits` if given, else computed again from x. `payload`,
    (2C,) float64, takes a copy of both for the message.
    """
    c = x3.shape[1]
    if x3.size == 0:
        return BackwardSums(*_zeros(c, payload))
    bits = NULL if relu_bits is None else relu_bits
    first = NULL if payload is None else payload
    second = NULL if payload is None else np.uint64(payload.data.ptr + 8 * c)
    valid = () if mask is None else (_aligned(mask),)
    launch, scratch = _reduction("backward_reduce", x3, dy3, masked=mask is not None)
    sums = BackwardSums(launch.empty(c), launch.empty(c))
    inputs = dy3, x3, bits, *_pointers(*transform), *valid, _RELU[relu]
    launch.run((*sums, first, second, *scratch, *inputs, *launch.sizes))
    return sums


def backward_input(
    dy3: Array,
    x3: Array,
    transform: Transform,
    *,
    sums: BackwardSums | None = None,
    count: int = 0,
    relu: bool = False,
    relu_bits: Array | None = None,
    out3: Array | None = None,
    dresidual3: Array | None = None,
    local: BackwardSums | None = None,
    dweight: Array | None = None,
    dbias: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """The gradient of x, (N, C, L); see ``backends/numpy.py``.

    `dweight` and `dbias` are added to in the same launch.
    """
    dx3 = sys.modules["cupy"].ndarray(x3.shape, x3.dtype) if out3 is None else out3
    if x3.size == 0:  # then the local sums are 0 and add nothing
        return dx3
    bits = NULL if relu_bits is None else relu_bits
    dresidual = NULL if dresidual3 is None else dresidual3
    bytes_ = () if mask is None else (_aligned(mask),)
    launch = _launch("backward_input", x3, dy3, dx3, dresidual3, kind=(False, mask is not None))
    gradients = _NONE if local is None else (dweight, dbias)
    pointers = _pointers(*gradients, *transform, *(sums or _NONE), *(local or _NONE))
    numbers = np.float64(1 / max(count, 1)), _RELU[relu]
    arguments = dx3, dresidual, *pointers[:2], dy3, x3, bits, *pointers[2:], *bytes_, *numbers
    launch.run((*arguments, *launch.sizes))
    return dx3


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
    relu_bits: Array | None = None,
    running: tuple[Array, Array] | None = None,
    batches: Any = NO_COUNTER,
    factor: float = 0.0,
    mask: Array | None = None,
) -> tuple[Array, Array]:
    """``finalize_moments`` and ``normalize`` into y3: (mean, invstd).

    In one launch after the second message of float64 data, which took one more before it.
    """
    if x3.size == 0:
        mean, _, invstd = finalize_moments(moments, eps, running=running, factor=factor, form=form)
        batches += 1
        return mean, invstd
    residual = NULL if residual3 is None else residual3
    bits = NULL if relu_bits is None else relu_bits
    kernel = "normalize_recentred" if form == "recentred" else "normalize"
    valid = () if mask is None else (_aligned(mask),)
    launch = _launch(kernel, x3, y3, residual3, kind=(relu_bits is not None, mask is not None))
    first, second = moments.mean, moments.m2
    weight, bias, *states = _pointers(weight, bias, *(running or _NONE))
    numbers = np.float64(moments.count), np.float64(eps), np.float64(factor)
    mean = moments.mean if form == "local" else launch.empty(x3.shape[1])
    invstd = launch.empty(x3.shape[1])
    # the variance goes where the same thread writes invstd over it
    outputs = mean, invstd, invstd, *states
    if form == "recentred":
        inputs = x3, residual, first, second, weight, bias, *valid
        launch.run((y3, bits, *outputs, *inputs, *numbers, _RELU[relu], *launch.sizes))
    else:
        dtype = _FLOAT64 if running is None else running[0].dtype
        finalize = channel_launch("finalize_moments", x3.shape[1], dtype)
        finalize.run((*outputs, first, second, *numbers, _FORMS[form], *finalize.sizes))
        inputs = x3, residual, mean, invstd, weight, bias, *valid
        launch.run((y3, bits, *inputs, _RELU[relu], *launch.sizes))
    batches += 1
    return mean, invstd


def local_forward(
    x3: Array,
    y3: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    *,
    relu: bool = False,
    residual3: Array | None = None,
    relu_bits: Array | None = None,
    running: tuple[Array, Array] | None = None,
    batches: Any = NO_COUNTER,
    factor: float = 0.0,
    mask: Array | None = None,
    count: int | None = None,
) -> tuple[Array, Array]:
    """The forward of one rank into y3: (mean, invstd)."""
    if mask is not None:
        options = {"relu": relu, "residual3": residual3, "relu_bits": relu_bits}
        settings = {"running": running, "batches": batches, "factor": factor, "mask": mask}
        return _masked_forward(x3, y3, weight, bias, eps, options, **settings, count=count)
    if x3.size == 0:
        return finish_forward(
            batch_moments(x3), "local", x3, y3, weight, bias, eps, running=running, factor=factor
        )
    x, y, device = x3.data.ptr, y3.data.ptr, x3.data.device_id
    residual, r = (NULL, y) if residual3 is None else (residual3, residual3.data.ptr)
    where = device, x & 15, (x | y | r) & 15, x & y & r & 15
    first, second = forward_launches(x3.shape, x3.dtype, *where, relu_bits is not None)
    mean, invstd = first.empty(x3.shape[1]), first.empty(x3.shape[1])
    weight, bias, *states = _pointers(weight, bias, *(running or _NONE))
    bits = NULL if relu_bits is None else relu_bits
    numbers = np.float64(eps), np.float64(factor)
    if second is None:
        inputs = x3, residual, weight, bias
        first.run((y3, bits, mean, invstd, *states, *inputs, *numbers, _RELU[relu], *first.sizes))
    else:
        scratch = scratch_for(first, device) if first.partials else NO_SCRATCH
        outputs = mean, NULL, NULL, NULL, invstd, *states
        first.run((*outputs, *scratch, x3, *numbers, *first.sizes))
        transform = mean, invstd, weight, bias
        second.run((y3, bits, x3, residual, *transform, _RELU[relu], *second.sizes))
    batches += 1
    return mean, invstd


def _masked_forward(
    x3: Array,
    y3: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    options: dict[str, Any],
    *,
    running: tuple[Array, Array] | None,
    batches: Any,
    factor: float,
    mask: Array,
    count: int | None,
) -> tuple[Array, Array]:
    """:func:`local_forward` with a mask; `options` are those of :func:`normalize`."""
    n, c, length = x3.shape
    count = n * length if count is None else count
    if x3.size == 0 or count == 0:
        moments = batch_moments(x3, mask=mask, count=count)
        options |= {"running": running, "factor": factor, "mask": mask}
        return finish_forward(moments, "local", x3, y3, weight, bias, eps, **options)
    mask = _aligned(mask)
    reduce, scratch = _reduction("batch_moments", x3, masked=True)
    mean, invstd = reduce.empty(c), reduce.empty(c)
    states = _pointers(*(running or _NONE))
    outputs = mean, NULL, NULL, NULL, invstd, *states
    numbers = np.float64(count), np.float64(eps), np.float64(factor)
    reduce.run((*outputs, *scratch, x3, mask, *numbers, *reduce.sizes))
    normalize(x3, Transform(mean, invstd, weight, bias), out3=y3, mask=mask, **options)
    batches += 1
    return mean, invstd


def local_backward(
    dy3: Array,
    x3: Array,
    dx3: Array,
    transform: Transform,
    *,
    count: int,
    relu: bool = False,
    relu_bits: Array | None = None,
    dresidual3: Array | None = None,
    dweight: Array | None = None,
    dbias: Array | None = None,
    mask: Array | None = None,
) -> None:
    """The backward of one rank, into dx3; a count of 0: the statistics are constants."""
    if mask is not None:
        mask = _aligned(mask)
        options = {"relu": relu, "relu_bits": relu_bits, "mask": mask}
        of_rank = backward_reduce(dy3, x3, transform, **options)
        options |= {"dresidual3": dresidual3, "dweight": dweight, "dbias": dbias, "out3": dx3}
        options |= {"local": of_rank, "sums": of_rank if count else None, "count": count}
        backward_input(dy3, x3, transform, **options)
        return
    if x3.size == 0:
        return
    dy, x, dx, device = dy3.data.ptr, x3.data.ptr, dx3.data.ptr, x3.data.device_id
    dresidual, r = (NULL, x) if dresidual3 is None else (dresidual3, dresidual3.data.ptr)
    some, every = dy | x, dy & x
    where = device, some & 15, every & 15, (some | dx | r) & 15, every & dx & r & 15
    first, second = backward_launches(x3.shape, x3.dtype, *where)
    c, share = x3.shape[1], np.float64(1 / count) if count else _ZERO
    weight, bias, *gradients = _pointers(transform.weight, transform.bias, dweight, dbias)
    bits = NULL if relu_bits is None else relu_bits
    inputs = dy3, x3, bits, transform.mean, transform.invstd, weight, bias
    outputs, numbers = (dx3, dresidual, *gradients), (share, _RELU[relu])
    if second is None:
        first.run((*outputs, *inputs, *numbers, *first.sizes))
    else:
        sums = first.empty(2 * c)
        local = sums, np.uint64(sums.data.ptr + 8 * c)
        scratch = scratch_for(first, device) if first.partials else NO_SCRATCH
        first.run((*local, NULL, NULL, *scratch, *inputs, _RELU[relu], *first.sizes))
        pooled = local if count else (NULL, NULL)
        second.run((*outputs, *inputs, *pooled, *local, *numbers, *second.sizes))


def prepare_forward(
    x3: Array,
    y3: Array,
    *,
    residual3: Array | None = None,
    relu_bits: Array | None = None,
    relu: bool = False,
    running_dtype: Any = None,
    ranks: int = 1,
    mask: Array | None = None,
) -> None:
    """Compiles the kernels after the first message of a forward, so that it can only fail before.

    One rank sends none, and compiles before it writes anything; with a mask it would not, so that
    is compiled here, too.
    """
    if ranks == 1 and mask is None:
        return
    c, recentred = x3.shape[1], x3.dtype == _FLOAT64 and ranks > 1
    if recentred:
        channel_launch("recentre_moments", c)
    if not x3.size or (ranks > 1 and not recentred):
        channel_launch("finalize_moments", c, np.dtype(running_dtype or "float64"))
    if x3.size:
        kernel = "normalize_recentred" if recentred else "normalize"
        _launch(kernel, x3, y3, residual3, kind=(relu_bits is not None, mask is not None))
        if ranks == 1:
            _reduction("batch_moments", x3, masked=True)


def prepare_backward(
    dy3: Array,
    x3: Array,
    dx3: Array,
    *,
    dresidual3: Array | None = None,
    relu_bits: Array | None = None,
    relu: bool = False,
    constant: bool = False,
    ranks: int = 1,
    mask: Array | None = None,
) -> None:
    """As :func:`prepare_forward`, for a backward."""
    masked = mask is not None
    if x3.size and (ranks > 1 or masked):
        _launch("backward_input", x3, dy3, dx3, dresidual3, kind=(False, masked))
        if ranks == 1:
            _reduction("backward_reduce", x3, dy3, masked=True)


def _launch(
    kernel: str, x3: Array, *others: Array | None, kind: tuple[bool, bool] = (False, False)
) -> Launch:
    """The launch of a kernel over x3 and tensors like it.

    `kind`: whether it writes ReLU bits, and whether it takes a mask.
    """
    some = every = x3.data.ptr
    for array in others:
        if array is not None:
            some, every = some | array.data.ptr, every & array.data.ptr
    where = x3.data.device_id, some & 15, every & 15
    return tensor_launch(kernel, x3.shape, x3.dtype, *where, *kind)


def _reduction(
    kernel: str, *tensors: Array, masked: bool = False
) -> tuple[Launch, tuple[Array, Array]]:
    """The launch of a kernel that sums over tensors, and its scratch."""
    launch, device = _launch(kernel, *tensors, kind=(False, masked)), tensors[0].data.device_id
    return launch, scratch_for(launch, device) if launch.partials else NO_SCRATCH


def _aligned(mask: Array) -> Array:
    """The mask as kernels take it, where several of its bytes are one access."""
    return mask.copy() if mask.data.ptr % 16 else mask


def _zeros(channels: int, payload: Array | None) -> Array:
    """Two sums over nothing, (2, C), which `payload` takes too."""
    if payload is not None:
        payload[...] = 0
    return sys.modules["cupy"].zeros((2, channels))


def _pointers(*arrays: Array | None) -> list[Array]:
    """The arguments of a kernel for arrays of which some are absent."""
    pointers = [*arrays]
    for i, array in enumerate(arrays):  # in a comprehension it would be one frame more
        if array is None:
            pointers[i] = NULL
    return pointers
