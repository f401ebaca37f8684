"""The five primitives of every CPU backend against the float64 textbook."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import reference
from conftest import DTYPES, NUMBA, TOLERANCE
from hypothesis import given, settings
from hypothesis import strategies as st

from cupybn import functional
from cupybn.backends import cpu as compiled_backend
from cupybn.backends import numpy as numpy_backend
from cupybn.statistics import Moments, Transform

BACKENDS = [numpy_backend, *([compiled_backend] if NUMBA else [])]
SHAPES = [
    (1, 1, 2), (2, 3, 1), (3, 2, 9), (8, 31, 15), (33, 5, 49), (2, 65, 196), (1, 2, 10007),
    (300, 33, 1), (2500, 3, 1), (4, 1, 81), (1, 700, 300), (64, 1025, 1), (3, 70000, 1),
    (2, 2, 140000), (1, 1, 300000),
]  # fmt: skip
PRIMITIVES = ["batch_moments", "finalize_moments", "normalize", "backward_reduce", "backward_input"]

pytestmark = pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.__name__.split(".")[-1])


def data(shape, dtype, seed=0, mean=0.0, std=1.0):
    values = np.random.default_rng(seed).standard_normal(shape) * std + mean
    return values.astype(np.float32).astype(dtype) if dtype != np.float64 else values


def parameters(c, dtype):
    rng = np.random.default_rng(c)
    dtype = np.float64 if dtype == np.float64 else np.float32
    return rng.uniform(0.5, 1.5, c).astype(dtype), rng.standard_normal(c).astype(dtype)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_backends_and_functional_have_the_same_signatures(backend, name):
    expected = inspect.signature(getattr(numpy_backend, name))
    assert inspect.signature(getattr(backend, name)) == expected
    public = inspect.signature(getattr(functional, name)).parameters
    spelt = {"transform": ["mean", "invstd", "weight", "bias"], "relu": ["activation"]}
    if name == "batch_moments":
        spelt["count"] = []  # of the mask, which the public function finds itself
    names = [spelt.get(parameter, [parameter]) for parameter in expected.parameters]
    assert list(public) == [name for spelling in names for name in spelling]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "relu, with_residual", [(False, False), (True, False), (True, True), (False, True)]
)
def test_forward_and_backward_agree_with_float64(backend, shape, dtype, relu, with_residual):
    tolerance = TOLERANCE[dtype.name]
    x, dy = data(shape, dtype, 1), data(shape, dtype, 2)
    residual = data(shape, dtype, 3) if with_residual else None
    weight, bias = parameters(shape[1], dtype)
    relu_bits = np.empty((x.size + 7) // 8, np.uint8) if with_residual and relu else None

    moments = backend.batch_moments(x)
    mean, var, invstd = backend.finalize_moments(moments, 1e-5)
    y = backend.normalize(
        x, Transform(mean, invstd, weight, bias), relu=relu, residual3=residual, relu_bits=relu_bits
    )
    expected = reference.forward(x, weight, bias, residual=residual, relu=relu)
    assert y.dtype == dtype
    assert moments.count == shape[0] * shape[2]
    assert reference.error(mean, expected.mean) < 1e-6
    assert reference.error(var, expected.var) < 1e-6
    assert reference.error(y, expected.y) < tolerance

    options = {"relu": relu, "relu_bits": relu_bits}
    sums = backend.backward_reduce(dy, x, Transform(mean, invstd, weight, bias), **options)
    dweight, dbias = np.zeros_like(weight), np.zeros_like(bias)
    dresidual = np.empty_like(x) if with_residual else None
    dx = backend.backward_input(
        dy,
        x,
        Transform(mean, invstd, weight, bias),
        sums=sums,
        count=moments.count,
        dresidual3=dresidual,
        local=sums,
        dweight=dweight,
        dbias=dbias,
        **options,
    )
    kept = kept_by_relu(x, weight, bias, residual, expected, y) if relu else None
    gradient = reference.backward(dy, x, weight, bias, kept=kept)
    assert reference.error(dx, gradient.dx) < tolerance
    assert reference.error(dweight, gradient.dweight) < 1e-5
    assert reference.error(dbias, gradient.dbias) < 1e-5
    if with_residual:
        assert reference.error(dresidual, gradient.dz if relu else dy) < tolerance


def kept_by_relu(x, weight, bias, residual, expected, y):
    """Where the exact y is above 0; where rounding decides, close to 0, where the computed y is."""
    exact = reference.normalized(x, expected.mean, expected.var, weight, bias, residual=residual)
    return np.where(np.abs(exact) < 1e-5, y > 0, exact > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_statistics_need_no_sums(backend, dtype):
    x, dy = data((4, 3, 10), dtype, 1), data((4, 3, 10), dtype, 2)
    weight, bias = parameters(3, dtype)
    mean, var = np.array([0.1, -2.0, 3.0]), np.array([0.5, 1.0, 4.0])
    invstd = 1 / np.sqrt(var + 1e-5)
    y = backend.normalize(x, Transform(mean, invstd, weight, bias))
    dx = backend.backward_input(dy, x, Transform(mean, invstd, weight, bias))
    tolerance = TOLERANCE[dtype.name]
    assert reference.error(y, reference.normalized(x, mean, var, weight, bias)) < tolerance
    expected = reference.backward(dy, x, weight, bias, fixed=(mean, var))
    assert reference.error(dx, expected.dx) < tolerance


@pytest.mark.parametrize(
    "shape", [(8, 3, 3136), (64, 5, 49), (4096, 3, 1), (1, 2, 100003)], ids=str
)
@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_large_mean_in_float32(backend, shape, mean):
    x = data(shape, np.float32, mean=mean)
    expected = reference.forward(x)
    naive = (x * x).mean(axis=(0, 2)) - x.mean(axis=(0, 2)) ** 2
    moments = backend.batch_moments(x)
    actual_mean, var, invstd = backend.finalize_moments(moments, 1e-5)
    assert np.abs(var / expected.var - 1).max() < 1e-5
    assert np.abs(naive / expected.var - 1).max() > 1e-2  # the formula this test is there to forbid
    y = backend.normalize(x, Transform(actual_mean, invstd))
    assert np.abs(y - expected.y).max() < 1e-5
    dy = data(shape, np.float32, 5)
    sums = backend.backward_reduce(dy, x, Transform(actual_mean, invstd))
    dx = backend.backward_input(
        dy, x, Transform(actual_mean, invstd), sums=sums, count=moments.count
    )
    assert reference.error(dx, reference.backward(dy, x).dx) < 1e-5


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_large_mean_in_float64(backend, mean):
    x = data((64, 3, 49), np.float64, mean=mean)
    _, var, _ = backend.finalize_moments(backend.batch_moments(x), 1e-5)
    assert np.abs(var / reference.forward(x).var - 1).max() < 1e-9


@pytest.mark.parametrize("shape", [(8, 4, 49), (5000, 4, 1), (1, 4, 100003)], ids=str)
def test_an_outlier_first_does_not_spoil_the_variance(backend, shape):
    x = data(shape, np.float32)
    x[0, :, 0] = 1e4
    _, var, _ = backend.finalize_moments(backend.batch_moments(x), 1e-5)
    assert np.abs(var / reference.forward(x).var - 1).max() < 1e-5


@pytest.mark.parametrize("value", [0.0, 0.1, -1.0, 3.3333, 1e-30, 123456.789, 1e6, 6e4])
@pytest.mark.parametrize("shape", [(3, 2, 7), (5001, 2, 1), (1, 2, 200001), (70, 2, 49)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants_have_variance_zero(backend, value, shape, dtype):
    value = min(value, 65504.0) if dtype == np.float16 else value
    x = np.full(shape, value).astype(dtype)
    moments = backend.batch_moments(x)
    assert (moments.mean == x.astype(np.float64)[0, :, 0]).all()
    for eps in (1e-5, 1e-30):
        mean, var, invstd = backend.finalize_moments(moments, eps)
        assert (var == 0).all()
        y = backend.normalize(x, Transform(mean, invstd))
        assert (y == 0).all()


def test_rounding_below_zero_is_clamped(backend):
    """What ranks with equal values can come to: a pooled m2 a rounding error below 0."""
    below = Moments(4, np.array([1e4, 0.0]), np.array([-1e-7, 2.0]))
    for eps in (1e-5, 1e-30):
        _, var, invstd = backend.finalize_moments(below, eps)
        np.testing.assert_array_equal(var, [0.0, 0.5])
        assert np.isfinite(invstd).all()


def test_tiny_variance_gives_no_nan(backend):
    x = (1.0 + 1e-5 * np.random.default_rng(0).standard_normal((64, 2, 9))).astype(np.float32)
    for eps in (1e-5, 1e-30):
        mean, var, invstd = backend.finalize_moments(backend.batch_moments(x), eps)
        y = backend.normalize(x, Transform(mean, invstd))
        assert np.isfinite(y).all()
        assert np.abs(var / reference.forward(x).var - 1).max() < 1e-4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(4, 5, 9), (9, 5, 1)], ids=str)
def test_nan_and_inf_stay_in_their_channel(backend, bad, shape):
    x = data(shape, np.float32)
    clean = x.copy()
    x[1, 2, 0] = bad
    moments, expected = backend.batch_moments(x), backend.batch_moments(clean)
    mean, var, invstd = backend.finalize_moments(moments, 1e-5)
    y = backend.normalize(x, Transform(mean, invstd))
    others = np.arange(5) != 2
    assert not np.isfinite(var[2])
    assert not np.isfinite(y[:, 2]).any() or np.isnan(y[1, 2, 0])
    np.testing.assert_array_equal(moments.mean[others], expected.mean[others])
    assert np.isfinite(y[:, others]).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 3, 0), (0, 3, 1)], ids=str)
def test_empty(backend, shape):
    x = np.empty(shape, np.float32)
    moments = backend.batch_moments(x)
    assert moments.count == 0
    running = np.full(3, 2.0, np.float32), np.full(3, 5.0, np.float32)
    mean, _, invstd = backend.finalize_moments(moments, 1e-5, running=running, factor=0.5)
    assert (running[0] == 2).all()
    assert (running[1] == 5).all()
    assert backend.normalize(x, Transform(mean, invstd)).shape == shape
    sums = backend.backward_reduce(x, x, Transform(mean, invstd))
    assert (sums.sum_dy == 0).all()
    assert backend.backward_input(x, x, Transform(mean, invstd), sums=sums, count=0).shape == shape


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60)),
    scale=st.floats(1e-3, 1e3),
    offset=st.floats(-1e3, 1e3),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=60)
def test_any_shape(backend, shape, scale, offset, seed):
    x = data(shape, np.float32, seed, offset, scale)
    moments = backend.batch_moments(x)
    mean, var, invstd = backend.finalize_moments(moments, 1e-5)
    expected = reference.forward(x)
    spread = np.sqrt(expected.var) + 1e-30
    assert (np.abs(mean - expected.mean) <= 1e-6 * spread + 1e-12 * np.abs(expected.mean)).all()
    assert (np.abs(var - expected.var) <= 1e-5 * expected.var + 1e-12).all()
    # A float32 input cannot say more about y than its own rounding, offset / scale.
    assert np.abs(backend.normalize(x, Transform(mean, invstd)) - expected.y).max() < 1e-5


@given(splits=st.lists(st.integers(0, 20), min_size=1, max_size=8), offset=st.floats(-1e6, 1e6))
@settings(deadline=None, max_examples=40)
def test_merging_parts_equals_the_whole(backend, splits, offset):
    x = data((sum(splits), 3, 5), np.float64, mean=offset)
    whole = backend.batch_moments(x)
    merged = Moments(0, np.zeros(3), np.zeros(3))
    for part in np.split(x, np.cumsum(splits)[:-1]):
        merged = merged.merge(backend.batch_moments(part))
    assert merged.count == whole.count
    scale = max(1.0, abs(offset))
    assert np.abs(merged.mean - whole.mean).max(initial=0) <= 1e-14 * scale
    assert np.abs(merged.m2 - whole.m2).max(initial=0) <= 1e-11 * scale * max(1, whole.count)
