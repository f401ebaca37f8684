"""The primitives in NumPy: the readable reference, and the path that needs no extra.

Data are (N, C, L) arrays; everything per channel is (C,) float64. 16- and 32-bit data are computed
in float32, float64 data in float64. The work goes block by block: a block's temporaries stay in
the cache, and no float32 partial sum runs over more than one block. NaN and Inf pass through in
their own channel, without a warning.

A `mask` is an (N, L) array of bytes, nonzero where x is valid. Results are those of the valid
values alone, and 0 where masked; `count` is the number of valid values, if it is known.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import parameter_dtype
from ..statistics import BackwardSums, Moments, Transform
from .plain import NO_COUNTER

Data = NDArray[Any]
PerChannel = NDArray[np.float64]
Part = tuple[slice, slice, slice]

_BLOCK_BYTES = 1 << 19  # three temporaries of this size fit in a 2 MB L2 cache
_ROWS = 1024  # of columns, L == 1, in one float32 sum
_quiet = np.errstate(all="ignore")
# The function behind np.einsum, which spends 4 us on reading its arguments in Python.
_einsum = getattr(getattr(np, "_core", np).multiarray, "c_einsum", np.einsum)


@lru_cache(maxsize=256)
def _blocks(shape: tuple[int, int, int], itemsize: int) -> tuple[Part, ...]:
    """Pieces of an (N, C, L) array with all channels, each about _BLOCK_BYTES in the arithmetic."""
    n, c, length = shape
    size = _BLOCK_BYTES // itemsize
    samples = max(1, size // max(1, c * length))
    if length == 1:
        samples = min(samples, _ROWS)
    run = max(1, size // c) if samples == 1 else max(1, length)
    return tuple(
        (slice(i, i + samples), slice(None), slice(j, j + run))
        for i in range(0, n, samples)
        for j in range(0, length, run)
    )


def count_valid(mask: Data) -> int:
    """How many positions are valid."""
    return int(np.count_nonzero(mask))


def _valid(mask: Data, part: Part) -> NDArray[np.bool_]:
    """Which positions of a block are valid, (n, 1, l)."""
    found: NDArray[np.bool_] = mask[part[0], None, part[2]] != 0
    return found


@lru_cache(maxsize=256)
def _ones(size: int, dtype: np.dtype[Any]) -> Data:
    return np.ones(size, dtype)


class _Affine(NamedTuple):
    """``(x - mean) * invstd * weight + bias`` as ``(x - high) * scale + shift``, (C, 1) each.

    The mean is split into `high`, its value in the dtype of the arithmetic, and `low`, the rest;
    `low` goes into `shift` in float64: no digit is lost, and x is not read once more.
    """

    high: Data
    low: PerChannel
    scale: Data
    shift: Data

    @staticmethod
    def of(x3: Data, transform: Transform) -> _Affine:
        dtype = parameter_dtype(x3.dtype)
        mean, invstd, weight, bias = transform
        high = mean.astype(dtype)
        low = mean - high
        scale = invstd if weight is None else invstd * weight
        shift = -low * scale if bias is None else bias - low * scale
        return _Affine(
            high[:, None], low, scale.astype(dtype)[:, None], shift.astype(dtype)[:, None]
        )


@_quiet
def batch_moments(
    x3: Data,
    *,
    payload: PerChannel | None = None,
    mask: Data | None = None,
    count: int | None = None,
) -> Moments:
    """Count, mean and m2 of each channel of an (N, C, L) array.

    `payload` takes this rank's part of the first message: (2C,) for ``count * mean`` and
    ``m2 + count * mean**2``, or (C,) for the first of them alone.
    """
    moments = _moments(x3, mask)
    if payload is not None:
        payload[...] = moments.pack()[: payload.size]
    return moments


def _moments(x3: Data, mask: Data | None) -> Moments:
    """The sums of a block are taken about its own pivot, its mean in low precision.

    Blocks are merged in float64. Constants give an m2 of exactly 0, because deviations are first
    taken from a value of the channel. The deviation of a masked value is 0.
    """
    dtype = parameter_dtype(x3.dtype)
    moments = None
    for part in _blocks(x3.shape, dtype.itemsize):
        block = x3[part].astype(dtype, copy=False)
        n, _, length = block.shape
        count = n * length
        first = block[0, :, 0]
        if mask is not None:
            valid = _valid(mask, part)
            count = count_valid(valid)
            if count == 0:
                continue
            sample, _, place = np.unravel_index(valid.argmax(), valid.shape)
            first = block[sample, :, place]
            block = np.where(valid, block, first[:, None])
        ones = _ones(n if length == 1 else length, dtype)
        if length == 1:
            rough = (ones @ (block - first[:, None])[:, :, 0]).astype(np.float64) / count
            pivot = (first + rough).astype(dtype)
            deviation = block - pivot[:, None]
            if mask is not None:
                np.copyto(deviation, 0, where=~valid)
            columns = deviation[:, :, 0]
            mean = (ones @ columns).astype(np.float64) / count
            squares = _einsum("nc,nc->c", columns, columns).astype(np.float64)
        else:
            rows = (block - first[:, None]) @ ones
            rough = np.add.reduce(rows, axis=0, dtype=np.float64) / count
            pivot = (first + rough).astype(dtype)
            deviation = block - pivot[:, None]
            if mask is not None:
                np.copyto(deviation, 0, where=~valid)
            mean = np.add.reduce(deviation @ ones, axis=0, dtype=np.float64) / count
            squares = np.add.reduce(np.vecdot(deviation, deviation), axis=0, dtype=np.float64)
        found = Moments(count, pivot + mean, squares - count * mean * mean)
        moments = found if moments is None else moments.merge(found)
    return moments or Moments(0, np.zeros(x3.shape[1]), np.zeros(x3.shape[1]))


@_quiet
def recentre_moments(local: Moments, weighted: PerChannel, count: int, payload: PerChannel) -> None:
    """Writes ``m2 + local.count * (mean - weighted / count)**2`` into `payload`, (C,) float64.

    The second message of float64 data; `weighted` and `count` are the results of the first.
    """
    shift = local.mean - weighted / max(count, 1)
    payload[...] = local.m2 + local.count * shift * shift


@_quiet
def finalize_moments(
    moments: Moments,
    eps: float,
    *,
    running: tuple[Data, Data] | None = None,
    factor: float = 0.0,
    form: str = "local",
) -> tuple[PerChannel, PerChannel, PerChannel]:
    """(mean, biased variance, invstd), (C,) float64 each, of local or pooled moments.

    With `running`, its mean and variance are updated in place by `factor`; a count of 0 leaves
    them alone. This is the one place where a variance is clamped at 0.

    `form` says what `moments.mean` and `moments.m2` hold: themselves (``"local"``); the sums over
    the ranks of both halves of the message (``"pooled"``); the pooled first half, and the pooled
    result of :func:`recentre_moments` (``"recentred"``).
    """
    mean, var, invstd = _finalize(moments, eps, form)
    if running is not None and moments.count > 0:
        update_running(*running, mean, var, moments.count, factor)
    return mean, var, invstd


def _finalize(moments: Moments, eps: float, form: str) -> tuple[PerChannel, PerChannel, PerChannel]:
    count, mean, m2 = moments
    if form != "local":
        mean = mean / max(count, 1)
    if form == "pooled" and count:
        m2 = m2 - moments.mean * mean
    var = np.maximum(m2, 0.0) / max(count, 1)
    invstd = 1.0 / np.sqrt(var + eps)
    return mean, var, invstd


@_quiet
def given_statistics(
    mean: Data, var: Data, eps: float
) -> tuple[PerChannel, PerChannel, PerChannel]:
    """(mean, variance, invstd), (C,) float64 each, of a given mean and variance."""
    mean, var = mean.astype(np.float64), var.astype(np.float64)
    return mean, var, 1.0 / np.sqrt(var + eps)


def update_running(
    running_mean: Data,
    running_var: Data,
    mean: PerChannel,
    var: PerChannel,
    count: int,
    factor: float,
    batches: Data = NO_COUNTER,
) -> None:
    """``running = (1 - factor) * running + factor * new`` in place; the variance is unbiased.

    `batches` counts one more.
    """
    unbiased = var * (count / max(count - 1, 1))
    moved_mean = (1.0 - factor) * running_mean.astype(np.float64) + factor * mean
    moved_var = (1.0 - factor) * running_var.astype(np.float64) + factor * unbiased
    number = int(batches) + 1
    # No call between these: Python checks for interrupts only at calls and jumps.
    running_mean[...], running_var[...], batches[...] = moved_mean, moved_var, number


@_quiet
def normalize(
    x3: Data,
    transform: Transform,
    *,
    relu: bool = False,
    residual3: Data | None = None,
    out3: Data | None = None,
    relu_bits: Data | None = None,
    mask: Data | None = None,
) -> Data:
    """``activation((x - mean) * invstd * weight + bias + residual)``, (N, C, L).

    `relu_bits`, a uint8 array of ceil(size / 8) values, takes one bit for every y above 0.
    """
    y3 = np.empty_like(x3) if out3 is None else out3
    _normalize(x3, y3, transform, relu, residual3, relu_bits, mask)
    return y3


def _normalize(
    x3: Data,
    y3: Data,
    transform: Transform,
    relu: bool,
    residual3: Data | None,
    relu_bits: Data | None,
    mask: Data | None,
) -> None:
    affine = _Affine.of(x3, transform)
    for part in _blocks(x3.shape, affine.scale.itemsize):
        y = x3[part] - affine.high
        y *= affine.scale
        y += affine.shift
        if residual3 is not None:
            y += residual3[part]
        if relu:
            np.maximum(y, 0, out=y)
        if mask is not None:
            np.copyto(y, 0, where=~_valid(mask, part))
        y3[part] = y
    if relu_bits is not None:
        flat = y3.reshape(-1)
        step = _BLOCK_BYTES // 8
        for i in range(0, relu_bits.size, step):
            relu_bits[i : i + step] = np.packbits(flat[8 * i : 8 * (i + step)] > 0)


def _apply_relu_grad(
    dy3: Data, x3: Data, part: Part, affine: _Affine, relu_bits: Data | None
) -> Data:
    """One block of dy where the ReLU let y through, else 0, in the dtype of the arithmetic."""
    dy = dy3[part]
    if relu_bits is None:
        kept = (x3[part] - affine.high) * affine.scale + affine.shift > 0
    else:
        _, c, length = x3.shape
        first, start = part[0].start, part[2].start
        n, _, run = dy.shape
        kept = np.empty((n, c, run), np.bool_)
        rows = kept.reshape(1 if run == length else c, -1)  # each of them contiguous in the bits
        for i, row in enumerate(rows):
            begin = (first * c + i) * length + start
            bits = np.unpackbits(relu_bits[begin >> 3 : (begin + row.size + 7) >> 3])
            row[...] = bits[begin & 7 :][: row.size]
    passed = np.zeros(dy.shape, affine.scale.dtype)
    np.positive(dy, out=passed, where=kept)
    return passed


@_quiet
def backward_reduce(
    dy3: Data,
    x3: Data,
    transform: Transform,
    *,
    relu: bool = False,
    relu_bits: Data | None = None,
    payload: PerChannel | None = None,
    mask: Data | None = None,
) -> BackwardSums:
    """The sums of dy and of dy * (x - mean), after the activation's backward, per channel.

    Where y passed a ReLU is read from `relu_bits` if given, else computed again from x. `payload`,
    (2C,), takes a copy of both for the message.
    """
    sums = _reduce(dy3, x3, _Affine.of(x3, transform), relu, relu_bits, mask)
    if payload is not None:
        payload[: x3.shape[1]], payload[x3.shape[1] :] = sums
    return sums


def _reduce(
    dy3: Data,
    x3: Data,
    affine: _Affine,
    relu: bool,
    relu_bits: Data | None,
    mask: Data | None,
) -> BackwardSums:
    c, dtype = x3.shape[1], affine.scale.dtype
    sum_dy, sum_dy_xmu = np.zeros(c), np.zeros(c)
    for part in _blocks(x3.shape, dtype.itemsize):
        dy = (
            _apply_relu_grad(dy3, x3, part, affine, relu_bits)
            if relu
            else dy3[part].astype(dtype, copy=False)
        )
        deviation = x3[part] - affine.high
        if mask is not None:
            valid = _valid(mask, part)
            dy = np.where(valid, dy, dtype.type(0))
            np.copyto(deviation, 0, where=~valid)
        n, _, length = dy.shape
        if length == 1:
            dy, deviation = dy[:, :, 0], deviation[:, :, 0]
            sum_dy += (_ones(n, dtype) @ dy).astype(np.float64)
            sum_dy_xmu += _einsum("nc,nc->c", dy, deviation).astype(np.float64)
        else:
            sum_dy += np.add.reduce(dy @ _ones(length, dtype), axis=0, dtype=np.float64)
            sum_dy_xmu += np.add.reduce(np.vecdot(dy, deviation), axis=0, dtype=np.float64)
    sum_dy_xmu -= affine.low * sum_dy
    return BackwardSums(sum_dy, sum_dy_xmu)


@_quiet
def backward_input(
    dy3: Data,
    x3: Data,
    transform: Transform,
    *,
    sums: BackwardSums | None = None,
    count: int = 0,
    relu: bool = False,
    relu_bits: Data | None = None,
    out3: Data | None = None,
    dresidual3: Data | None = None,
    local: BackwardSums | None = None,
    dweight: Data | None = None,
    dbias: Data | None = None,
    mask: Data | None = None,
) -> Data:
    """The gradient of x, (N, C, L).

    ``dx = (dy - sum_dy / n - (x - mean) * invstd**2 * sum_dy_xmu / n) * invstd * weight``, with
    `sums` and n = `count` of all ranks. Without `sums` the statistics are constants and dx is
    ``dy * invstd * weight``. `dresidual3` takes dy after the activation's backward. The gradients
    of weight and bias, from the `local` sums, are added to `dweight` and `dbias`.
    """
    dx3 = np.empty_like(x3) if out3 is None else out3
    affine = _Affine.of(x3, transform)
    _input(
        (dy3, x3, dx3, dresidual3),
        affine,
        transform.invstd,
        sums,
        local,
        count=count,
        relu=relu,
        relu_bits=relu_bits,
        dweight=dweight,
        dbias=dbias,
        mask=mask,
    )
    return dx3


def _input(
    arrays: tuple[Data, Data, Data, Data | None],
    affine: _Affine,
    invstd: PerChannel,
    sums: BackwardSums | None,
    local: BackwardSums | None,
    *,
    count: int,
    relu: bool,
    relu_bits: Data | None,
    dweight: Data | None,
    dbias: Data | None,
    mask: Data | None,
) -> None:
    """Fills the last two of `arrays`: dy3, x3, dx3, dresidual3. Adds to `dweight` and `dbias`."""
    dy3, x3, dx3, dresidual3 = arrays
    dtype = affine.scale.dtype
    if sums is not None:
        per_value = 1.0 / max(count, 1)
        slope64 = sums.sum_dy_xmu * invstd * invstd * per_value
        slope = -slope64.astype(dtype)[:, None]
        offset = (affine.low * slope64 - sums.sum_dy * per_value).astype(dtype)[:, None]
    for part in _blocks(x3.shape, dtype.itemsize):
        dy = (
            _apply_relu_grad(dy3, x3, part, affine, relu_bits)
            if relu
            else dy3[part].astype(dtype, copy=False)
        )
        if mask is not None:
            valid = _valid(mask, part)
            dy = np.where(valid, dy, dtype.type(0))
        if dresidual3 is not None:
            dresidual3[part] = dy
        if sums is None:
            dx = dy * affine.scale
        else:
            dx = x3[part] - affine.high
            dx *= slope
            dx += dy
            dx += offset
            dx *= affine.scale
        if mask is not None:
            np.copyto(dx, 0, where=~valid)
        dx3[part] = dx
    if local is not None:
        of_weight, of_bias = dweight, dbias
        if of_weight is not None:
            of_weight = of_weight + (local.sum_dy_xmu * invstd).astype(of_weight.dtype)
        if of_bias is not None:
            of_bias = of_bias + local.sum_dy.astype(of_bias.dtype)
        if dweight is not None:  # no call from here on: see update_running
            dweight[...] = of_weight
        if dbias is not None:
            dbias[...] = of_bias


# ---- whole stretches of a forward and a backward -------------------------------------------------


@_quiet
def finish_forward(
    moments: Moments,
    form: str,
    x3: Data,
    y3: Data,
    weight: Data | None,
    bias: Data | None,
    eps: float,
    *,
    relu: bool = False,
    residual3: Data | None = None,
    relu_bits: Data | None = None,
    running: tuple[Data, Data] | None = None,
    batches: Data = NO_COUNTER,
    factor: float = 0.0,
    mask: Data | None = None,
) -> tuple[PerChannel, PerChannel]:
    """:func:`finalize_moments` and :func:`normalize` into y3: (mean, invstd)."""
    mean, var, invstd = _finalize(moments, eps, form)
    _normalize(x3, y3, Transform(mean, invstd, weight, bias), relu, residual3, relu_bits, mask)
    if running is not None and moments.count > 0:
        update_running(*running, mean, var, moments.count, factor, batches)
    return mean, invstd


@_quiet
def local_forward(
    x3: Data,
    y3: Data,
    weight: Data | None,
    bias: Data | None,
    eps: float,
    *,
    relu: bool = False,
    residual3: Data | None = None,
    relu_bits: Data | None = None,
    running: tuple[Data, Data] | None = None,
    batches: Data = NO_COUNTER,
    factor: float = 0.0,
    mask: Data | None = None,
    count: int | None = None,
) -> tuple[PerChannel, PerChannel]:
    """The forward of one rank: :func:`batch_moments`, then as :func:`finish_forward`."""
    moments = _moments(x3, mask)
    mean, var, invstd = _finalize(moments, eps, "local")
    _normalize(x3, y3, Transform(mean, invstd, weight, bias), relu, residual3, relu_bits, mask)
    if running is not None and moments.count > 0:
        update_running(*running, mean, var, moments.count, factor, batches)
    return mean, invstd


@_quiet
def local_backward(
    dy3: Data,
    x3: Data,
    dx3: Data,
    transform: Transform,
    *,
    count: int,
    relu: bool = False,
    relu_bits: Data | None = None,
    dresidual3: Data | None = None,
    dweight: Data | None = None,
    dbias: Data | None = None,
    mask: Data | None = None,
) -> None:
    """The backward of one rank, into dx3; a count of 0: the statistics are constants."""
    affine = _Affine.of(x3, transform)
    sums = _reduce(dy3, x3, affine, relu, relu_bits, mask)
    _input(
        (dy3, x3, dx3, dresidual3),
        affine,
        transform.invstd,
        sums if count else None,
        sums,
        count=count,
        relu=relu,
        relu_bits=relu_bits,
        dweight=dweight,
        dbias=dbias,
        mask=mask,
    )


def prepare_forward(
    x3: Data,
    y3: Data,
    *,
    residual3: Data | None = None,
    relu_bits: Data | None = None,
    relu: bool = False,
    running_dtype: str | None = None,
    ranks: int = 1,
    mask: Data | None = None,
) -> None:
    """Does nothing: other backends compile here, before the first message."""


def prepare_backward(
    dy3: Data,
    x3: Data,
    dx3: Data,
    *,
    dresidual3: Data | None = None,
    relu_bits: Data | None = None,
    relu: bool = False,
    constant: bool = False,
    ranks: int = 1,
    mask: Data | None = None,
) -> None:
    """As :func:`prepare_forward`, for a backward."""
