"""What frameworks of pure functions need: contexts as arrays, new running statistics."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
from conftest import DTYPES
from test_functional import BIAS, WEIGHT, for_dtype
from test_layers import layouts, normal

from cupybn import DTypeError, PeerError, ShapeError, backends
from cupybn import functional as F
from cupybn.testing import run_ranks

OPTIONS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "relu and residual": {"activation": "relu", "residual": True},
}


def assert_same(expected, actual):
    for a, b in zip(expected, actual, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def again(saved, **options):
    """The context that a framework makes of arrays it kept, in memory of their own."""
    arrays = {
        what: array.copy(order="K") if isinstance(array, np.ndarray) else array
        for what, array in saved.arrays().items()
    }
    return F.Saved.from_arrays(eps=1e-3, **arrays, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_backward_from_arrays_has_the_same_bits(dtype, options):
    options = dict(options)
    has_residual = options.pop("residual", False)
    weight, bias = for_dtype(dtype)
    for x in layouts(normal((4, 3, 5, 5), dtype)).values():
        residual = normal(x.shape, dtype, 1) if has_residual else None
        dy, ddx = normal(x.shape, dtype, 2), normal(x.shape, dtype, 3)
        _, saved = F.batch_norm_forward(x, weight, bias, 1e-3, residual=residual, **options)
        other = again(saved, **options)
        expected, actual = F.batch_norm_backward(dy, saved), F.batch_norm_backward(dy, other)
        assert (expected.dresidual is not None) == has_residual
        assert_same(expected, actual)
        assert_same(expected, F.batch_norm_backward(dy, other))  # a context is not used up
        twice = (
            F.batch_norm_double_backward(ddx, None, None, s, dy, ddresidual=residual)
            for s in (saved, other)
        )
        assert_same(*twice)
        assert (saved.eps, saved.count, saved.comm) == (other.eps, other.count, other.comm)
        np.testing.assert_array_equal(saved.var, other.var)


@pytest.mark.parametrize("kind", ["read-only", "strided"])
def test_backends_are_given_plain_arrays(kind, monkeypatch):
    """Others would be another type to Numba, and other memory to a kernel on a device."""
    x, residual = normal((8, 3, 5, 5)), normal((8, 3, 5, 5), seed=3)
    options = {"activation": "relu"}
    _, saved = F.batch_norm_forward(x, WEIGHT, BIAS, residual=residual, **options)
    expected = F.batch_norm_backward(residual, saved)
    given = saved.arrays()
    for name, array in given.items():
        if isinstance(array, np.ndarray) and kind == "strided" and name != "x":
            given[name] = np.repeat(array, 2)[::2]
        elif isinstance(array, np.ndarray):
            given[name] = array.copy()
            given[name].flags.writeable = False
    again = F.Saved.from_arrays(**given, eps=1e-5, **options)
    backend, seen = backends.cpu_backend(), []
    backward = backend.local_backward

    def spied(dy3, x3, dx3, transform, **options):
        seen.extend([dy3, x3, dx3, *transform, *options.values()])
        backward(dy3, x3, dx3, transform, **options)

    monkeypatch.setattr(backend, "local_backward", spied)
    for got, value in zip(F.batch_norm_backward(residual, again), expected, strict=True):
        assert got.tobytes() == value.tobytes()
    arrays = [array for array in seen if isinstance(array, np.ndarray)]
    assert len(arrays) == 11
    assert all(array.flags.carray for array in arrays)


def test_a_channels_last_shape_and_no_weight():
    x, dy = normal((4, 5, 5, 3)), normal((4, 5, 5, 3), seed=1)
    _, saved = F.batch_norm_forward(x, eps=1e-3, channel_axis=-1)
    assert saved.arrays()["x"].shape == x.shape
    expected = F.batch_norm_backward(dy, saved)
    assert_same(expected, F.batch_norm_backward(dy, again(saved, channel_axis=-1)))


def test_over_ranks_with_an_empty_one():
    x, dy = normal((8, 3, 2, 2)), normal((8, 3, 2, 2), seed=1)
    cuts = [(0, 1), (1, 1), (1, 8)]

    def rank(comm):
        mine = slice(*cuts[comm.rank])
        _, saved = F.batch_norm_forward(x[mine], WEIGHT, BIAS, 1e-3, comm=comm, name="f")
        other = again(saved, comm=comm, name="f")
        return F.batch_norm_backward(dy[mine], saved), F.batch_norm_backward(dy[mine], other)

    for expected, actual in run_ranks(3, rank):
        assert_same(expected, actual)


def test_statistics_of_a_framework_without_float64():
    x, dy = normal((4, 3, 5, 5)), normal((4, 3, 5, 5), seed=1)
    _, saved = F.batch_norm_forward(x, WEIGHT, BIAS)
    arrays = saved.arrays()
    arrays |= {what: arrays[what].astype(np.float32) for what in ("mean", "invstd")}
    arrays["count"] = np.float32(arrays["count"])
    other = F.Saved.from_arrays(eps=1e-5, **arrays)
    assert other.mean.dtype == np.float64
    assert type(other.count) is int
    expected, actual = F.batch_norm_backward(dy, saved), F.batch_norm_backward(dy, other)
    np.testing.assert_allclose(actual.dx, expected.dx, rtol=1e-4, atol=1e-6)


BAD = {
    "mean, shape": ({"mean": np.zeros(2)}, ShapeError, r"mean has shape \(2,\), expected \(3,\)"),
    "invstd, kind": ({"invstd": [1.0] * 3}, DTypeError, "invstd must be a NumPy or CuPy array"),
    "weight": ({"weight": WEIGHT.astype(np.float64)}, DTypeError, "weight is float64, but float32"),
    "bits, dtype": ({"relu_bits": np.zeros(38, bool)}, DTypeError, "relu_bits is bool, expected"),
    "bits, shape": ({"relu_bits": np.zeros(2, np.uint8)}, ShapeError, r"expected \(38,\)"),
    "count": ({"count": 1.5}, ValueError, "count must be a number of values, got 1.5"),
    "count, negative": ({"count": -1}, ValueError, "count must be a number of values, got -1"),
    "eps": ({"eps": 0}, ValueError, "eps must be positive"),
    "activation": ({"activation": "gelu"}, ValueError, "activation must be None or 'relu'"),
    "comm": ({"comm": 3}, TypeError, "comm must be"),
    "x": ({"x": np.zeros(3, np.float32)}, ShapeError, "expected at least 2D input"),
}


@pytest.mark.parametrize(("change", "error", "text"), BAD.values(), ids=BAD)
def test_arrays_that_do_not_fit(change, error, text):
    x = normal((4, 3, 5, 5))
    options = {"activation": "relu", "residual": x}
    _, saved = F.batch_norm_forward(x, WEIGHT, BIAS, **options)
    arguments = {"eps": 1e-5, "activation": "relu", **saved.arrays()}
    F.Saved.from_arrays(**arguments)
    with pytest.raises(error, match=text):
        F.Saved.from_arrays(**(arguments | change))


def test_a_copy_of_a_context_has_arrays_of_its_own():
    x, dy = normal((4, 3, 5, 5)), normal((4, 3, 5, 5), seed=1)
    _, saved = F.batch_norm_forward(x, WEIGHT.copy(), BIAS)
    expected, other = F.batch_norm_backward(dy, saved), copy.deepcopy(saved)
    x[...] = 0
    saved.weight[...] = 7
    assert_same(expected, F.batch_norm_backward(dy, other))


def test_a_forward_that_keeps_nothing():
    x, residual = normal((4, 3, 5, 5)), normal((4, 3, 5, 5), seed=1)
    options = {"activation": "relu", "residual": residual}
    expected, kept = F.batch_norm_forward(x, WEIGHT, BIAS, **options)
    alive = weakref.ref(x)
    for _ in range(3):  # bound anew, kept, met
        y, saved = F.batch_norm_forward(x, WEIGHT, BIAS, save=False, **options)
        assert_same((expected, kept.mean, kept.var), (y, saved.mean, saved.var))
        assert saved.count == kept.count
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    F.update_running(mean, var, saved, 0.5)
    assert mean.any()
    dy = x.copy()
    for call in (
        lambda: F.batch_norm_backward(dy, saved),
        lambda: F.batch_norm_double_backward(dy, None, None, saved, dy),
        saved.arrays,
    ):
        with pytest.raises(ValueError, match="saved is of a forward with save=False"):
            call()
    del x, residual, kept, options
    gc.collect()
    assert alive() is None


def test_a_backward_without_a_context_on_one_rank():
    x = normal((4, 3, 5, 5))

    def rank(comm):
        _, saved = F.batch_norm_forward(x, comm=comm, save=comm.rank != 1)
        try:
            F.batch_norm_backward(x, saved)
        except (ValueError, PeerError) as error:
            failed = type(error)
        F.batch_norm_forward(x, comm=comm)  # the communicator is usable
        return failed

    assert run_ranks(3, rank) == [PeerError, ValueError, PeerError]


def test_updated_running_leaves_its_arguments_alone():
    x = normal((4, 3, 5, 5))
    _, saved = F.batch_norm_forward(x, save=False)
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    mean.flags.writeable = var.flags.writeable = False
    new = F.updated_running(mean, var, saved, 0.25)
    written = mean.copy(), var.copy()
    F.update_running(*written, saved, 0.25)
    assert_same(written, new)
    assert not mean.any()
    assert (var == 1).all()
    _, empty = F.batch_norm_forward(x[:0], save=False)
    same = F.updated_running(mean, var, empty, 0.25)
    assert_same((mean, var), same)
    assert not np.shares_memory(mean, same[0])
    with pytest.raises(ShapeError, match="running_var has shape"):
        F.updated_running(mean, var[:2], saved, 0.25)
