"""The five primitives in NumPy: the readable reference, and the path that needs no extra.

Data are (N, C, L) arrays; everything per channel is (C,) float64. 16- and 32-bit data are computed
in float32, float64 data in float64. The work goes block by block: a block's temporaries stay in
the cache, and no float32 partial sum runs over more than one block.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ..arrays import parameter_dtype
from ..statistics import BackwardSums, Moments, Transform
from .composed import compose

Data = NDArray[Any]
PerChannel = NDArray[np.float64]
Part = tuple[slice, slice, slice]
_Function = TypeVar("_Function", bound=Any)

_BLOCK = 1 << 19  # bytes: three temporaries of this size fit in a 2 MB L2 cache
_ROWS = 1024  # of columns, L == 1, in one float32 sum


def _quiet(primitive: _Function) -> _Function:
    """Without NumPy's floating point warnings: NaN and Inf pass through, in their channel alone."""

    @wraps(primitive)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return primitive(*args, **kwargs)

    return cast(_Function, quiet)


def _blocks(x3: Data) -> Iterator[Part]:
    """Pieces of an (N, C, L) array with all channels, each about _BLOCK bytes in the arithmetic."""
    n, c, length = x3.shape
    size = _BLOCK // parameter_dtype(x3.dtype).itemsize
    samples = max(1, size // max(1, c * length))
    if length == 1:
        samples = min(samples, _ROWS)
    run = max(1, size // c) if samples == 1 else length
    everything = slice(None)
    for i in range(0, n, samples):
        for j in range(0, length, max(1, run)):
            yield slice(i, i + samples), everything, slice(j, j + run)


def _channel_sums(a: Data, b: Data | None = None) -> PerChannel:
    """Sums of a, or of a * b, over the first and last axis of one block: (C,) float64."""
    n, _, length = a.shape
    if length == 1:
        a = a[:, :, 0]
        sums = np.ones(n, a.dtype) @ a if b is None else np.einsum("nc,nc->c", a, b[:, :, 0])
        return sums.astype(np.float64)
    rows = a @ np.ones(length, a.dtype) if b is None else np.vecdot(a, b)
    return cast(PerChannel, rows.sum(axis=0, dtype=np.float64))


class _Affine(NamedTuple):
    """``(x - mean) * invstd * weight + bias`` as ``(x - high) * scale + shift``, (C, 1) each.

    The mean is split into `high`, its value in the dtype of the arithmetic, and `low`, the rest;
    `low` goes into `shift` in float64, so that no digit of it is lost and no pass over x is spent.
    """

    high: Data
    low: PerChannel
    scale: Data
    shift: Data

    @staticmethod
    def of(
        x3: Data, mean: PerChannel, invstd: PerChannel, weight: Data | None, bias: Data | None
    ) -> _Affine:
        dtype = parameter_dtype(x3.dtype)
        high = mean.astype(dtype)
        low = mean - high
        scale = invstd if weight is None else invstd * weight
        shift = -low * scale if bias is None else bias - low * scale
        return _Affine(
            high[:, None], low, scale.astype(dtype)[:, None], shift.astype(dtype)[:, None]
        )

    def apply(self, block: Data) -> Data:
        """y of one block, before residual and activation, in the dtype of the arithmetic."""
        y = block - self.high
        y *= self.scale
        y += self.shift
        return y


@_quiet
def batch_moments(x3: Data, *, payload: PerChannel | None = None) -> Moments:
    """Count, mean and m2 of each channel of an (N, C, L) array.

    `payload` takes this rank's part of the first message: (2C,) for ``count * mean`` and
    ``m2 + count * mean**2``, or (C,) for the first of them alone.

    Every block has its own pivot, its mean in low precision, about which the sums are taken;
    blocks are merged in float64. Constants give an m2 of exactly 0, because deviations are first
    taken from a value of the channel.
    """
    dtype = parameter_dtype(x3.dtype)
    c = x3.shape[1]
    moments = Moments(0, np.zeros(c), np.zeros(c))
    for part in _blocks(x3):
        block = x3[part].astype(dtype, copy=False)
        count = block.shape[0] * block.shape[2]
        if count == 0:
            continue
        first = block[0, :, 0]
        rough = _channel_sums(block - first[:, None]) / count
        pivot = (first + rough).astype(dtype)
        deviation = block - pivot[:, None]
        mean = _channel_sums(deviation) / count
        m2 = _channel_sums(deviation, deviation) - count * mean * mean
        moments = moments.merge(Moments(count, pivot + mean, m2))
    if payload is not None:
        payload[...] = moments.pack()[: payload.size]
    return moments


@_quiet
def recentre_moments(local: Moments, weighted: PerChannel, count: int, payload: PerChannel) -> None:
    """Writes ``m2 + local.count * (mean - weighted / count)**2`` into `payload`, (C,) float64.

    The second message of float64 data; `weighted` and `count` are what came back of the first.
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
    count = moments.count
    if form == "pooled":
        moments = Moments.unpack(count, np.concatenate([moments.mean, moments.m2]))
    elif form == "recentred":
        moments = Moments(count, moments.mean / max(count, 1), moments.m2)
    var = np.maximum(moments.m2, 0.0) / max(count, 1)
    invstd = 1.0 / np.sqrt(var + eps)
    if running is not None and count > 0:
        update_running(*running, moments.mean, var, count, factor)
    return moments.mean, var, invstd


@_quiet
def given_statistics(
    mean: Data, var: Data, eps: float
) -> tuple[PerChannel, PerChannel, PerChannel]:
    """(mean, variance, invstd), (C,) float64 each, of a given mean and variance."""
    mean, var = mean.astype(np.float64), var.astype(np.float64)
    return mean, var, 1.0 / np.sqrt(var + eps)


def prepare_forward(
    x3: Data,
    y3: Data,
    *,
    residual3: Data | None = None,
    mask: Data | None = None,
    relu: bool = False,
    running_dtype: str | None = None,
    ranks: int = 1,
) -> None:
    """A backend that compiles does so here, before the first message; NumPy has nothing to do."""


def prepare_backward(
    dy3: Data,
    x3: Data,
    dx3: Data,
    *,
    dresidual3: Data | None = None,
    mask: Data | None = None,
    relu: bool = False,
    constant: bool = False,
    ranks: int = 1,
) -> None:
    """As :func:`prepare_forward`, for a backward."""


def update_running(
    running_mean: Data,
    running_var: Data,
    mean: PerChannel,
    var: PerChannel,
    count: int,
    factor: float,
) -> None:
    """``running = (1 - factor) * running + factor * new`` in place; the variance is unbiased."""
    unbiased = var * (count / max(count - 1, 1))
    running_mean[...] = (1.0 - factor) * running_mean.astype(np.float64) + factor * mean
    running_var[...] = (1.0 - factor) * running_var.astype(np.float64) + factor * unbiased


@_quiet
def normalize(
    x3: Data,
    transform: Transform,
    *,
    relu: bool = False,
    residual3: Data | None = None,
    out3: Data | None = None,
    mask: Data | None = None,
) -> Data:
    """``activation((x - mean) * invstd * weight + bias + residual)``, (N, C, L).

    `mask`, a uint8 array of ceil(size / 8) values, takes one bit for every y above 0.
    """
    y3 = np.empty_like(x3) if out3 is None else out3
    affine = _Affine.of(x3, *transform)
    for part in _blocks(x3):
        y = affine.apply(x3[part])
        if residual3 is not None:
            y += residual3[part]
        if relu:
            np.maximum(y, 0, out=y)
        y3[part] = y
    if mask is not None:
        flat = y3.reshape(-1)
        step = _BLOCK // 8
        for i in range(0, mask.size, step):
            mask[i : i + step] = np.packbits(flat[8 * i : 8 * (i + step)] > 0)
    return y3


def _passing(dy: Data, block: Data, affine: _Affine, kept: Data | None, relu: bool) -> Data:
    """One block of dy where the activation let y through, in the dtype of the arithmetic."""
    dy = dy.astype(affine.scale.dtype, copy=False)
    if not relu:
        return dy
    return np.where(affine.apply(block) > 0 if kept is None else kept, dy, dy.dtype.type(0))


def _kept(mask: Data | None, shape: tuple[int, ...], part: Part) -> Data | None:
    """The mask of one block, as booleans."""
    if mask is None:
        return None
    _, c, length = shape
    samples, _, run = (range(size)[p] for size, p in zip(shape, part, strict=True))
    kept = np.empty((len(samples), c, len(run)), np.bool_)
    rows = kept.reshape(1 if len(run) == length else c, -1)  # each of them contiguous in the mask
    for i, row in enumerate(rows):
        begin = (samples[0] * c + i) * length + run[0]
        bits = np.unpackbits(mask[begin >> 3 : (begin + row.size + 7) >> 3])
        row[...] = bits[begin & 7 :][: row.size]
    return kept


@_quiet
def backward_reduce(
    dy3: Data,
    x3: Data,
    transform: Transform,
    *,
    relu: bool = False,
    mask: Data | None = None,
    payload: PerChannel | None = None,
) -> BackwardSums:
    """The sums of dy and of dy * (x - mean), after the activation's backward, per channel.

    Where y passed a ReLU is read from `mask` if given, else computed again from x. `payload`,
    (2C,), takes a copy of both for the message.
    """
    affine = _Affine.of(x3, *transform)
    sum_dy = np.zeros(x3.shape[1])
    sum_dy_xmu = np.zeros(x3.shape[1])
    for part in _blocks(x3):
        block = x3[part]
        dy = _passing(dy3[part], block, affine, _kept(mask, x3.shape, part), relu)
        sum_dy += _channel_sums(dy)
        sum_dy_xmu += _channel_sums(dy, block - affine.high)
    sum_dy_xmu -= affine.low * sum_dy
    sums = BackwardSums(sum_dy, sum_dy_xmu)
    if payload is not None:
        np.concatenate(sums, out=payload)
    return sums


@_quiet
def backward_input(
    dy3: Data,
    x3: Data,
    transform: Transform,
    *,
    sums: BackwardSums | None = None,
    count: int = 0,
    relu: bool = False,
    mask: Data | None = None,
    out3: Data | None = None,
    dresidual3: Data | None = None,
    local: BackwardSums | None = None,
    dweight: Data | None = None,
    dbias: Data | None = None,
) -> Data:
    """The gradient of x, (N, C, L).

    ``dx = (dy - sum_dy / n - (x - mean) * invstd**2 * sum_dy_xmu / n) * invstd * weight``, with
    `sums` and n = `count` of all ranks. Without `sums` the statistics are constants and dx is
    ``dy * invstd * weight``. `dresidual3` takes dy after the activation's backward. The gradients
    of weight and bias, from the `local` sums, are added to `dweight` and `dbias`.
    """
    dx3 = np.empty_like(x3) if out3 is None else out3
    affine = _Affine.of(x3, *transform)
    dtype = affine.scale.dtype
    if sums is not None:
        per_value = 1.0 / max(count, 1)
        slope64 = sums.sum_dy_xmu * transform.invstd * transform.invstd * per_value
        slope = -slope64.astype(dtype)[:, None]
        offset = (affine.low * slope64 - sums.sum_dy * per_value).astype(dtype)[:, None]
    for part in _blocks(x3):
        block = x3[part]
        dy = _passing(dy3[part], block, affine, _kept(mask, x3.shape, part), relu)
        if dresidual3 is not None:
            dresidual3[part] = dy
        if sums is None:
            dx = dy * affine.scale
        else:
            dx = block - affine.high
            dx *= slope
            dx += dy
            dx += offset
            dx *= affine.scale
        dx3[part] = dx
    if local is not None and dweight is not None:
        dweight += (local.sum_dy_xmu * transform.invstd).astype(dweight.dtype)
    if local is not None and dbias is not None:
        dbias += local.sum_dy.astype(dbias.dtype)
    return dx3


finish_forward, local_forward, local_backward = compose(sys.modules[__name__])
