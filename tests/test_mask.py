"""Masks of valid values: everything is that of the valid values alone, packed into one array."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from conftest import DTYPES, NUMBA, TOLERANCE
from test_functional import for_dtype
from test_layers import normal

from cupybn import backends
from cupybn import functional as F

SHAPES = [(4, 3, 5, 7), (3, 3, 10, 12), (9, 3), (2, 3, 130), (2, 3, 2, 2, 3), (300, 3, 2)]
OPTIONS = {
    "plain": (False, False),
    "relu": (True, False),
    "residual": (False, True),
    "relu and residual": (True, True),
}


@pytest.fixture(params=["numpy", "numba"])
def backend(request):
    if request.param == "numba" and not NUMBA:
        pytest.skip("Numba is not installed")
    before = backends.cpu_backend()
    yield backends.use_cpu_backend(request.param)
    backends.use_cpu_backend(before)


def positions(shape, axis=1):
    axis %= len(shape)
    return shape[:axis] + shape[axis + 1 :]


def half(shape, seed=0, axis=1):
    """About half of the positions, at random."""
    return np.random.default_rng(seed).random(positions(shape, axis)) < 0.5


def spoiled(values, mask, axis=1):
    """The values, with NaN, Inf and huge numbers where they are masked."""
    values = values.copy(order="K")
    bad = np.array([np.nan, np.inf, -np.inf, 6e4], np.float32).astype(values.dtype)
    there = np.moveaxis(values, axis, -1)
    masked = mask == 0
    there[masked] = bad[np.arange(masked.sum() * there.shape[-1]) % 4].reshape(-1, there.shape[-1])
    return values


def textbook(x, dy, mask, weight, bias, residual=None, relu=False, axis=1, eps=1e-5, fixed=None):
    """y, mean, var, unbiased variance, dx, dweight, dbias and dresidual of the packed values."""
    values = (None if v is None else reference.packed(v, mask, axis) for v in (x, dy, residual))
    x, dy, residual = values
    options = {"eps": eps, "residual": residual, "relu": relu}
    if fixed is None:
        y, *statistics = reference.forward(x, weight, bias, **options)
    else:
        y, statistics = reference.normalized(x, *fixed, weight, bias, **options), [*fixed, None]
    kept = y > 0 if relu else None
    g = reference.backward(dy, x, weight, bias, eps=eps, kept=kept, fixed=fixed)
    y, dx, dresidual = (reference.unpacked(v, mask, axis) for v in (y, g.dx, g.dz))
    return y, *statistics, dx, g.dweight, g.dbias, dresidual


def zero_where_masked(array, mask, axis=1):
    """Whether it is positive zero in all masked places."""
    masked = np.moveaxis(array, axis, -1)[mask == 0].astype(np.float64)
    return not masked.any() and not np.signbit(masked).any()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_result_is_that_of_the_packed_values(backend, shape, dtype, option):
    relu, has_residual = OPTIONS[option]
    tolerance, mask = TOLERANCE[dtype.name], half(shape)
    weight, bias = for_dtype(dtype)
    x, dy, residual = (spoiled(normal(shape, dtype, seed), mask) for seed in (1, 2, 3))
    residual = residual if has_residual else None
    options = {"activation": "relu" if relu else None, "residual": residual}
    y, saved = F.batch_norm_forward(x, weight, bias, mask=mask, **options)
    grads = F.batch_norm_backward(dy, saved)
    expected, mean, var, _, dx, dweight, dbias, dresidual = textbook(
        x, dy, mask, weight, bias, residual, relu
    )
    assert saved.count == mask.sum()
    assert reference.error(saved.mean, mean) < 1e-6
    assert reference.error(saved.var, var) < 1e-6
    assert reference.error(y, expected) < tolerance
    assert reference.error(grads.dx, dx) < tolerance
    assert reference.error(grads.dweight, dweight) < 10 * tolerance
    assert reference.error(grads.dbias, dbias) < 10 * tolerance
    assert zero_where_masked(y, mask)
    assert zero_where_masked(grads.dx, mask)
    assert (grads.dresidual is None) == (not has_residual)
    if has_residual:
        assert reference.error(grads.dresidual, dresidual) < tolerance
        assert zero_where_masked(grads.dresidual, mask)
        assert not np.shares_memory(grads.dresidual, dy)
