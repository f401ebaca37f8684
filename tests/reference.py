"""Batch norm as in a textbook, in float64: the oracle. Shares no code with the library."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Forward(NamedTuple):
    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    unbiased: np.ndarray


def _shape(x, axis):
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return shape


def _others(x, axis):
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def forward(x, weight=None, bias=None, eps=1e-5, axis=1, residual=None, relu=False):
    """y and the statistics of x, two passes in float64."""
    x = x.astype(np.float64)
    others = _others(x, axis)
    n = x.size // max(x.shape[axis], 1)
    mean = x.mean(axis=others)
    var = ((x - mean.reshape(_shape(x, axis))) ** 2).mean(axis=others)
    y = normalized(x, mean, var, weight, bias, eps, axis, residual, relu)
    return Forward(y, mean, var, var * n / max(n - 1, 1))


def normalized(x, mean, var, weight=None, bias=None, eps=1e-5, axis=1, residual=None, relu=False):
    """y for given statistics."""
    shape = _shape(x, axis)
    mean, var = (np.asarray(v, np.float64).reshape(shape) for v in (mean, var))
    y = (x.astype(np.float64) - mean) / np.sqrt(var + eps)
    if weight is not None:
        y = y * weight.astype(np.float64).reshape(shape)
    if bias is not None:
        y = y + bias.astype(np.float64).reshape(shape)
    if residual is not None:
        y = y + residual.astype(np.float64)
    return np.maximum(y, 0) if relu else y


class Backward(NamedTuple):
    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    dz: np.ndarray


def backward(dy, x, weight=None, bias=None, eps=1e-5, axis=1, kept=None, fixed=None):
    """Gradients of sum(y * dy). `kept`: where a ReLU let y through; `fixed`: (mean, var)."""
    x, dz = x.astype(np.float64), dy.astype(np.float64)
    others, shape = _others(x, axis), _shape(x, axis)
    mean, var = fixed if fixed is not None else forward(x, eps=eps, axis=axis)[1:3]
    mean, var = (np.asarray(v, np.float64).reshape(shape) for v in (mean, var))
    if kept is not None:
        dz = dz * kept
    invstd = 1 / np.sqrt(var + eps)
    xhat = (x - mean) * invstd
    dxhat = dz if weight is None else dz * weight.astype(np.float64).reshape(shape)
    if fixed is None:
        dx = dxhat - dxhat.mean(axis=others, keepdims=True)
        dx = (dx - xhat * (dxhat * xhat).mean(axis=others, keepdims=True)) * invstd
    else:
        dx = dxhat * invstd
    return Backward(dx, (dz * xhat).sum(axis=others), dz.sum(axis=others), dz)


def error(actual, expected):
    """The largest difference, relative to the largest magnitude expected (at least 1)."""
    expected = np.asarray(expected, np.float64)
    if expected.size == 0:
        return 0.0
    difference = np.abs(np.asarray(actual).astype(np.float64) - expected).max()
    return float(difference / max(1.0, np.abs(expected).max()))


def packed(values, mask, axis=1):
    """The values at the valid positions as one (n, C) array; `mask` lacks the channel axis."""
    return np.moveaxis(values, axis, -1)[mask != 0]


def unpacked(values, mask, axis=1):
    """The way back, with 0 at the other positions."""
    whole = np.zeros((*mask.shape, values.shape[1]))
    whole[mask != 0] = values
    return np.moveaxis(whole, -1, axis)
