"""The primitives in NumPy: the readable reference, and the path that needs no extra.

Data are (N, C, L) arrays; everything per channel is (C,) float64. 16- and 32-bit data are computed
in float32, float64 data in float64. The work goes block by block: a block's temporaries stay in
the cache, and no float32 partial sum runs over more than one block. NaN and Inf pass through in
their own channel, without a warning.

A `mask` is an (N, L) array of bytes, nonzero where x is valid. Results are those of the valid
values alone, and 0 where masked; `count` is the number of valid values, if it is known.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import parameter_dtype
from ..statistics import BackwardSums, Moments, Transform
from .plain import NO_COUNTER

Data = NDArray[Any]
PerChannel = NDArray[np.float64]
_Plan = tuple[np.dtype[Any], bool, tuple[Any, ...], Any]

_BLOCK_BYTES = 1 << 19  # three temporaries of this size fit in a 2 MB L2 cache
_ROWS = 1024  # of columns, L == 1, in one float32 sum
# A number as an array of no dimensions, which takes NumPy half the time.
_number = lru_cache(maxsize=256)(partial(np.array, dtype=np.float64))
_ZERO, _ONE = np.array(0.0), np.array(1.0)
_over_samples = partial(np.add.reduce, axis=0, dtype=np.float64)
_quiet = np.errstate(all="ignore")
# The function behind np.einsum, which spends 4 us on reading its arguments in Python.
_einsum = getattr(getattr(np, "_core", np).multiarray, "c_einsum", np.einsum)


@lru_cache(maxsize=256)
def _plan(shape: tuple[int, int, int], dtype: np.dtype[Any]) -> _Plan:
    """How to go through an (N, C, L) array: (dtype, columns, blocks, dot).

    `dtype` is that of the arithmetic. `columns`: L is 1, and a block is (n, C), else (n, C, l). A
    block has all channels, in about _BLOCK_BYTES; of each there are its place, its count of values
    per channel, and a function for their sums. `dot` sums the products of two blocks per channel.
    """
    n, c, length = shape
    dtype, columns = parameter_dtype(dtype), length == 1
    size = _BLOCK_BYTES // dtype.itemsize
    samples = max(1, size // max(1, c * length))
    run = max(1, size // c) if samples == 1 else max(1, length)
    samples = min(samples, _ROWS) if columns else samples
    ones, blocks = np.ones(min(samples, n) if columns else min(run, length), dtype), []
    for i in range(0, n, samples):
        for j in range(0, length, run):
            k, m = min(samples, n - i), min(run, length - j)
            part = slice(i, i + k), slice(None), 0 if columns else slice(j, j + m)
            sum_of = ones[:k].dot if columns else partial(_sum_of_rows, ones[:m])
            blocks.append((part, k * m, sum_of))
    return (
        dtype,
        columns,
        tuple(blocks),
        partial(_einsum, "nc,nc->c") if columns else lambda a, b: _over_samples(np.vecdot(a, b)),
    )


def _sum_of_rows(ones: Data, block: Data) -> Any:
    return _over_samples(block @ ones)


def count_valid(mask: Data) -> int:
    """How many positions are valid."""
    return int(np.count_nonzero(mask))


def _valid(mask: Data, part: Any) -> Any:
    """Which positions of a block are valid, (n, 1, l) or (n, 1)."""
    return mask[part[0], None, part[2]] != 0


def _affine(plan: _Plan, transform: tuple[Any, ...], shifted: bool = True) -> tuple[Any, ...]:
    """``(x - mean) * invstd * weight + bias`` as ``(x - high) * scale + shift``, for blocks.

    The mean is split into `high`, its value in the dtype of the arithmetic, and `low`, the rest;
    `low` goes into `shift` in float64: no digit is lost, and x is not read once more.
    (high, low, scale, shift): low is (C,) float64, the shift None unless asked for.
    """
    dtype, columns, _, _ = plan
    mean, invstd, weight, bias = transform
    high, shift = mean.astype(dtype), None
    low = mean - high
    scale = invstd if weight is None else invstd * weight
    if shifted:
        shift = (-low * scale if bias is None else bias - low * scale).astype(dtype)
    scale = scale.astype(dtype)
    if columns:
        return high, low, scale, shift
    return high[:, None], low, scale[:, None], None if shift is None else shift[:, None]


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
    moments = Moments(*_moments(_plan(x3.shape, x3.dtype), x3, mask))
    if payload is not None:
        payload[...] = moments.pack()[: payload.size]
    return moments


def _moments(plan: _Plan, x3: Data, mask: Data | None) -> tuple[int, PerChannel, PerChannel]:
    """The sums of a block are taken about its own pivot, its mean in low precision.

    Blocks are merged in float64. Constants give an m2 of exactly 0, because deviations are first
    taken from a value of the channel. The deviation of a masked value is 0.
    """
    (dtype, columns, blocks, dot), moments = plan, None
    for part, count, sum_of in blocks:
        block, sample, place = x3[part].astype(dtype, copy=False), 0, 0
        if mask is not None:
            valid = _valid(mask, part)
            count = count_valid(valid)
            if count == 0:
                continue
            sample, place = divmod(int(valid.argmax()), valid.shape[-1])
        first = block[sample] if columns else block[sample, :, place]
        if mask is not None:
            block = np.where(valid, block, first if columns else first[:, None])
        number = _number(count)
        rough = sum_of(block - (first if columns else first[:, None])) / number
        pivot = (first + rough).astype(dtype)
        deviation = block - (pivot if columns else pivot[:, None])
        if mask is not None:
            np.copyto(deviation, 0, where=~valid)
        mean = sum_of(deviation) / number
        found = count, pivot + mean, dot(deviation, deviation) - number * mean * mean
        moments = found if moments is None else Moments(*moments).merge(Moments(*found))
    return moments or (0, np.zeros(x3.shape[1]), np.zeros(x3.shape[1]))


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
    if running is not None and moments.count:
        update_running(*running, mean, var, moments.count, factor)
    return mean, var, invstd


def _finalize(
    moments: tuple[int, PerChannel, PerChannel], eps: float, form: str
) -> tuple[PerChannel, PerChannel, PerChannel]:
    count, mean, m2 = moments
    number = _number(count or 1)
    if form != "local":
        mean = mean / number
        if form == "pooled" and count:
            m2 = m2 - moments[1] * mean
    var = np.maximum(m2, _ZERO) / number
    return mean, var, _ONE / np.sqrt(var + _number(eps))


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
    kept, taken = np.asarray(1.0 - factor), np.asarray(factor)
    unbiased = var * _number(count / max(count - 1, 1))
    moved_mean = kept * running_mean.astype(np.float64) + taken * mean
    moved_var = kept * running_var.astype(np.float64) + taken * unbiased
    # No call between these: Python checks for interrupts only at calls and jumps.
    running_mean[...], running_var[...], batches[...] = moved_mean, moved_var, int(batches) + 1


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
    _normalize(_plan(x3.shape, x3.dtype), x3, y3, transform, relu, residual3, relu_bits, mask)
    return y3


def _normalize(
    plan: _Plan,
    x3: Data,
    y3: Data,
    transform: tuple[Any, ...],
    relu: bool,
    residual3: Data | None,
    relu_bits: Data | None,
    mask: Data | None,
) -> None:
    high, _, scale, shift = _affine(plan, transform)
    for part, _, _ in plan[2]:
        y = x3[part] - high
        y *= scale
        y += shift
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
    dy: Data,
    deviation: Any,
    shape: tuple[int, ...],
    part: Any,
    affine: tuple[Any, ...],
    relu_bits: Data | None,
) -> Data:
    """One block of dy where the ReLU let y through, else 0, in the dtype of the arithmetic."""
    _, _, scale, shift = affine
    if relu_bits is None:
        kept = deviation * scale + shift > 0
    else:
        _, c, length = shape
        whole = length == 1 or dy.shape[2] == length
        first, start = part[0].start, 0 if whole else part[2].start
        kept = np.empty(dy.shape, np.bool_)
        rows = kept.reshape(1 if whole else c, -1)  # each of them contiguous in the bits
        for i, row in enumerate(rows):
            begin = (first * c + i) * length + start
            bits = np.unpackbits(relu_bits[begin >> 3 : (begin + row.size + 7) >> 3])
            row[...] = bits[begin & 7 :][: row.size]
    passed = np.zeros(dy.shape, scale.dtype)
    np.positive(dy, out=passed, where=kept)
    return passed


def _load(
    part: Any,
    constant: bool,
    dy3: Data,
    x3: Data,
    affine: tuple[Any, ...],
    relu: bool,
    relu_bits: Data | None,
    mask: Data | None,
) -> tuple[Data, Any]:
    """A block of dy, after the activation's backward, and of x - high; both 0 where masked.

    With `constant` statistics x - high is found for a ReLU alone.
    """
    deviation = None if constant and not relu else x3[part] - affine[0]
    if relu:
        dy = _apply_relu_grad(dy3[part], deviation, x3.shape, part, affine, relu_bits)
    else:
        dy = dy3[part].astype(affine[0].dtype, copy=False)
    if mask is not None:
        valid = _valid(mask, part)
        dy = np.where(valid, dy, dy.dtype.type(0))
        if deviation is not None:
            np.copyto(deviation, 0, where=~valid)
    return dy, deviation


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
    plan = _plan(x3.shape, x3.dtype)
    source = dy3, x3, _affine(plan, transform, relu), relu, relu_bits, mask
    sums = BackwardSums(*_reduce(plan, source)[:2])
    if payload is not None:
        payload[: x3.shape[1]], payload[x3.shape[1] :] = sums
    return sums


def _reduce(
    plan: _Plan, source: tuple[Any, ...]
) -> tuple[PerChannel, PerChannel, tuple[Data, Data] | None]:
    """The sums of dy and of dy * (x - mean), and the block if it is the only one."""
    (_, _, blocks, dot), low, loaded = plan, source[2][1], None
    sum_dy, sum_dy_xmu = np.zeros(low.shape), np.zeros(low.shape)
    for part, _, sum_of in blocks:
        loaded = _load(part, False, *source)
        sum_dy += sum_of(loaded[0])
        sum_dy_xmu += dot(*loaded)
        loaded = loaded if len(blocks) == 1 else None  # memory for the next one
    sum_dy_xmu -= low * sum_dy
    return sum_dy, sum_dy_xmu, loaded


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
    plan, invstd = _plan(x3.shape, x3.dtype), transform.invstd
    source = dy3, x3, _affine(plan, transform, relu), relu, relu_bits, mask
    total = sums and (sums.sum_dy, sums.sum_dy_xmu * invstd)
    own = local and (local.sum_dy, local.sum_dy_xmu * invstd)
    outputs = (dx3, dresidual3, dweight, dbias) if own else (dx3, dresidual3, None, None)
    _input(plan, source, outputs, invstd, total, own, count)
    return dx3


def _input(
    plan: _Plan,
    source: tuple[Any, ...],
    outputs: tuple[Any, ...],
    invstd: PerChannel,
    sums: tuple[PerChannel, PerChannel] | None,
    local: Any,
    count: int,
    loaded: tuple[Data, Data] | None = None,
) -> None:
    """Fills the first two of `outputs`, dx3 and dresidual3, and adds to dweight and dbias.

    `sums` and `local` are those of dy and of dy * xhat; `loaded` is the block if there is but one.
    """
    (dtype, columns, blocks, _), (_, low, scale, _) = plan, source[2]
    (dx3, dresidual3, dweight, dbias), mask = outputs, source[5]
    if sums is not None:
        sum_dy, sum_dy_xhat = sums
        per_value = _number(1.0 / (count or 1))
        slope64 = sum_dy_xhat * invstd * per_value
        slope = -slope64.astype(dtype)
        offset = (low * slope64 - sum_dy * per_value).astype(dtype)
        if not columns:
            slope, offset = slope[:, None], offset[:, None]
    for part, _, _ in blocks:
        dy, dx = loaded or _load(part, sums is None, *source)
        if dresidual3 is not None:
            dresidual3[part] = dy
        if sums is None:
            dx = dy * scale
        else:
            dx *= slope
            dx += dy
            dx += offset
            dx *= scale
        if mask is not None:
            np.copyto(dx, 0, where=~_valid(mask, part))
        dx3[part] = dx
        del dy, dx  # memory for the next block
    of_weight = None if dweight is None else dweight + local[1].astype(dweight.dtype)
    of_bias = None if dbias is None else dbias + local[0].astype(dbias.dtype)
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
    plan = _plan(x3.shape, x3.dtype)
    _normalize(plan, x3, y3, (mean, invstd, weight, bias), relu, residual3, relu_bits, mask)
    if running is not None and moments.count:
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
    plan = _plan(x3.shape, x3.dtype)
    moments = _moments(plan, x3, mask)
    mean, var, invstd = _finalize(moments, eps, "local")
    _normalize(plan, x3, y3, (mean, invstd, weight, bias), relu, residual3, relu_bits, mask)
    if running is not None and moments[0]:
        update_running(*running, mean, var, moments[0], factor, batches)
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
    plan, invstd = _plan(x3.shape, x3.dtype), transform.invstd
    source = dy3, x3, _affine(plan, transform, relu), relu, relu_bits, mask
    sum_dy, sum_dy_xmu, loaded = _reduce(plan, source)
    sums = sum_dy, sum_dy_xmu * invstd
    outputs = dx3, dresidual3, dweight, dbias
    _input(plan, source, outputs, invstd, sums if count else None, sums, count, loaded)


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
