"""The backward of the backward, for gradient penalties through a synchronised batch norm.

Per channel, with d = x - mean, s = invstd, w = weight (1 without one), g = dy where the activation
let y through (else 0), and means over the n values of all ranks, backward is ::

    dx = w s (g - mean(g) - d s^2 mean(g d)),   dweight_r = s sum_r(g d),   dbias_r = sum_r(g)

where ``sum_r`` runs over the values of one rank. The scalar ``sum(v dx) + sum over ranks r of
(a_r dweight_r + b_r dbias_r)``, with v = ddx, a = ddweight, b = ddbias, has the gradients ::

    ddy = w s (v - mean(v) - d s^2 mean(v d)) + a s d + b      (0 where the activation stopped y)
    dx = s (a g - mean(a g) - d s^2 mean(a g d)) - w s^3 ((v - mean(v)) mean(g d)
         + (g - mean(g)) mean(v d) + d (mean(v g) - mean(v) mean(g) - 3 s^2 mean(v d) mean(g d)))
    dweight_r = s (sum_r(v g) - mean(g) sum_r(v) - s^2 mean(g d) sum_r(v d))

from ``d(d_i s)/dx_j = s ([i = j] - 1/n - d_i d_j s^2 / n)`` and ``ds/dx_j = -s^3 d_j / n``. The
seven sums over all ranks behind these means travel in one message. Where the statistics are
constants (evaluation) only the terms without a mean are left, and a s g in dx.

Array expressions, for NumPy and CuPy alike; no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from . import typing
from .arrays import Array, as_array, is_cupy, on_device_of, parameter_dtype
from .backends import backend_for
from .checks import check_like, check_parameter
from .collective import CollectiveCall, fingerprint
from .forward_backward import Saved, call_name
from .statistics import padded_length

SUMS = 7
_BLOCK = 1 << 17  # elements at once in NumPy: temporaries stay in the cache
_DEVICE_BLOCK = 1 << 26  # in CuPy: temporaries of at most 256 MB each


class DoubleGrads(NamedTuple):
    """The result of :func:`batch_norm_double_backward`.

    Attributes:
        ddy: like dy, the gradient in the ``dy`` of backward.
        dx: like x.
        dweight: (C,), sums over this rank's values; None where there was no weight.
    """

    ddy: typing.Array
    dx: typing.Array
    dweight: typing.Array | None


class _Sums(NamedTuple):
    """Sums over one rank or all, (C,) float64 each; ag and agd are weighted with ddweight."""

    v: Array
    vd: Array
    vg: Array
    g: Array
    gd: Array
    ag: Array
    agd: Array


class _Data(NamedTuple):
    """(N, C, L) arrays: ddx (or None), dy, where y passed the activation (or None), ddresidual.

    Where x is valid, (N, 1, L) or None, is part of where y passed.
    """

    ddx3: Array | None
    dy3: Array
    kept3: Array | None
    ddresidual3: Array | None
    valid3: Array | None


def double_backward_call(saved: Saved) -> CollectiveCall:
    """The collective call of one double backward."""
    bound = saved.bound
    what = call_name("double backward", bound.name)
    text = fingerprint(what, bound.settings)
    return CollectiveCall(bound.comm, what, padded_length(SUMS * bound.channels), text)


def double_backward(
    call: CollectiveCall,
    ddx: Array | None,
    ddweight: Array | None,
    ddbias: Array | None,
    saved: Saved,
    dy: Array,
    ddresidual: Array | None = None,
) -> DoubleGrads:
    """:func:`batch_norm_double_backward` inside a collective call."""
    saved.check_complete()
    x3, layout = saved.x3, saved.bound.layout
    with on_device_of(x3):
        data = _prepare(saved, ddx, dy, ddresidual)
        per_channel = (
            _checked("ddweight", ddweight, saved.weight, saved),
            _checked("ddbias", ddbias, saved.bias, saved),
        )
        ddy3, dx3 = np.empty_like(x3), np.empty_like(x3)
        local = total = _reduce(data, saved, per_channel[0])
        if call.ranks > 1:
            payload = call.payload(x3, SUMS * layout.channels)
            payload[...] = np.concatenate(local)
            total = _Sums(*np.split(call.allreduce()[1], SUMS))
        dweight = _write(data, saved, *per_channel, local, total, ddy3, dx3)
        dweight = None if saved.weight is None else dweight.astype(saved.weight.dtype)
        return DoubleGrads(layout.restore(ddy3), layout.restore(dx3), dweight)


def _prepare(saved: Saved, ddx: Array | None, dy: Array, ddresidual: Array | None) -> _Data:
    x3, layout = saved.x3, saved.bound.layout
    views: list[Array | None] = []
    for what, array in (("ddx", ddx), ("dy", dy), ("ddresidual", ddresidual)):
        if array is None and what != "dy":
            views.append(None)
            continue
        array = as_array(array, what)
        check_like(what, array, x3, layout)
        views.append(layout.view(array))
    if ddresidual is not None and not saved.bound.options.residual:
        raise ValueError("ddresidual was given, but the forward had no residual")
    kept3 = valid3 = None if saved.mask is None else saved.mask[:, None] != 0
    if saved.bound.relu:
        # From the backend's own backward, so that both have the same bits.
        ones, kept = np.ones_like(x3), np.empty_like(x3)
        options = {"relu": True, "relu_bits": saved.relu_bits, "dresidual3": kept}
        backend_for(x3).backward_input(ones, x3, saved.transform, **options)
        kept3 = kept != 0 if valid3 is None else (kept != 0) & valid3
    return _Data(views[0], views[1], kept3, views[2], valid3)


def _checked(what: str, array: Array | None, parameter: Array | None, saved: Saved) -> Array | None:
    """A gradient's gradient as (C,) float64, or None."""
    if array is None:
        return None
    if parameter is None:
        raise ValueError(f"{what} was given, but the forward had no {what[2:]}")
    array = as_array(array, what)
    check_parameter(what, array, saved.x3, saved.bound.layout)
    return array.astype(np.float64)


def _blocks(x3: Array) -> Iterator[tuple[slice, slice, slice]]:
    n, c, length = x3.shape
    size = _DEVICE_BLOCK if is_cupy(x3) else _BLOCK
    samples = max(1, size // max(1, c * length))
    run = max(1, size // c) if samples == 1 else max(1, length)
    for i in range(0, n, samples):
        for j in range(0, length, run):
            yield slice(i, i + samples), slice(None), slice(j, j + run)


def _values(
    data: _Data, x3: Array, high: Array, part: tuple[slice, slice, slice]
) -> tuple[Array | None, Array, Array]:
    """v (None without ddx), g and x - high of one block, in the dtype of the arithmetic."""
    dtype = high.dtype
    v = None if data.ddx3 is None else data.ddx3[part].astype(dtype, copy=False)
    g = data.dy3[part].astype(dtype, copy=False)
    d = x3[part] - high
    if data.kept3 is not None:
        g = np.where(data.kept3[part], g, dtype.type(0))
    if data.valid3 is not None:
        v = None if v is None else np.where(data.valid3[part], v, dtype.type(0))
        d = np.where(data.valid3[part], d, dtype.type(0))
    return v, g, d


def _split_mean(saved: Saved) -> tuple[Array, Array]:
    """The mean as its value in the dtype of the arithmetic, (C, 1), and the float64 rest, (C,)."""
    high = saved.mean.astype(parameter_dtype(saved.x3.dtype))
    return high[:, None], saved.mean - high


def _reduce(data: _Data, saved: Saved, ddweight: Array | None) -> _Sums:
    """The sums over this rank's values."""
    high, low = _split_mean(saved)
    totals = np.zeros_like(saved.mean, shape=(5, saved.bound.channels))
    with np.errstate(all="ignore"):
        for part in _blocks(saved.x3):
            v, g, d = _values(data, saved.x3, high, part)
            terms = (g, g * d) if v is None else (g, g * d, v, v * d, v * g)
            for total, term in zip(totals, terms, strict=False):
                total += term.sum(axis=(0, 2), dtype=np.float64)
        g, gd, v, vd, vg = totals
        vd, gd = vd - low * v, gd - low * g
        a = 0.0 if ddweight is None else ddweight
        return _Sums(v, vd, vg, g, gd, a * g, a * gd)


def _write(
    data: _Data,
    saved: Saved,
    ddweight: Array | None,
    ddbias: Array | None,
    local: _Sums,
    total: _Sums,
    ddy3: Array,
    dx3: Array,
) -> Array:
    """Fills ddy and dx; returns dweight, (C,) float64."""
    s = saved.invstd
    w = 1.0 if saved.weight is None else saved.weight
    a = 0.0 if ddweight is None else ddweight
    b = 0.0 if ddbias is None else ddbias
    high, low = _split_mean(saved)
    none = np.zeros_like(s)
    with np.errstate(all="ignore"):
        v, vd, vg, g, gd, ag, agd = (
            none if saved.bound.options.given else sums / max(saved.count, 1) for sums in total
        )
        cube = w * s**3
        # Each result is a linear form of v, g, d = (x - high) - low and 1.
        ddy = [w * s, none, a * s - cube * vd, b - w * s * v]
        dx = [
            -cube * gd,
            a * s - cube * vd,
            -cube * (vg - v * g - 3 * s * s * vd * gd) - s**3 * agd,
            cube * (gd * v + vd * g) - s * ag,
        ]
        for form in (ddy, dx):
            form[3] = form[3] - form[2] * low
        ddy, dx = ([c.astype(high.dtype)[:, None] for c in form] for form in (ddy, dx))
        for part in _blocks(saved.x3):
            block = _values(data, saved.x3, high, part)
            values = _linear(dx, *block)
            if data.valid3 is not None:
                values = np.where(data.valid3[part], values, values.dtype.type(0))
            dx3[part] = values
            values = _linear(ddy, *block)
            if data.ddresidual3 is not None:
                values = values + data.ddresidual3[part]
            if data.kept3 is not None:
                values = np.where(data.kept3[part], values, values.dtype.type(0))
            ddy3[part] = values
        return s * (local.vg - g * local.v - s * s * gd * local.vd)


def _linear(form: list[Array], v: Array | None, g: Array, d: Array) -> Array:
    of_v, of_g, of_d, constant = form
    value = g * of_g + d * of_d + constant
    return value if v is None else value + v * of_v
